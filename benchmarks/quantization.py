"""What quantizing a block of Llama-3.1-8B's shape takes: seconds by stage, and device memory.

    python -m benchmarks.quantization --out benchmarks/results/h200/quantization.json

Random weights and random tokens: the numbers tell speed and memory alone. The first block of a
process also compiles; the last one is the steady state. Devices share the work where there are
several.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.decode_step import LLAMA_8B
from benchmarks.head import head
from jaxcodec.checkpoints.files import write_json
from jaxcodec.models.sharding import make_mesh
from jaxcodec.models.transformer import init_model
from jaxcodec.spec import CodebookSpec
from jaxcodec.train.ptq import PRESETS, quantize_model

VOCABULARY = 4096  # the embedding is no part of a block; a small one saves its transfer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Quantize blocks of random weights on all of JAX's devices.

    Attributes:
      out: JSON file of the results.
      presets: how much work, one measurement each.
      spec: format of the linears.
      blocks: of the model; two tell the first from the rest.
      sequences: calibration sequences.
      length: tokens of each.
      shrink: divides hidden and intermediate sizes, to try this script on a CPU.
    """

    out: Path
    presets: tuple[str, ...] = ("fast", "default")
    spec: str = "m2v8g128"
    blocks: int = 2
    sequences: int = 128
    length: int = 2048
    shrink: int = 1


def measure(options: Options, preset: str) -> dict[str, Any]:
    """One flat record; seconds by stage are those of the last block."""
    config = dataclasses.replace(
        LLAMA_8B,
        vocab_size=VOCABULARY,
        num_layers=options.blocks,
        windows=(None,) * options.blocks,
        hidden_size=LLAMA_8B.hidden_size // options.shrink,
        intermediate_size=LLAMA_8B.intermediate_size // options.shrink,
        num_heads=LLAMA_8B.num_heads // options.shrink,
        num_kv_heads=max(LLAMA_8B.num_kv_heads // options.shrink, 1),
        max_positions=options.length,
        tie_embeddings=True,
    )
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        model = init_model(config, jax.random.key(0), jnp.bfloat16)
    tokens = np.random.default_rng(0).integers(
        0, VOCABULARY, (options.sequences, options.length), np.int32
    )
    mesh = make_mesh() if jax.device_count() > 1 else None
    start = time.perf_counter()
    _, report = quantize_model(
        model, CodebookSpec.parse(options.spec), tokens, PRESETS[preset], mesh=mesh
    )
    seconds = time.perf_counter() - start
    first, last = (sum(b.seconds.values()) for b in (report.blocks[0], report.blocks[-1]))
    memory = jax.devices()[0].memory_stats() or {}
    last_block = report.blocks[-1]
    return {
        "preset": preset,
        "spec": options.spec,
        "blocks": options.blocks,
        "seconds": round(seconds, 2),
        "first_block_seconds": round(first, 2),
        "block_seconds": round(last, 2),
        "stages": {name: round(s, 2) for name, s in last_block.seconds.items()},
        "peak_device_bytes": memory.get("peak_bytes_in_use"),
        "linears": {
            linear.name: {
                "seconds": round(linear.seconds or 0.0, 2),
                "activation_error": linear.activation_error,
            }
            for linear in last_block.linears
        },
        "tuning": None if last_block.tuning is None else dataclasses.asdict(last_block.tuning),
    }


def main() -> None:
    """Run the command line; the file is written after every record."""
    options = tyro.cli(Options, prog="python -m benchmarks.quantization")
    content: dict[str, Any] = {
        **head("quantization"),
        "devices": jax.device_count(),
        "options": {k: str(v) for k, v in dataclasses.asdict(options).items() if k != "out"},
        "records": [],
    }
    for preset in options.presets:
        record = measure(options, preset)
        content["records"].append(record)
        print(record, flush=True)
        write_json(options.out, content)


if __name__ == "__main__":
    main()
