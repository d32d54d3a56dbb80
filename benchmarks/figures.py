"""Draw time against rows from the benchmark's results.

    python -m benchmarks.figures h100 h200    # docs/figures/time_against_rows_h100.svg, ...

Letters: M rows, K input and N output features.
"""

import argparse
import json
import math
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib import ticker  # noqa: E402

from benchmarks.plan import KERNEL_SHAPES, ROWS_BY_WEIGHT  # noqa: E402
from benchmarks.tables import Row, Times  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
# Blue, orange, grey and the rest are told apart with the common kinds of colour blindness.
LINES = {
    ("dense_bf16", "bf16"): ("dense bf16", "#666666", "s", "-"),
    ("codebook_matmul", "m2v8g128"): ("codebook_matmul m2v8g128", "#0072b2", "o", "-"),
    ("codebook_matmul", "m1v4g128"): ("codebook_matmul m1v4g128", "#d55e00", "^", "-"),
    ("official_codegemm", "m2v8g128"): ("CodeGEMM, official, m2v8g128", "#0072b2", "x", ":"),
    ("official_codegemm", "m1v4g128"): ("CodeGEMM, official, m1v4g128", "#d55e00", "x", ":"),
    ("aqlm_2x8", None): ("AQLM 2x8", "#009e73", "D", "none"),
    ("aqlm_1x16", None): ("AQLM 1x16", "#cc79a7", "v", "none"),
}
FLOOR_SPEC = "m2v8g128"  # both formats have 2.125 bits a weight
TICKS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 4096)


def draw(about: dict[str, Any], rows: list[Row]) -> Any:
    """The figure: one panel for each shape, time in microseconds against M."""
    times = Times(about, rows)
    figure, panels = plt.subplots(1, len(KERNEL_SHAPES), figsize=(13, 4.6), layout="constrained")
    for panel, (K, N) in zip(panels, KERNEL_SHAPES, strict=True):
        _panel(panel, times, K, N)
    panels[0].set_ylabel("kernel time, µs")
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    device = about.get("device", "")
    figure.suptitle(f"Time against rows of x, {device}", fontsize=12)
    return figure


def _panel(panel: Any, times: Times, K: int, N: int) -> None:
    at = lambda M, spec: {"M": M, "K": K, "N": N, "spec": spec}
    for (kernel, spec), (label, colour, marker, style) in LINES.items():
        points = [(M, times.us(kernel, at(M, spec), spec)) for M in sorted(ROWS_BY_WEIGHT)]
        points = [(M, us) for M, us in points if not math.isnan(us)]
        if points:
            look = {"color": colour, "marker": marker, "ls": style, "label": label}
            panel.plot(*zip(*points, strict=True), ms=5, **look)
    floor = times.floor(at(1, FLOOR_SPEC))
    label = "HBM floor of 2.125 bits a weight"
    panel.axhline(floor, color="black", linestyle="--", linewidth=1, label=label)
    panel.set(xscale="log", yscale="log", title=f"K x N = {K} x {N}", xlabel="M, rows of x")
    panel.set_xticks(TICKS, [str(M) for M in TICKS])
    panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    panel.minorticks_off()
    panel.grid(alpha=0.3)


def main() -> None:
    """Read the results of each device and write its figure, as SVG and as PNG beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("devices", nargs="+", help="folders of benchmarks/results, such as h100")
    parser.add_argument("--out", type=pathlib.Path, default=FIGURES, help="folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # Without this and `Date` a rerun would differ in every file.
    matplotlib.rcParams["svg.hashsalt"] = "jaxcodec"
    for device in options.devices:
        about = json.loads((RESULTS / device / "kernels.json").read_text())
        figure = draw(about, about.pop("rows"))
        out = options.out / f"time_against_rows_{device}.svg"
        figure.savefig(out, metadata={"Date": None})
        figure.savefig(out.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
