"""How good a model is: its loss on held-out tokens, and the share of greedy answers that are right.

Letters: B rows, T prompt tokens, N new tokens.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcodec.checkpoints.files import write_json
from jaxcodec.models.cache import KVCache, identity_table
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, Scheme
from jaxcodec.models.steps import PAGE_SIZE, decode_step, prefill
from jaxcodec.models.tokenizer import Tokenizer
from jaxcodec.models.transformer import Model
from jaxcodec.train.data import Examples, read_examples, read_jsonl
from jaxcodec.train.loss import LossSums, sum_over_batches
from jaxcodec.train.progress import progress
from jaxcodec.train.step import eval_step

# Prompts of a batch are padded to a multiple of this many tokens: few shapes, little waste.
PROMPT_STEP = 64


def mean_loss(
    model: Model,
    examples: Examples,
    scheme: Scheme = CONVENTIONAL,
    base: Model | None = None,
    batch_size: int = 64,
    teacher: Model | None = None,
) -> LossSums:
    """The loss over all of `examples`, with the adapter in slot 0 if the model has a bank.

    With a teacher it is KL(teacher || model), and `correct` counts where both would say the same.
    """
    return sum_over_batches(
        lambda batch: eval_step(model, base, batch, scheme, teacher), examples, batch_size
    )


def complete(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_id: int,
    scheme: Scheme = CONVENTIONAL,
    base: Model | None = None,
    batch_size: int = 256,
    quiet: bool = True,
) -> list[list[int]]:
    """Greedy continuations up to eos, which is left out, or `max_new_tokens`.

    Batches hold prompts of like length and run in one program each.

    Args:
      model: with the adapter, if any, in slot 0 of its bank.
      base: writer of the prompts under prefill_share.
      quiet: show no progress; else it goes to standard error.

    Raises:
      ValueError: an empty prompt, or one that with the new tokens exceeds the model's context; no
        new tokens, or no prompts at once.
    """
    _check_prompts(prompts, max_new_tokens, batch_size, model.config.max_positions)
    batch_size = min(batch_size, len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: list[list[int]] = [[] for _ in prompts]
    start, batches = time.perf_counter(), -(-len(order) // batch_size)
    shown = contextlib.nullcontext() if quiet else progress(batches, 0, stderr=True)
    with shown as report:
        for done in range(1, batches + 1):
            chosen = order[(done - 1) * batch_size : done * batch_size]
            tokens, counts = _pad([prompts[i] for i in chosen], batch_size)
            new = np.asarray(_greedy(model, base, tokens, counts, eos_id, scheme, max_new_tokens))
            for row, i in enumerate(chosen):
                ends = np.flatnonzero(new[row] == eos_id)
                completions[i] = new[row, : ends[0] if len(ends) else None].tolist()
            if report is not None:
                left = (time.perf_counter() - start) / done * (batches - done)
                report(done, "of the answers", left)
    return completions


def _pad(prompts: Sequence[Sequence[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [rows, T] and counts int32 [rows] of a batch; the longest prompt is the last."""
    tokens = np.zeros((rows, -(-len(prompts[-1]) // PROMPT_STEP) * PROMPT_STEP), np.int32)
    counts = np.ones(rows, np.int32)  # a row that fills the batch is a prompt of one 0
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        counts[row] = len(prompt)
    return tokens, counts


def _check_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, context: int
) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"Prompt {i} has no tokens.")
        if len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"Prompt {i} of {len(prompt)} tokens and {max_new_tokens} new ones exceed the "
                f"model's context of {context}."
            )


@functools.partial(jax.jit, static_argnames=("scheme", "max_new_tokens"))
def _greedy(
    model: Model,
    base: Model | None,
    tokens: jax.Array,
    counts: jax.Array,
    eos_id: jax.Array,
    scheme: Scheme,
    max_new_tokens: int,
) -> jax.Array:
    """int32 [B, N] new tokens; eos from a row's first eos on."""
    B, T = tokens.shape
    slots = None if model.bank is None else jnp.zeros_like(counts)
    table = identity_table(B, T + max_new_tokens, PAGE_SIZE)
    cache = KVCache.zeros(model.config, table.pages.size, PAGE_SIZE, model.dtype)
    writer = model if base is None else base
    cache = prefill(writer, cache, table, tokens, counts - 1, None if scheme == ICARUS else slots)
    last = jnp.take_along_axis(tokens, counts[:, None] - 1, axis=1)[:, 0]
    new = jnp.full((B, max_new_tokens), eos_id, jnp.int32)

    def goes_on(carry: tuple[jax.Array, ...]) -> jax.Array:
        n, _, done, _, _ = carry
        return (n < max_new_tokens) & ~jnp.all(done)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        n, last, done, new, cache = carry
        place = table.advanced(counts - 1 + n)
        logits, cache = decode_step(model, cache, place, last, slots, scheme.streams)
        chosen = jnp.where(done, eos_id, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        return n + 1, chosen, done | (chosen == eos_id), new.at[:, n].set(chosen), cache

    start = (jnp.int32(0), last, jnp.zeros((B,), bool), new, cache)
    return jax.lax.while_loop(goes_on, step, start)[3]


@dataclasses.dataclass(frozen=True)
class Questions:
    """A JSONL file of prompts and completions, checked.

    Attributes:
      file: its name.
      records: its lines.
      prompts: tokens of each.
      examples: prompts with their completions.
    """

    file: str
    records: list[dict[str, str]]
    prompts: list[list[int]]
    examples: Examples


def evaluate(
    path: str | os.PathLike | Questions,
    tokenizer: Tokenizer,
    model: Model,
    scheme: Scheme = CONVENTIONAL,
    base: Model | None = None,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 256,
    check: Callable[[str, str], bool] | None = None,
    out: str | os.PathLike | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Loss and share of right greedy answers on a JSONL file of prompts and completions.

    Args:
      path: the file, or what `read_questions` has made of it.
      check: (prompt, completion) -> whether it is right; None: equal to the file's completion,
        white space at the ends aside.
      out: where to write the result as JSON.
      quiet: show no progress; else it goes to standard error.

    Returns:
      examples, right (their share), loss (nats a token of completions and eos), seconds.

    Raises:
      ValueError: as `read_questions`.
    """
    start = time.perf_counter()
    context, eos_id = model.config.max_positions, tokenizer.eos_id
    asked = path
    if not isinstance(asked, Questions):
        asked = read_questions(
            asked, tokenizer, context, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
    new = complete(model, asked.prompts, max_new_tokens, eos_id, scheme, base, batch_size, quiet)
    answers = [tokenizer.decode(tokens) for tokens in new]
    right = [_is_right(r, answer, check) for r, answer in zip(asked.records, answers, strict=True)]
    loss = mean_loss(model, asked.examples.trimmed(), scheme, base, batch_size)
    result = {
        "file": asked.file,
        "examples": len(asked.records),
        "right": sum(right) / len(right),
        "loss": float(loss.mean),
        "seconds": time.perf_counter() - start,
    }
    if out is not None:
        write_json(Path(out), result)
    return result


def read_questions(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    context: int,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 256,
) -> Questions:
    """What `evaluate` measures, read and checked before it measures anything.

    Args:
      context: most tokens that the model reads.

    Raises:
      ValueError: a line that is no prompt and completion; a prompt that with the new tokens, or
        with its completion, exceeds the context; no new tokens, or no prompts at once.
    """
    records = read_jsonl(path)
    for line, record in enumerate(records, 1):
        if "text" in record:
            raise ValueError(
                f"{path}, line {line} has a text: answers need a prompt and a completion."
            )
    prompts = [list(tokenizer.encode(record["prompt"])) for record in records]
    _check_prompts(prompts, max_new_tokens, batch_size, context)
    return Questions(Path(path).name, records, prompts, read_examples(path, tokenizer, context))


def _is_right(
    record: dict[str, str], answer: str, check: Callable[[str, str], bool] | None
) -> bool:
    if check is None:
        return answer.strip() == record["completion"].strip()
    return check(record["prompt"], answer)
