"""What the engine serves on a GPU: many models of one Llama-3.1-8B, its weights codebooks or bf16.

    python -m benchmarks.engine --out benchmarks/results/h100/engine.json

Random weights and adapters: the numbers tell speed alone. Requests of all models arrive at once;
each prompt is a prefix that all share, and a part of its own. A first batch of requests, with other
prompts, compiles what is needed and is not counted.
"""

import dataclasses
import platform
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks.cases import DENSE
from benchmarks.decode_step import LLAMA_8B, SPEC, random_model
from jaxcodec.checkpoints.files import write_json
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.lora import ICARUS_TARGETS, init_adapter
from jaxcodec.models.scheme import ICARUS
from jaxcodec.serve.batch_loop import generate
from jaxcodec.serve.buckets import Buckets
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import Request, SamplingParams
from jaxcodec.serve.timeline import Timeline

MODELS, RANK = 8, 16
SHARED, OWN, NEW = 512, 128, 128  # tokens of the prompts' prefix, of their rest, of a response
PAGE_SIZE = 16
POSITIONS = 1024
STEP_TOKENS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Serve random models of Llama-3.1-8B's shape on JAX's default device.

    Attributes:
      out: JSON file of the results.
      specs: formats of the base's linears.
      running: responses at once, by which each format is measured.
      layers: of the base; 32 are Llama-3.1-8B's.
    """

    out: Path
    specs: tuple[str, ...] = (SPEC, DENSE)
    running: tuple[int, ...] = (1, 16, 64)
    layers: int = LLAMA_8B.num_layers


def measure(config: ModelConfig, spec: str, running: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """One flat record for each number of responses at once; a failure has `error`."""
    base = random_model(config, spec)
    for rows in running:
        record: dict[str, Any] = {"spec": spec, "running": rows}
        try:
            record |= serve(base, rows)
        except Exception as error:  # the other measurements go on
            record["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        yield record


def serve(base: Any, rows: int) -> dict[str, Any]:
    """Serve a batch to compile, and one to measure."""
    pages = POSITIONS // PAGE_SIZE
    timeline = Timeline()
    engine = Engine(
        base,
        page_size=PAGE_SIZE,
        max_batch=rows,
        step_tokens=max(STEP_TOKENS, 2 * rows),
        bank=AdapterBank(MODELS + 1, RANK, ICARUS_TARGETS),
        buckets=Buckets((rows,), (max(STEP_TOKENS, 2 * rows),), (pages,)),
        timeline=timeline,
    )
    for i in range(MODELS):
        adapter = init_adapter(base, jax.random.key(i), RANK)
        engine.add_model(f"model-{i}", ICARUS, adapter=adapter)
    start = time.perf_counter()
    generate(engine, requests(base.config.vocab_size, rows, seed=0))
    first_seconds = time.perf_counter() - start
    before = engine.stats()
    asked = requests(base.config.vocab_size, rows, seed=1)
    start = time.perf_counter()
    outputs = generate(engine, asked)
    seconds = time.perf_counter() - start
    stats = engine.stats()
    wrong = [
        output.error or output.finish_reason for output in outputs if len(output.tokens) != NEW
    ]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {rows} responses ended early: {wrong[0]}.")
    return {
        "tokens_per_second": round(rows * NEW / seconds),
        "seconds": round(seconds, 3),
        "first_batch_seconds": round(first_seconds, 1),
        "prefill_tokens": stats.prefill_tokens - before.prefill_tokens,
        "reused_tokens": stats.reused_tokens - before.reused_tokens,
        "cache_pages": sum(dataclasses.asdict(stats.pages).values()),
        **times(timeline, rows),
    }


def requests(vocabulary: int, rows: int, seed: int) -> list[Request]:
    """One for each row, the models in turn."""
    rng = random.Random(seed)
    shared = [rng.randrange(vocabulary) for _ in range(SHARED)]
    sampling = SamplingParams(max_tokens=NEW, ignore_eos=True)
    return [
        Request(
            f"model-{i % MODELS}",
            shared + [rng.randrange(vocabulary) for _ in range(OWN)],
            sampling,
            id=f"{seed}-{i}",
        )
        for i in range(rows)
    ]


def times(timeline: Timeline, rows: int) -> dict[str, float]:
    """TTFT, and the time from one token to the next, of the measured batch in milliseconds."""
    first, between = [], []
    for i in range(rows):
        notes = [note for note in timeline.notes if note.id == f"1-{i}"]
        (submitted,) = [note.time_s for note in notes if note.event == "submitted"]
        decodes = [note.time_s for note in notes if note.event == "decode"]
        first.append(1e3 * (decodes[0] - submitted))
        between.append(1e3 * (decodes[-1] - decodes[0]) / (NEW - 1))
    return {
        "ttft_median_ms": round(statistics.median(first), 2),
        "ttft_worst_ms": round(max(first), 2),
        "itl_mean_ms": round(statistics.mean(between), 3),
    }


def main() -> None:
    """Run the command line; the file is written after every record."""
    options = tyro.cli(Options, prog="python -m benchmarks.engine")
    config = dataclasses.replace(
        LLAMA_8B,
        max_positions=POSITIONS,
        num_layers=options.layers,
        windows=LLAMA_8B.windows[: options.layers],
    )
    content: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "command": "python -m benchmarks.engine",
        "models": MODELS,
        "shared_tokens": SHARED,
        "own_tokens": OWN,
        "new_tokens": NEW,
        "layers": options.layers,
        "records": [],
    }
    for spec in options.specs:
        for record in measure(config, spec, options.running):
            content["records"].append(record)
            print(record, flush=True)
            write_json(options.out, content)


if __name__ == "__main__":
    main()
