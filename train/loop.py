"""The training loop: steps, log, evaluation, checkpoints, and going on where a run stopped.

<directory>/run.json        what run this is
<directory>/log.jsonl       one object a line: step, loss, accuracy, grad_norm, learning_rate,
                            tokens and seconds since the start, eval_loss where evaluated;
                            eval_loss alone at step 0 where the best is kept
<directory>/checkpoints/    the last few states
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcodec.checkpoints.files import replacement
from jaxcodec.models.lora import Adapter
from jaxcodec.models.transformer import Model
from jaxcodec.train.checkpoint import Checkpoints, claim_directory, digest
from jaxcodec.train.data import Examples, shuffled_batches
from jaxcodec.train.evaluate import mean_loss
from jaxcodec.train.progress import Report, progress
from jaxcodec.train.step import (
    Objective,
    TrainState,
    init_state,
    make_optimizer,
    make_schedule,
    make_train_step,
    with_best,
)

LOG = "log.jsonl"

# Options that change what is written and when, not what is computed: a run may change them.
PACE = ("log_every", "evaluate_every", "checkpoint_every")


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How a run goes.

    Attributes:
      steps: optimizer steps, T of the learning rate's schedule.
      batch_size: rows of one step.
      accumulate: micro-batches that a step is computed in, one after the other, to save memory.
      learning_rate: its peak, after warm-up.
      warmup_steps: steps of linear warm-up.
      weight_decay: on matrices, as in AdamW.
      clip_norm: gradients are scaled down to this global norm.
      seed: of the order of the examples.
      log_every: steps between lines of the log; the loss in one is the mean since the last.
      evaluate_every: steps between evaluations on the held-out file.
      checkpoint_every: steps between checkpoints: what a killed process loses at most.
      keep_best: return the weights of least eval_loss, those at the start among them, instead of
        the last.
    """

    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    log_every: int = 20
    evaluate_every: int = 200
    checkpoint_every: int = 200
    keep_best: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", *PACE):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be at least 0 and finite, got {getattr(self, name)}."
                )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size = {self.batch_size} does not divide into "
                f"accumulate = {self.accumulate} micro-batches."
            )


def train(
    objective: Objective,
    examples: Examples,
    options: TrainOptions,
    directory: str | os.PathLike,
    eval_examples: Examples | None = None,
) -> Model | Adapter:
    """Run `objective` to its last step and return the model or adapter that it made.

    A directory that holds a checkpoint of this very run is gone on with, and ends with the same
    bits as one that was never stopped; a finished one returns at once.

    Raises:
      ValueError: the directory holds another run; tokens or `max_length` beyond the model; no
        held-out examples to tell the best by.
      FloatingPointError: the loss is NaN or infinite; the last checkpoint is from before.
    """
    for which in (examples, eval_examples):
        _check_examples(objective, which)
    check_held_out(options, eval_examples)
    schedule = make_schedule(options.learning_rate, options.warmup_steps, options.steps)
    claim_directory(directory, _manifest(objective, examples, options, eval_examples))
    optimizer = make_optimizer(schedule, options.weight_decay, options.clip_norm)
    optimizer = objective.optimizer(
        optimizer, make_schedule(1.0, options.warmup_steps, options.steps)
    )
    train_step = make_train_step(objective, optimizer, options.accumulate)
    state = init_state(objective, optimizer, options.keep_best)
    batches = shuffled_batches(examples, options.batch_size, options.seed)
    with Checkpoints(directory) as checkpoints:
        if checkpoints.latest is not None:
            state, position = checkpoints.restore(state)
            batches.set_state(position)
        start = int(state.step)
        log = Log(Path(directory) / LOG, start, schedule)
        with log, progress(options.steps, start) as report:
            if eval_examples is not None and options.keep_best and not start:
                state, eval_loss = _evaluate(objective, state, eval_examples)
                log.write_start(eval_loss)
            metrics = []
            for step in range(start + 1, options.steps + 1):
                state, step_metrics = train_step(state, objective.frozen, next(batches))
                metrics.append(step_metrics)
                held_out = eval_examples if _due(step, options, "evaluate_every") else None
                saves = _due(step, options, "checkpoint_every")
                # A checkpoint's step has its line, so that the log goes on as exactly as the run.
                if not (held_out is not None or saves or _due(step, options, "log_every")):
                    continue
                record = log.record(step, metrics)
                metrics = []
                if held_out is not None:
                    state, record["eval_loss"] = _evaluate(objective, state, held_out)
                log.write(record, options.steps, report)
                if saves:
                    checkpoints.save(state, batches.get_state())
    return objective.artifact(state.trainable) if state.best is None else state.best.artifact


def check_held_out(options: TrainOptions, held_out: object | None) -> None:
    """Refuse to keep the best of a run without held-out examples.

    Args:
      held_out: the examples, or the file that they are read from.

    Raises:
      ValueError: as said.
    """
    if options.keep_best and held_out is None:
        raise ValueError(
            "keep_best needs held-out examples to tell the best by, and there are none: give them "
            "(--eval-data), or keep the last weights (--no-keep-best)."
        )


def held_out_losses(directory: str | os.PathLike) -> dict[str, Any]:
    """What the log of a run says of its held-out loss, in nats a token.

    Returns:
      start (where the best was kept), best, best_step and last; nothing where none was measured.
    """
    losses = {
        record["step"]: record["eval_loss"]
        for record in _read_log(Path(directory) / LOG)
        if "eval_loss" in record
    }
    if not losses:
        return {}
    best_step = min(losses, key=lambda step: losses[step])
    start = {"start": losses[0]} if 0 in losses else {}
    best = {"best": losses[best_step], "best_step": best_step}
    return start | best | {"last": losses[max(losses)]}


def _due(step: int, options: TrainOptions, interval: str) -> bool:
    return step % getattr(options, interval) == 0 or step == options.steps


def _evaluate(
    objective: Objective, state: TrainState, examples: Examples
) -> tuple[TrainState, float]:
    """The state, whose weights are its best if none were better, and their loss."""
    model, base = objective.models(state.trainable, objective.frozen)
    teacher = objective.teacher(objective.frozen)
    loss = float(mean_loss(model, examples, objective.scheme, base, teacher=teacher).mean)
    if state.best is not None and loss < state.best.loss:
        state = with_best(state, objective, loss)
    return state, loss


def _check_examples(objective: Objective, examples: Examples | None) -> None:
    config = objective.config
    if examples is None:
        return
    if examples.max_length > config.max_positions:
        raise ValueError(
            f"Examples of max_length = {examples.max_length} exceed the model's context of "
            f"{config.max_positions} tokens."
        )
    if (largest := int(examples.tokens.max())) >= config.vocab_size:
        raise ValueError(
            f"The examples hold token {largest}, the model knows {config.vocab_size}: "
            "they were made with another tokenizer."
        )


def _manifest(
    objective: Objective, examples: Examples, options: TrainOptions, held_out: Examples | None
) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in (*PACE, "keep_best")
    }
    if options.keep_best and held_out is not None:
        # The best is one of those that were looked at.
        chosen |= {"keep_best_every": options.evaluate_every, "keep_best_by": held_out.digest()}
    scheme = objective.scheme
    return chosen | {
        "prompt_writer": scheme.prompt_writer,
        "response_writer": scheme.response_writer,
        "max_length": examples.max_length,
        "data": examples.digest(),
        "trained_weights_at_start": digest(objective.trainable),
        "frozen_weights": digest(objective.frozen),
        **objective.manifest(),
    }


class Log:
    """log.jsonl, cut back to `start` and gone on with; tokens and seconds count on."""

    def __init__(self, path: Path, start: int, schedule: optax.Schedule):
        self._schedule = schedule
        kept = [record for record in _read_log(path) if start and record["step"] <= start]
        with replacement(path) as [temporary]:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        last = kept[-1] if kept else {"step": start, "tokens": 0, "seconds": 0.0}
        self._last = last
        self._origin = time.perf_counter() - last["seconds"]

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def record(self, step: int, metrics: Sequence[dict[str, jax.Array]]) -> dict[str, Any]:
        """The means of the steps since the last record. Waits for the device: the only place."""
        values = jax.device_get(list(metrics))
        mean = {
            name: sum(float(v[name]) for v in values) / len(values)
            for name in values[0]
            if name != "tokens"
        }
        if not math.isfinite(mean["loss"]):
            raise FloatingPointError(
                f"The loss is {mean['loss']} at step {step}: lower the learning rate, or check the "
                "weights that the run started from."
            )
        return {
            "step": step,
            **mean,
            "learning_rate": float(jnp.asarray(self._schedule(step - 1))),
            "tokens": self._last["tokens"] + int(sum(v["tokens"] for v in values)),
            "seconds": time.perf_counter() - self._origin,
        }

    def write_start(self, eval_loss: float) -> None:
        """A first line, of what the run starts from."""
        seconds = time.perf_counter() - self._origin
        self._last = {"step": 0, "eval_loss": eval_loss, "tokens": 0, "seconds": seconds}
        self._append(self._last)

    def write(self, record: dict[str, Any], steps: int, report: Report) -> None:
        """Append `record` to the file and show it."""
        self._append(record)
        seconds = record["seconds"] - self._last["seconds"]
        rate = (record["tokens"] - self._last["tokens"]) / seconds
        left = (steps - record["step"]) * seconds / (record["step"] - self._last["step"])
        text = f"loss {record['loss']:.4f}"
        if "eval_loss" in record:
            text += f"  eval {record['eval_loss']:.4f}"
        report(record["step"], f"{text}  {rate:,.0f} tokens/s", left)
        self._last = record

    def _append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Records of an earlier process; a line that it was killed in is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        if line.endswith("}"):
            records.append(json.loads(line))
    return records
