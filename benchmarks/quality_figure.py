"""Draw quality against bits per weight, a line for each stage of the quantizer.

python -m benchmarks.quality_figure    # docs/figures/quality_against_bits.svg, from results/h200
"""

import argparse
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib import ticker  # noqa: E402

from benchmarks.quality_tables import STAGES, Row  # noqa: E402
from jaxcodec.checkpoints.files import read_json  # noqa: E402
from jaxcodec.spec import CodebookSpec  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "h200" / "quality.json"
OUT = ROOT / "docs" / "figures" / "quality_against_bits.svg"
# Told apart with the common kinds of colour blindness.
COLOURS = {
    "kmeans": "#999999",
    "search": "#56b4e9",
    "block": "#0072b2",
    "kl": "#e69f00",
    "pv": "#d55e00",
}
# A line joins formats of one vector length: v = 8 beside v = 4.
FAMILIES = {8: ("o", "-"), 4: ("^", ":")}
# Perplexities may span a few units, KL spans decades.
LOCATORS = {
    "perplexity": lambda: ticker.MaxNLocator(8),
    "kl": lambda: ticker.LogLocator(subs=(1, 2, 5)),
}
DENSE = "dense, 16 bits"
MEASURES = {"perplexity": "held-out perplexity", "kl": "KL(dense || quantized), nats a token"}


def draw(device: str, rows: list[Row]) -> Any:
    """The figure: a row of panels for each base, one of perplexity and one of KL."""
    bases = list(dict.fromkeys(row["base"] for row in rows))
    size = (11, 4.2 * len(bases))
    figure, panels = plt.subplots(len(bases), 2, figsize=size, layout="constrained", squeeze=False)
    for line, base in zip(panels, bases, strict=True):
        of_base = [row for row in rows if row["base"] == base]
        for panel, (measure, label) in zip(line, MEASURES.items(), strict=True):
            _panel(panel, of_base, measure)
            panel.set(title=f"{base} base", xlabel="bits per weight, codebooks included")
            panel.set_ylabel(label)
    # A line of each name: a stage may be missing in some panels.
    lines = {line.get_label(): line for panel in panels.flat for line in panel.get_lines()}
    names = [f"{stage}, v = {v}" for stage in STAGES.values() for v in FAMILIES] + [DENSE]
    handles = [lines[name] for name in names if name in lines]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"Quality against bits per weight, {device}", fontsize=12)
    return figure


def _panel(panel: Any, rows: list[Row], measure: str) -> None:
    for stage, colour in COLOURS.items():
        for v, (marker, style) in FAMILIES.items():
            points = sorted(
                (row["bits_per_weight"], row[measure])
                for row in rows
                if row["stage"] == stage and CodebookSpec.parse(row["spec"]).vector_length == v
            )
            if points:
                label = f"{STAGES[stage]}, v = {v}"
                look = {"color": colour, "marker": marker, "ls": style, "label": label}
                panel.plot(*zip(*points, strict=True), ms=5, **look)
    dense = [row for row in rows if row["stage"] == "dense"]
    if dense and measure == "perplexity":
        level = dense[0][measure]
        panel.axhline(level, color="black", linestyle="--", linewidth=1, label=DENSE)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LOCATORS[measure]())
    panel.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    panel.minorticks_off()
    panel.grid(alpha=0.3, which="both")


def main() -> None:
    """Read the results and write the figure, as SVG and as PNG beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    options = parser.parse_args()
    content = read_json(options.results)
    figure = draw(content["device"], content["rows"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # Without these two a rerun would differ in every file.
    matplotlib.rcParams["svg.hashsalt"] = "jaxcodec"
    figure.savefig(options.out, metadata={"Date": None})
    figure.savefig(options.out.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
