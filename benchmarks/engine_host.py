"""What one step of the engine costs the host, with nobody at the other end.

    python -m benchmarks.engine_host

The device is stubbed: programs return at once what they would have returned, so that what is left
is planning, packing, handing over arrays, and taking in tokens. Everything that a step does on the
host is in it but the detokenizer, for requests are token ids. The times are processor time, of all
threads together, so that whatever else the machine does is not in them.

Letters: B rows of a launch, K tokens a row.
"""

import dataclasses
import os
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from jaxcodec.checkpoints.files import write_json
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.lora import ICARUS_TARGETS, init_adapter
from jaxcodec.models.scheme import ICARUS
from jaxcodec.models.transformer import init_model
from jaxcodec.serve.compilation import Programs
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import Request, SamplingParams
from jaxcodec.serve.rows import Columns
from jaxcodec.serve.step_program import Made, decode

RUNNING = 256
MODELS = 8
PROMPT, NEW = 500, 400  # tokens: contexts of tens of pages
STEPS = 300
DECODE_STEPS = (1, 8)
# As many layers as Llama-3.1-8B has, so that as many arrays are handed over; tiny otherwise.
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=512,
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
    """Programs that do nothing: cache and state come back as they went in, all tokens are 7.

    They take all that the real ones take, every array of the model, so that it is handed over.
    """

    def __init__(self):
        super().__init__()
        self._decode = jax.jit(_all_sevens, static_argnums=0, keep_unused=True)

    def run(self, program: Any, shape: tuple, leaves: Any, cache: Any, *rest: Any, **static) -> Any:
        """As `Programs.run`."""
        if program is not decode:
            return cache
        state, numbers, sampling = rest
        made = self._decode(static["steps"], numbers, leaves, cache, state, sampling)
        return Made(made, None, None, None), cache, state


def _all_sevens(K: int, numbers: jax.Array, *_: Any) -> jax.Array:
    made = jnp.full((len(numbers), K + 2), 7, jnp.int32)
    return made.at[:, K].set(numbers[:, Columns._fields.index("budget")]).at[:, K + 1].set(0)


def measure(decode_steps: int) -> Iterator[dict[str, Any]]:
    """Yield a record for greedy and one for sampled requests: milliseconds of a step."""
    base = init_model(CONFIG, jax.random.key(0))
    greedy = SamplingParams(max_tokens=NEW, ignore_eos=True)
    sampled = dataclasses.replace(greedy, temperature=0.8, top_p=0.9, seed=1)
    for name, params in (("greedy", greedy), ("sampled", sampled)):
        engine = Engine(
            base,
            pages=RUNNING * (PROMPT + NEW) // 16 + RUNNING,
            max_batch=RUNNING,
            step_tokens=4096,
            decode_steps=decode_steps,
            bank=AdapterBank(MODELS + 1, 4, ICARUS_TARGETS),
        )
        for i in range(MODELS):
            adapter = init_adapter(base, jax.random.key(i), rank=4)
            engine.add_model(f"model-{i}", ICARUS, adapter=adapter)
        engine._runner._programs = StubbedPrograms()
        rng = random.Random(0)
        for i in range(RUNNING):
            prompt = [rng.randrange(512) for _ in range(PROMPT)]
            engine.submit(Request(f"model-{i % MODELS}", prompt, params))
        while engine.stats().running < RUNNING or engine._scheduler.waiting:
            engine.step()
        for _ in range(20 // decode_steps + 5):
            engine.step()
        times = []
        for _ in range(STEPS // decode_steps):
            start = time.process_time()
            events = engine.step()
            times.append(1e3 * (time.process_time() - start))
            assert len(events) == RUNNING * decode_steps
        yield {
            "sampling": name,
            "running": RUNNING,
            "tokens_a_launch": decode_steps,
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
    content = {
        "command": f"python -m benchmarks.engine_host --out {options.out}",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "records": [record for steps in DECODE_STEPS for record in measure(steps)],
    }
    write_json(options.out, content)


if __name__ == "__main__":
    main()
