"""The demo's tokenizer: byte-level BPE in which every digit is a token.

`python -m jaxcodec.demo.tokenizer --corpus DIR/pretrain.jsonl --out DIR` trains it and writes
tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` loads. Digits one by
one keep the arithmetic of small numbers learnable.

No special token is ever added by encoding. `END` (also BOS) separates documents in pretraining;
`PAD` fills batches.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|end|>"  # id 0
PAD = "<|pad|>"  # id 1

# Small enough that the embedding (vocabulary x 256) is a sixth of a 6 M parameter model.
VOCABULARY_SIZE = 4096

# Positions of the demo's model.
CONTEXT_LENGTH = 512


def train_tokenizer(texts: Iterable[str], vocabulary_size: int = VOCABULARY_SIZE) -> Tokenizer:
    """Returns a byte-level BPE tokenizer trained on `texts`, every digit a token of its own.

    Raises ValueError if `texts` is too small or uniform to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary_size:
        raise ValueError(
            f"Expected text enough for {vocabulary_size} tokens, it gave only "
            f"{tokenizer.get_vocab_size()}: pass more text or a smaller vocabulary."
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into the folder `out`, made if missing."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": CONTEXT_LENGTH,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")


def read_texts(corpus: Path) -> Iterator[str]:
    """Yields the "text" of every line of a JSONL file."""
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def write_tokenizer(corpus: Path, out: Path, vocabulary_size: int = VOCABULARY_SIZE) -> None:
    """Trains a tokenizer on a JSONL file of {"text"} and saves it.

    Args:
        corpus: The pretrain.jsonl that `jaxcodec.demo.corpus` writes.
        out: The folder for tokenizer.json and tokenizer_config.json.
        vocabulary_size: Tokens in all, the two special ones and 256 bytes included.
    """
    save_tokenizer(train_tokenizer(read_texts(corpus), vocabulary_size), out)


def main() -> None:
    """Runs `write_tokenizer` from the command line."""
    import tyro

    tyro.cli(write_tokenizer)


if __name__ == "__main__":
    main()
