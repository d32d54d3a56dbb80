"""JSONL files as token arrays, and shuffled batches of them with a checkpointable position.

Letters: E examples, B rows of a batch, T tokens a row (`max_length`).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import grain
import jax
import numpy as np

from jaxcodec.models.tokenizer import Tokenizer

PAIR_KEYS = {"prompt", "completion"}
TEXT_KEYS = {"text"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens, and which of them are to be learnt.

    Attributes:
      tokens: i32 [B, T], zeros from counts[b] on.
      counts: i32 [B], tokens in the row; 0 for a row that only fills the batch.
      prompt_lengths: i32 [B], leading tokens that are given and carry no loss (at least 1, as
        nothing predicts the first token).
    """

    tokens: np.ndarray | jax.Array
    counts: np.ndarray | jax.Array
    prompt_lengths: np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenized examples, end to end in one array: i is tokens[starts[i] : starts[i] + counts[i]].

    Attributes:
      tokens: i32 [all tokens].
      starts: i64 [E].
      counts: i32 [E], each at most `max_length`.
      prompt_lengths: i32 [E], as in `Batch`.
      max_length: T of every batch made from these.
    """

    tokens: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    prompt_lengths: np.ndarray
    max_length: int

    def __len__(self) -> int:
        return len(self.starts)

    def rows(self, index: np.ndarray) -> Batch:
        """The examples `index` [B] as one batch; -1 stands for an empty row."""
        counts = np.where(index < 0, 0, self.counts[index]).astype(np.int32)
        offsets = np.arange(self.max_length)
        places = np.minimum(self.starts[index][:, None] + offsets, len(self.tokens) - 1)
        tokens = np.where(offsets < counts[:, None], self.tokens[places], 0)
        return Batch(tokens, counts, self.prompt_lengths[index])

    def trimmed(self) -> "Examples":
        """The same with `max_length` no longer than the longest example needs."""
        return dataclasses.replace(self, max_length=int(self.counts.max()))

    def digest(self) -> str:
        """sha256 of everything in here, in hex: same file, tokenizer and `max_length`."""
        sha = hashlib.sha256(str(self.max_length).encode())
        for array in (self.tokens, self.starts, self.counts, self.prompt_lengths):
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()


def read_jsonl(path: str | os.PathLike) -> list[dict[str, str]]:
    """Lines of `{"prompt": ..., "completion": ...}` or `{"text": ...}`; line i is entry i - 1.

    Raises:
      ValueError: a line that is neither, naming file, line and keys; an empty file.
    """
    lines = Path(path).read_bytes().splitlines()
    if not lines:
        raise ValueError(f"{path} is empty: expected one JSON object a line.")
    return [_parse_line(line, f"{path}, line {i}") for i, line in enumerate(lines, 1)]


def _parse_line(line: bytes, where: str) -> dict[str, str]:
    wanted = 'expected {"prompt": text, "completion": text} or {"text": text}'
    try:
        record = json.loads(line)
    except ValueError as error:  # a UnicodeDecodeError is one too
        raise ValueError(f"{where} is not JSON ({error}): {wanted}.") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} holds a {type(record).__name__}: {wanted}.")
    if set(record) not in (PAIR_KEYS, TEXT_KEYS):
        raise ValueError(f"{where} has the keys {sorted(record)}: {wanted}.")
    for key, value in record.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key!r} is a {type(value).__name__}: {wanted}.")
    return record


def read_examples(
    path: str | os.PathLike, tokenizer: Tokenizer, max_length: int, *, pack: bool = False
) -> Examples:
    """Read and tokenize a JSONL file.

    A prompt and its completion become one example, prompt + completion + eos, with the loss on
    completion and eos. Texts are joined, each ended by eos, and cut into windows of `max_length`
    that share one token, so that every token but the very first is predicted once.

    Args:
      path: a file as `read_jsonl` describes it.
      tokenizer: prompt and completion are encoded apart, as a server sees them.
      max_length: most tokens of an example, T.
      pack: treat a pair as one more text, with loss everywhere (pretraining).

    Raises:
      ValueError: as `read_jsonl`; a pair of more than `max_length` tokens, or an empty prompt.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 to predict a token, got {max_length}.")
    pairs, texts = [], []
    for line, record in enumerate(read_jsonl(path), 1):
        parts = _encode(record, tokenizer)
        if pack or "text" in record:
            texts += parts
        else:
            pairs.append(parts)
            _check_pair(parts, max_length, f"{path}, line {line}")
    return _join(pairs, texts, max_length)


def _encode(record: dict[str, str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Text and eos; or prompt, completion and eos."""
    if "text" in record:
        parts = [tokenizer.encode(record["text"])]
    else:
        completion = tokenizer.encode_completion(record["completion"])
        parts = [tokenizer.encode(record["prompt"]), completion]
    return [np.array(part, np.int32) for part in (*parts, [tokenizer.eos_id])]


def _check_pair(parts: list[np.ndarray], max_length: int, where: str) -> None:
    prompt, completion, _ = (len(part) for part in parts)
    if not prompt:
        raise ValueError(f"{where}: the prompt has no tokens, and nothing predicts a first token.")
    if prompt + completion + 1 > max_length:
        raise ValueError(
            f"{where}: {prompt} prompt and {completion} completion tokens with eos are more than "
            f"max_length = {max_length}: raise it, or shorten the example."
        )


def _join(pairs: list[list[np.ndarray]], texts: list[np.ndarray], max_length: int) -> Examples:
    counts = np.array([sum(map(len, parts)) for parts in pairs], np.int64)
    pair_tokens, text_tokens = counts.sum(dtype=np.int64), sum(map(len, texts))
    windows = np.arange(0, text_tokens - 1, max_length - 1)
    window_counts = np.minimum(text_tokens - windows, max_length)
    prompt_lengths = [len(prompt) for prompt, *_ in pairs] + [1] * len(windows)
    return Examples(
        tokens=np.concatenate([part for parts in [*pairs, texts] for part in parts]),
        starts=np.concatenate([np.cumsum(counts) - counts, windows + pair_tokens]),
        counts=np.concatenate([counts, window_counts]).astype(np.int32),
        prompt_lengths=np.array(prompt_lengths, np.int32),
        max_length=max_length,
    )


def shuffled_batches(
    examples: Examples, batch_size: int, seed: int
) -> grain.DatasetIterator[Batch]:
    """Endless batches, every epoch in a new order; `get_state` and `set_state` keep the place.

    Only indices go through grain: a batch is gathered in one NumPy call, on a thread.
    """
    index = grain.MapDataset.range(len(examples)).shuffle(seed=seed).repeat().batch(batch_size)
    # One thread, a few batches ahead: a batch takes well under a millisecond to gather.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(index.map(examples.rows).to_iter_dataset(options))


def batches_in_order(examples: Examples, batch_size: int) -> Iterator[Batch]:
    """Every example once, in file order; the last batch is filled with empty rows."""
    index = np.full(-(-len(examples) // batch_size) * batch_size, -1)
    index[: len(examples)] = np.arange(len(examples))
    for rows in index.reshape(-1, batch_size):
        yield examples.rows(rows)
