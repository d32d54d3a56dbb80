"""What sharing one cache gives: agents that take turns on the same contexts, on one GPU.

    python -m benchmarks.engine --out build/engine.json

A base of Llama-3.1-8B's shape and adapters for it, all random: the numbers tell speed and memory,
and nothing of quality. Sessions run side by side. In each, every model answers once, one after
another, and each reads what those before it have said, as agents do that work on one task. The same
is served twice: by `icarus` models, which find the pages of the others ("shared"), and by
`conventional` models with the same adapters, each of which has to read everything itself
("private"). Turns begin together, so a turn's slowest session holds up the others.

Every mode has an engine of its own, with a pool sized from what memory is free then. All programs
are compiled ahead, and a first turn, of other contexts, is not counted.

Each mode of the 8B model should take about a minute, most of it compiling, and the two 150 s: what
would begin after 90 s is left out, and named.
"""

import contextlib
import dataclasses
import gc
import itertools
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks.decode_step import LLAMA_8B, SPEC, random_model
from benchmarks.head import head
from jaxcodec.checkpoints.files import write_json
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.lora import ICARUS_TARGETS, init_adapter
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, Scheme
from jaxcodec.models.transformer import Model
from jaxcodec.serve.batch_loop import generate
from jaxcodec.serve.buckets import Buckets
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import Request, RequestOutput, SamplingParams
from jaxcodec.serve.timeline import Timeline

RANK = 16
PAGE_SIZE = 16
STEP_TOKENS = 512
MODES: dict[str, Scheme] = {"shared": ICARUS, "private": CONVENTIONAL}
COMPILED = "/jax/core/compile/backend_compile_duration"
# So small that it is served on a CPU in seconds, to see that all of this works.
TINY = ModelConfig(
    model_type="llama",
    vocab_size=512,
    hidden_size=128,
    intermediate_size=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    max_positions=4096,
    windows=(None, None),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Serve sessions of random models on JAX's default device.

    Attributes:
      out: JSON file of the results, written anew after each.
      specs: formats of the base's linears, codebooks or bf16.
      sessions: that run side by side; each number is measured.
      models: that answer in each session, one after another.
      context: tokens of a session before the first answer.
      turn: tokens that follow each answer before the next, as what a tool has said.
      new: tokens of an answer.
      seconds: no measurement begins after so many; those left out are named.
      tiny: a model of two small layers, for a CPU.
    """

    out: Path
    specs: tuple[str, ...] = (SPEC,)
    sessions: tuple[int, ...] = (16,)
    models: int = 8
    context: int = 512
    turn: int = 32
    new: int = 64
    seconds: float = 90.0
    tiny: bool = False

    @property
    def positions(self) -> int:
        """Tokens of a session in the end."""
        return self.context + self.models * (self.turn + self.new)


def measure(options: Options, spec: str, mode: str, sessions: int) -> Iterator[dict[str, Any]]:
    """Yield the record of one mode as it grows; a failure ends it with `error`."""
    record: dict[str, Any] = {"spec": spec, "mode": mode, "sessions": sessions}
    config = TINY if options.tiny else LLAMA_8B
    config = dataclasses.replace(config, max_positions=options.positions)
    try:
        for stage in serve(random_model(config, spec), MODES[mode], options, sessions):
            record |= stage
            yield record
    except Exception as error:  # the other measurements go on
        record["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        yield record


def serve(base: Model, scheme: Scheme, options: Options, sessions: int) -> Iterator[dict[str, Any]]:
    """Yield what is known of an engine when it is made, when it is warm, and after its work."""
    timeline = Timeline()
    start = time.perf_counter()
    engine = make_engine(base, scheme, options, sessions, timeline)
    yield {
        "engine_seconds": _since(start),  # hashes and adapters included
        "pool_pages": engine.stats().pages.total,
        "pool_gb": _gb(sum(x.nbytes for x in jax.tree.leaves(engine._runner._cache))),
    }
    start = time.perf_counter()
    engine.warm_up()
    yield {"warm_up_seconds": _since(start), **programs(engine)}
    with compilations() as compiled:
        start = time.perf_counter()
        run_sessions(engine, base.config, options, sessions, turns=1, seed=0)
        yield {"first_turn_seconds": _since(start)}
        before = engine.stats()
        start = time.perf_counter()
        outputs = run_sessions(engine, base.config, options, sessions, options.models, seed=1)
        seconds = time.perf_counter() - start
    stats = engine.stats()
    yield {
        "seconds": round(seconds, 2),
        "tokens_per_second": round(len(outputs) * options.new / seconds),
        **times(timeline, {output.id for output in outputs}),
        "prompt_tokens": stats.prompt_tokens - before.prompt_tokens,
        "prefill_tokens": stats.prefill_tokens - before.prefill_tokens,
        "reused_tokens": stats.reused_tokens - before.reused_tokens,
        # Of what this round has left in the cache, if nothing was evicted.
        "pages": before.pages.free - stats.pages.free,
        "evictions": stats.evictions,
        "preemptions": stats.preemptions,
        "compilations_after_warm_up": len(compiled),
        "peak_memory_gb": _gb(
            (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        ),
    }


def make_engine(
    base: Model, scheme: Scheme, options: Options, sessions: int, timeline: Timeline
) -> Engine:
    """One that serves all models under a scheme; launches of a kind have one shape."""
    step_tokens = max(STEP_TOKENS, 2 * sessions)
    engine = Engine(
        base,
        page_size=PAGE_SIZE,
        max_batch=sessions,
        step_tokens=step_tokens,
        max_waiting=max(sessions, 1),
        bank=AdapterBank(options.models + 1, RANK, ICARUS_TARGETS),
        buckets=Buckets((sessions,), (step_tokens,), (-(-options.positions // PAGE_SIZE),)),
        timeline=timeline,
    )
    for i in range(options.models):  # new adapters change nothing yet, and cost what others do
        adapter = init_adapter(base, jax.random.key(i), RANK)
        engine.add_model(f"model-{i}", scheme, adapter=adapter)
    return engine


def programs(engine: Engine) -> dict[str, Any]:
    """How many were compiled, what the largest needs for itself, and what it does not do in place.

    A program that copied the cache would show as gigabytes of either.
    """
    compiled: Any = engine._runner._programs._compiled.values()
    known = [memory for p in compiled if (memory := p.memory_analysis()) is not None]
    needed = (m.temp_size_in_bytes for m in known)
    copied = (m.output_size_in_bytes - m.alias_size_in_bytes for m in known)
    return {
        "programs": len(compiled),
        "temporary_gb": _gb(max(needed, default=None)),
        "not_in_place_gb": _gb(max(copied, default=None)),
    }


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What is compiled meanwhile."""
    compiled: list[str] = []

    def count(event: str, *_: Any, **__: Any) -> None:
        if event == COMPILED:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def run_sessions(
    engine: Engine, config: ModelConfig, options: Options, sessions: int, turns: int, seed: int
) -> list[RequestOutput]:
    """In each turn another model answers in each session; returns all answers.

    Raises:
      RuntimeError: an answer is not whole.
    """
    rng = random.Random(seed)
    draw = lambda count: [rng.randrange(config.vocab_size) for _ in range(count)]
    contexts = [draw(options.context) for _ in range(sessions)]
    sampling = SamplingParams(max_tokens=options.new, ignore_eos=True)
    answers = []
    for turn in range(turns):
        asked = [
            Request(f"model-{(s + turn) % options.models}", context, sampling)
            for s, context in enumerate(contexts)
        ]
        for context, output in zip(contexts, generate(engine, asked), strict=True):
            if len(output.tokens) != options.new:
                raise RuntimeError(f"An answer ended early: {output.error or output}.")
            context += [*output.tokens, *draw(options.turn)]
            answers.append(output)
    return answers


def times(timeline: Timeline, ids: set[str]) -> dict[str, float]:
    """Times to first tokens and between tokens of some requests, in milliseconds.

    Tokens come several at a time: between tokens is the mean, a wait is from one time to the next.
    """
    first, between, waits = [], [], []
    for notes in timeline.responses():
        if notes[0].id in ids:
            decodes = [note for note in notes if note.event == "decode"]
            first.append(1e3 * (decodes[0].time_s - notes[0].time_s))
            gaps = [1e3 * (b.time_s - a.time_s) for a, b in itertools.pairwise(decodes)]
            waits += gaps
            between.append(sum(gaps) / sum(note.details["tokens"] for note in decodes[1:]))
    return {
        "ttft_median_ms": round(statistics.median(first), 2),
        "ttft_worst_ms": round(max(first), 2),
        "itl_mean_ms": round(statistics.mean(between), 3),
        "longest_wait_ms": round(max(waits), 2),
    }


def main() -> None:
    """Run the command line; the file is written after every stage."""
    start = time.perf_counter()
    options = tyro.cli(Options, prog="python -m benchmarks.engine")
    content: dict[str, Any] = {
        **head("engine"),
        "options": {k: v for k, v in dataclasses.asdict(options).items() if k != "out"},
        "records": [],
        "left_out": [],
    }
    for spec, sessions, mode in itertools.product(options.specs, options.sessions, MODES):
        if time.perf_counter() - start > options.seconds:
            content["left_out"].append([spec, sessions, mode])
            write_json(options.out, content)
            continue
        content["records"].append({})
        for record in measure(options, spec, mode, sessions):
            content["records"][-1] = {**record, "at_seconds": _since(start)}
            write_json(options.out, content)
        print(content["records"][-1], flush=True)
        gc.collect()  # the next engine's pool takes what this one's leaves


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 1)


def _gb(size: int | None) -> float | None:
    """Gigabytes; None where a device does not tell."""
    return None if size is None else round(size / 1e9, 3)


if __name__ == "__main__":
    main()
