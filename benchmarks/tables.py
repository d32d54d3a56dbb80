"""Rows of the benchmark as tables, and held against targets.

    python -m benchmarks.tables benchmarks/results/h100/kernels.json

Letters: M rows, K input and N output features.
"""

import argparse
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.plan import SPECS
from jaxcodec.pallas_kernels.shapes import LLAMA_8B, LLAMA_70B
from jaxcodec.spec import CodebookSpec

Row = dict[str, Any]
DENSE_KERNELS = ("dense_bf16", "dense_bf16_torch")
AQLM = ("aqlm_2x8", "aqlm_1x16")
RIVALS = ("official_codegemm", *AQLM)
SHAPES_8B, SHAPES_70B = tuple(LLAMA_8B.values()), tuple(LLAMA_70B.values())
SHAPES = (*SHAPES_8B, *SHAPES_70B)
LARGEST = (8192, 28672)
LARGE = 4096  # K and N of the shapes of 8B that have a target of their own for few rows


class Times:
    """Looks up rows by kernel, shape and M; those without a time are not there."""

    def __init__(self, about: dict[str, Any], rows: Sequence[Row]):
        self.rows = [row for row in rows if row["us"] is not None]
        self._bandwidth = about.get("hbm_bytes_per_second")
        self._us = {self._key(row): row["us"] for row in self.rows}
        self._us |= {self._key(row | {"spec": None}): row["us"] for row in self.rows}

    def us(self, kernel: str, row: Row, spec: str | None = None) -> float:
        """Microseconds of `kernel` at the shape of a row, or NaN.

        A rival takes the matrices of a group one after another.
        """
        Ns = row.get("Ns", [row["N"]]) if kernel in RIVALS else [row["N"]]
        keys = [(kernel, spec, row["M"], row["K"], N, "bfloat16") for N in Ns]
        return sum(self._us.get(key, math.nan) for key in keys)

    def faster(self, row: Row) -> float:
        """Times that a row is faster than a dense product in bf16."""
        return self.us("dense_bf16", row) / row["us"]

    def floor(self, row: Row) -> float:
        """Microseconds that reading a row's weights takes at least."""
        bits = CodebookSpec.parse(row["spec"]).bits_per_weight(row["K"], row["N"])
        return 1e6 * bits / 8 * row["K"] * row["N"] / (self._bandwidth or math.nan)

    def chosen(self, M: Sequence[int], shapes: Sequence[tuple[int, int]] = SHAPES) -> list[Row]:
        """What the public operation took, in the two main formats."""
        return [
            row
            for row in self.rows
            if row["kernel"] == "codebook_matmul"
            and row["x"] == "bfloat16"
            and row["spec"] in SPECS
            and row["M"] in M
            and (row["K"], row["N"]) in shapes
        ]

    @staticmethod
    def _key(row: Row) -> tuple:
        return tuple(row[name] for name in ("kernel", "spec", "M", "K", "N", "x"))


@dataclasses.dataclass(frozen=True)
class Target:
    """A bound on a ratio over some rows.

    Attributes:
      what: what is held against the bound.
      bound: the ratio allowed.
      at_least: whether the ratio must be at least the bound, else at most.
      ratios: (ratio, row) of everything measured.
    """

    what: str
    bound: float
    at_least: bool
    ratios: list[tuple[float, Row]]

    def line(self) -> str:
        """The worst case, and whether it passes."""
        ratios = [(ratio, row) for ratio, row in self.ratios if not math.isnan(ratio)]
        sign = ">=" if self.at_least else "<="
        left = f"{self.what:<58}{sign:>3} {self.bound:<7g}"
        if not ratios:
            return f"{left}not measured"
        met = sum(r >= self.bound if self.at_least else r <= self.bound for r, _ in ratios)
        ratio, row = (min if self.at_least else max)(ratios, key=lambda pair: pair[0])
        verdict = "pass" if met == len(ratios) else "MISS"
        return f"{left}{verdict}  worst {ratio:<8.3g} {met} of {len(ratios)} pass; {place(row)}"


def targets(times: Times, about: dict[str, Any]) -> list[Target]:
    """Every target of the kernels, with what was measured for it."""
    few, large = times.chosen([1]), [s for s in SHAPES_8B if min(s) >= LARGE]
    ratio = lambda rows, f: [(f(row), row) for row in rows]
    faster = lambda M, shapes: ratio(times.chosen(M, shapes), times.faster)
    official = lambda row: row["us"] / times.us("official_codegemm", row, row["spec"])
    aqlm = lambda kernel: lambda row: row["us"] / times.us(kernel, row)
    floor = lambda row: times.floor(row) / row["us"]
    slower = lambda row: 1 / times.faster(row)
    error = lambda row: row["rel_err"]
    ours = [row for row in times.rows if row["kernel"] not in (*RIVALS, *DENSE_KERNELS)]
    others = [row for row in ours if row["M"] == 1 and row["spec"] not in SPECS]
    # The dense product by rounded weights counts where the public operation picks it.
    in_bf16 = [r for r in ours if r["x"] == "bfloat16" and r["kernel"] != "dequantize"]
    in_float32 = [row for row in ours if row["x"] == "float32"]
    compiled = [row for row in times.rows if "compile_seconds" in row]
    steps = [s for s in about.get("decode_steps", []) if s["spec"] in SPECS and "error" not in s]
    make = lambda what, sign, bound, ratios: Target(what, bound, sign == ">=", ratios)
    return [
        make("M=1: time over official CodeGEMM", "<=", 0.7, ratio(few, official)),
        make("M=1: time over AQLM 2x8", "<=", 0.45, ratio(few, aqlm("aqlm_2x8"))),
        make(
            "M=1, 8192x28672: HBM floor over time",
            ">=",
            0.65,
            ratio(times.chosen([1], [LARGEST]), floor),
        ),
        make("M=2,4,8, 70B: faster than dense", ">=", 3.5, faster((2, 4, 8), SHAPES_70B)),
        make(
            "M=2,4,8, 8B with K, N >= 4096: faster than dense", ">=", 2.5, faster((2, 4, 8), large)
        ),
        make("M=16, 70B: faster than dense", ">=", 3.0, faster([16], SHAPES_70B)),
        make("M=32, 70B: faster than dense", ">=", 2.5, faster([32], SHAPES_70B)),
        make("M=16,32, 8B: faster than dense", ">=", 2.0, faster((16, 32), SHAPES_8B)),
        make("M=64, 70B: faster than dense", ">=", 1.8, faster([64], SHAPES_70B)),
        make("M=128, 70B: faster than dense", ">=", 1.2, faster([128], SHAPES_70B)),
        make("M=64,128: faster than dense", ">=", 1.0, faster((64, 128), SHAPES)),
        make(
            "M=512,1024,4096: time over dense",
            "<=",
            1.15,
            ratio(times.chosen((512, 1024, 4096)), slower),
        ),
        make(
            "M=1, b=16, m=3, m=4: time over AQLM 1x16", "<=", 1.0, ratio(others, aqlm("aqlm_1x16"))
        ),
        make("error, x in bf16", "<=", 1e-3, ratio(in_bf16, error)),
        make("error, x in float32", "<=", 5e-6, ratio(in_float32, error)),
        make(
            "seconds to compile a kernel", "<=", 3, ratio(compiled, lambda r: r["compile_seconds"])
        ),
        make(
            "seconds to compile a decode step of 8B",
            "<=",
            30,
            [(step["compile_seconds"], step) for step in steps],
        ),
    ]


def place(row: Row) -> str:
    """Where a row was measured."""
    shape = f" {row['K']}x{row['N']}" if "K" in row else ""
    return f"{row['kernel']} {row['spec']} M={row['M']}{shape}"


def matrix(times: Times, title: str, rows: Sequence[Row]) -> list[str]:
    """A line for each kernel, format and shape, a column for each M: us and the ratio to dense."""
    if not rows:
        return []
    Ms = sorted({row["M"] for row in rows})
    lines = ["", title, f"{'':<13}{'K x N':<13}" + "".join(f"{f'M = {M}':>14}" for M in Ms)]
    cells = {(row["spec"], row["K"], row["N"], row["M"]): row for row in rows}
    for spec, K, N in dict.fromkeys(key[:3] for key in cells):
        line = f"{spec:<13}{f'{K}x{N}':<13}"
        for M in Ms:
            row = cells.get((spec, K, N, M))
            ratio = math.nan if row is None or spec == "bf16" else times.faster(row)
            text = "" if math.isnan(ratio) else f" {ratio:5.2f}x"
            line += f"{'' if row is None else number(row['us']) + text:>14}"
        lines.append(line)
    return lines


def few_rows(times: Times) -> list[str]:
    """One row of x: time beside the HBM floor and the rivals."""
    names = "".join(f"{name:>27}" for name in RIVALS)
    lines = ["", "M = 1: us, share of the HBM floor, and rivals (us; our time over theirs)"]
    lines.append("(a rival takes the matrices of a group one after another)")
    lines.append(f"{'':<13}{'K x N':<13}{'us':>7}{'floor':>7}{names}")
    groups = [r for r in times.rows if r["kernel"] == "codebook_matmul_group" and r["M"] == 1]
    for row in [*times.chosen([1]), *groups]:
        line = f"{row['spec']:<13}{f'{row["K"]}x{row["N"]}':<13}{number(row['us']):>7}"
        line += f"{times.floor(row) / row['us']:>7.0%}"
        for name in RIVALS:
            us = times.us(name, row, row["spec"] if name == "official_codegemm" else None)
            line += f"{'' if math.isnan(us) else f'{number(us)} {row["us"] / us:6.2f}':>27}"
        lines.append(line)
    return lines


def report(about: dict[str, Any], rows: Sequence[Row]) -> str:
    """All tables: public operation, rivals, groups, each kernel by name, errors, targets."""
    times = Times(about, rows)
    of: Callable[[str], list[Row]] = lambda kernel: [r for r in times.rows if r["kernel"] == kernel]
    half = lambda rows: [row for row in rows if row["x"] == "bfloat16"]
    lines = matrix(times, "dense_bf16: us", of("dense_bf16"))
    lines += matrix(times, "dense_bf16_torch: us", of("dense_bf16_torch"))
    public = half(of("codebook_matmul"))
    lines += matrix(times, "codebook_matmul: us, times faster than dense_bf16", public)
    lines += few_rows(times)
    others = [r["kernel"] for r in times.rows]
    for kernel in dict.fromkeys(others):
        if kernel not in (*DENSE_KERNELS, "codebook_matmul", *AQLM):
            lines += matrix(times, f"{kernel}: us, times faster than dense_bf16", of(kernel))
    exact = [row for row in of("codebook_matmul") if row["x"] == "float32"]
    lines += matrix(times, "codebook_matmul, x in float32: us, against dense_bf16", exact)
    steps = [", ".join(f"{k} {v}" for k, v in s.items()) for s in about.get("decode_steps", [])]
    lines += ["", *steps] if steps else []
    failed = [row for row in rows if "error" in row]
    lines += ["", *(f"{place(row)}: {row['error'][:200]}" for row in failed)] if failed else []
    lines += ["", "targets", *(target.line() for target in targets(times, about))]
    return "\n".join(lines)


def number(us: float) -> str:
    """Three digits, or all before the point."""
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 100 else f"{us:.0f}"


def main() -> None:
    """Print the tables of a file of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=pathlib.Path)
    about = json.loads(parser.parse_args().results.read_text())
    rows = about.pop("rows")
    print(report(about, rows))


if __name__ == "__main__":
    main()
