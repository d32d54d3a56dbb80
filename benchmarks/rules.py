"""How far behind the best candidate is what the rules for shapes never tuned would choose.

    python -m benchmarks.rules --out benchmarks/results/h200/rules.json

Reads the times of all candidates of a tuner's run, tuner.json: nothing is measured here. `choice`
is of kernel and tiles together; the others are of the tiles alone, where a kernel is a candidate.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import tyro

from benchmarks.head import head
from jaxcodec.checkpoints.files import read_json, write_json
from jaxcodec.pallas_kernels import tuning
from jaxcodec.pallas_kernels.kernels import KERNELS
from jaxcodec.spec import CodebookSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Compare rules with a tuner's times.

    Attributes:
      out: JSON file of the results.
      times: every candidate of every launch, as the tuner measured it.
    """

    out: Path
    times: Path = Path(__file__).parent / "results" / "h200" / "tuner.json"


def ratios(launch: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(what was chosen, its time over the best one's) for one launch."""
    spec, M, K, Ns = (launch[name] for name in ("spec", "M", "K", "N"))
    spec = CodebookSpec.parse(spec)
    times: dict[str, dict[Any, float]] = {}
    for kernel, *tiles, us in launch["candidates"]:
        name = f"{kernel}_mosaic"
        times.setdefault(name, {})[KERNELS[name].Tiling(*tiles)] = us
    best = min(us for found in times.values() for us in found.values())
    first = tuning.preferences(M, K, Ns, spec, jnp.dtype(jnp.bfloat16))[0]
    for name, found in times.items():
        us = found.get(KERNELS[name].tiling(M, K, Ns, spec))
        if us is None:
            raise ValueError(f"{launch['spec']} {K}x{Ns} M={M}: no time of the {name} chosen now.")
        if name == first:
            yield "choice", us / best
        yield f"tiles of {name}, {'1 to 32' if M <= 32 else 'more'} rows", us / min(found.values())


def main() -> None:
    """Run the command line."""
    options = tyro.cli(Options, prog="python -m benchmarks.rules")
    found: dict[str, list[float]] = {}
    measured = read_json(options.times)
    for launch in measured["rows"]:
        for what, ratio in ratios(launch):
            found.setdefault(what, []).append(ratio)
    rows = [
        {
            "what": what,
            "launches": len(values),
            "mean": round(math.exp(sum(map(math.log, values)) / len(values)), 4),
            "worst": round(max(values), 3),
        }
        for what, values in sorted(found.items())
    ]
    times = {"file": options.times.name, "device": measured["device"]}
    write_json(options.out, {**head("rules"), "times": times, "rows": rows})
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
