"""A larger dense base for the quantizer's results: 27 M parameters, trained on Python's own text.

    python -m benchmarks.larger_base --work build/larger

writes

    WORK/text/                              what benchmarks/base_text.py writes, if it is not there
    WORK/run/                               the training run: log.jsonl, checkpoints
    WORK/config.json, weights, tokenizer    the base, in bfloat16
    WORK/calibration.jsonl, heldout.jsonl   text to quantize with, and to measure on
    WORK/facts.json                         text, tokens, losses, seconds

Nothing of it is in the repository: the text is that of whatever packages are installed, which
facts.json names. Six layers of hidden size 256 are the shipped base, whose tokenizer this one has.
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import base_text
from benchmarks.head import head
from jaxcodec.checkpoints.files import read_json, write_json
from jaxcodec.demo.tokenizer import CONTEXT_LENGTH, VOCABULARY_SIZE
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.load import copy_companions, save_model
from jaxcodec.models.tokenizer import PretrainedTokenizer
from jaxcodec.models.transformer import Model, init_model
from jaxcodec.train.loop import LOG, TrainOptions, train
from jaxcodec.train.perplexity import perplexity, text_windows
from jaxcodec.train.step import full_training

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "demo" / "weights" / "base"
FACTS = "facts.json"
LAYERS = 8
# Held-out windows looked at while it trains: enough to see it overfit, in a second or two.
WATCHED = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Train the larger base.

    Attributes:
      work: the folder of everything.
      megabytes: of text, at most.
      steps: of training.
      batch_size: windows of a step.
      learning_rate: its peak; the shipped base of half the width had 2e-3.
      layers: of the model.
      shrink: divides hidden and intermediate sizes, to try this script on a CPU.
      window: tokens.
    """

    work: Path
    megabytes: float = 100.0
    steps: int = 2500
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    layers: int = LAYERS
    shrink: int = 1
    window: int = CONTEXT_LENGTH


def model_config(layers: int = LAYERS, shrink: int = 1) -> ModelConfig:
    """Llama's shape, hidden size 512 / shrink."""
    return ModelConfig(
        model_type="llama",
        vocab_size=VOCABULARY_SIZE,
        hidden_size=512 // shrink,
        intermediate_size=1536 // shrink,
        num_layers=layers,
        num_heads=8 // shrink,
        num_kv_heads=max(4 // shrink, 1),
        head_dim=64,
        max_positions=CONTEXT_LENGTH,
        windows=(None,) * layers,
        norm_eps=1e-5,
        tie_embeddings=True,
        bos_id=0,
        eos_ids=(0,),
    )


def make(options: Options) -> dict[str, Any]:
    """Write everything; returns what facts.json says. A run that was stopped goes on."""
    start = time.perf_counter()
    work, text = options.work, options.work / "text"
    if not (text / base_text.FACTS).exists():
        base_text.write_text(
            base_text.Options(out=text, packages=True, megabytes=options.megabytes)
        )
    tokenizer = PretrainedTokenizer(TOKENIZER)
    tokens = base_text.read_tokens(text / base_text.TRAIN, tokenizer)
    held_out = base_text.read_tokens(text / base_text.HELDOUT, tokenizer)
    prepared = time.perf_counter()
    model = _train(options, tokens, held_out[: WATCHED * options.window])
    trained = time.perf_counter()
    save_model(work, model)
    copy_companions(TOKENIZER, work)
    for name in (base_text.CALIBRATION, base_text.HELDOUT):
        shutil.copyfile(text / name, work / name)
    log = [json.loads(line) for line in (work / "run" / LOG).read_text().splitlines()]
    facts = {
        **head("larger_base"),
        "options": {k: str(v) for k, v in dataclasses.asdict(options).items() if k != "work"},
        "parameters": sum(x.size for x in jax.tree.leaves(model.weights)),
        "train_tokens": len(tokens),
        "heldout_tokens": len(held_out),
        "heldout": dataclasses.asdict(perplexity(model, held_out, options.window)),
        "losses": [{k: r[k] for k in ("step", "loss", "eval_loss") if k in r} for r in log],
        "seconds": {"text": prepared - start, "training": trained - prepared},
        "text": read_json(text / base_text.FACTS),
    }
    write_json(work / FACTS, facts)
    return facts


def _train(options: Options, tokens: np.ndarray, held_out: np.ndarray) -> Model:
    window = options.window
    # Windows share one token, so that every token but the first is predicted once.
    examples, watched = (text_windows(x, window, window - 1) for x in (tokens, held_out))
    config = model_config(options.layers, options.shrink)
    start = init_model(config, jax.random.key(0), jnp.bfloat16)
    run = TrainOptions(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=min(200, options.steps // 10),
        weight_decay=0.1,
        log_every=100,
        evaluate_every=500,
        checkpoint_every=options.steps,
    )
    model = train(full_training(start), examples, run, options.work / "run", watched)
    assert isinstance(model, Model)
    return model


def main() -> None:
    """Run the command line."""
    facts = make(tyro.cli(Options, prog="python -m benchmarks.larger_base"))
    for name in ("options", "losses", "text"):
        facts.pop(name)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
