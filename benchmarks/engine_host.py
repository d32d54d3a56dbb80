"""What one step of the engine costs the host, with nobody at the other end.

    JAX_PLATFORMS=cpu python -m benchmarks.engine_host

The device is stubbed: programs return at once what they would have returned, so that what is left
is planning, packing, handing over arrays, taking in tokens and making text of them. Requests are
texts and get text, or are token ids and get those alone, which shows what the detokenizer takes.

The times are processor time, of all threads together, so that what else the machine runs meanwhile
is not in them. But whoever shares its caches gets less done in the same processor time, so the
steps are measured in several parts: the quietest is told, with the medians of all beside it.

Letters: B rows of a launch, K tokens a row.
"""

import dataclasses
import itertools
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.head import head
from jaxcodec.checkpoints.files import write_json
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.lora import ICARUS_TARGETS, init_adapter
from jaxcodec.models.scheme import ICARUS
from jaxcodec.models.tokenizer import PretrainedTokenizer, Tokenizer
from jaxcodec.models.transformer import Model, init_model
from jaxcodec.serve.compilation import Programs
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import Request, SamplingParams
from jaxcodec.serve.rows import Columns
from jaxcodec.serve.step_program import Made, decode

RUNNING = 256
MODELS = 8
PROMPT, NEW = 500, 1400  # tokens: contexts of tens of pages
PARTS = 10
PART = 128  # tokens a response in each
DECODE_STEPS = (1, 8)
TOKENIZER = Path("demo/weights/base-quantized")
TEXT = "The cart brings Henry 9 cups with 20 coats. It is 9 miles to the tower, not 12! "
# As many layers as Llama-3.1-8B has, so that as many arrays are handed over; tiny otherwise.
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=4096,  # the tokenizer's
    hidden_size=16,
    intermediate_size=16,
    num_layers=32,
    num_heads=1,
    num_kv_heads=1,
    head_dim=16,
    max_positions=2048,
    windows=(None,) * 32,
)


class StubbedPrograms(Programs):
    """Programs that do nothing: cache and state come back as they went in, with the next K tokens
    of a text for each row.

    They take all that the real ones take, every array of the model, so that it is handed over.
    """

    def __init__(self, text: list[int]):
        super().__init__()
        self._text = itertools.cycle(text)
        self._decode = jax.jit(_all_alike, keep_unused=True)

    def run(self, program: Any, shape: tuple, leaves: Any, cache: Any, *rest: Any, **static) -> Any:
        """As `Programs.run`."""
        if program is not decode:
            return cache
        state, numbers, sampling = rest
        tokens = np.fromiter(self._text, np.int32, static["steps"])
        made = self._decode(tokens, numbers, leaves, cache, state, sampling)
        return Made(made, None, None, None), cache, state


def _all_alike(tokens: jax.Array, numbers: jax.Array, *_: Any) -> jax.Array:
    B = len(numbers)
    budget = numbers[:, Columns._fields.index("budget")]
    made = [jnp.tile(tokens, (B, 1)), budget[:, None], jnp.zeros((B, 1), jnp.int32)]
    return jnp.concatenate(made, axis=1)


def engine_of(base: Model, tokenizer: Tokenizer | None, decode_steps: int) -> Engine:
    """One that serves `MODELS` adapters, with room for all."""
    engine = Engine(
        base,
        tokenizer,
        pages=RUNNING * (PROMPT + NEW) // 16 + RUNNING,
        max_batch=RUNNING,
        step_tokens=4096,
        decode_steps=decode_steps,
        bank=AdapterBank(MODELS + 1, 4, ICARUS_TARGETS),
    )
    for i in range(MODELS):
        adapter = init_adapter(base, jax.random.key(i), rank=4)
        engine.add_model(f"model-{i}", ICARUS, adapter=adapter)
    return engine


def measure(decode_steps: int, sampling: str, text: bool) -> dict[str, Any]:
    """Milliseconds of a step at which all rows decode."""
    base = init_model(CONFIG, jax.random.key(0))
    tokenizer = PretrainedTokenizer(TOKENIZER)
    engine = engine_of(base, tokenizer if text else None, decode_steps)
    engine._runner._programs = StubbedPrograms(tokenizer.encode(TEXT))
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    if sampling == "sampled":
        params = dataclasses.replace(params, temperature=0.8, top_p=0.9, seed=1)
    rng = random.Random(0)
    for i in range(RUNNING):
        prompt = [rng.randrange(CONFIG.vocab_size) for _ in range(PROMPT)]
        engine.submit(Request(f"model-{i % MODELS}", prompt, params))
    while engine.stats().running < RUNNING or engine._scheduler.waiting:
        engine.step()
    for _ in range(20 // decode_steps + 5):
        engine.step()
    parts = [_part(engine, decode_steps) for _ in range(PARTS)]
    return {
        "sampling": sampling,
        "detokenizer": text,
        "running": RUNNING,
        "tokens_a_launch": decode_steps,
        **min(parts, key=lambda part: part["median_ms"]),
        "medians_ms": [part["median_ms"] for part in parts],
    }


def _part(engine: Engine, decode_steps: int) -> dict[str, float]:
    times = []
    for _ in range(PART // decode_steps):
        start = time.process_time()
        events = engine.step()
        times.append(1e3 * (time.process_time() - start))
        assert len(events) == RUNNING * decode_steps
    return {
        "median_ms": round(statistics.median(times), 3),
        "p95_ms": round(sorted(times)[int(0.95 * len(times))], 3),
    }


@dataclasses.dataclass(frozen=True)
class Options:
    """Measure the host's part of a step, on one core.

    Attributes:
      out: JSON file of the results.
    """

    out: Path = Path("benchmarks/results/cpu/engine_host.json")


def main() -> None:
    """Run the command line."""
    options = tyro.cli(Options, prog="python -m benchmarks.engine_host")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    content: dict[str, Any] = {
        **head("engine_host"),
        "records": [],
    }
    for decode_steps in DECODE_STEPS:
        for sampling, text in (("greedy", True), ("sampled", True), ("greedy", False)):
            content["records"].append(measure(decode_steps, sampling, text))
            print(content["records"][-1], flush=True)
    write_json(options.out, content)


if __name__ == "__main__":
    main()
