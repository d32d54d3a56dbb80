"""A picture of what quantizing cost: error and bits of every linear, layer by layer."""

from pathlib import Path

from jaxcodec.train.quantization_report import QuantizationReport

FILE = "quantization.svg"


def write_figure(directory: str | Path, report: QuantizationReport) -> None:
    """Write `quantization.svg`: error and bits per weight of each kind of linear against depth.

    Activation errors where the report has them, else errors of the weights.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 6), layout="constrained")
    errors, bits = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    known = all(linear.activation_error is not None for linear in report.linears)
    kinds = dict.fromkeys(_split(linear.name)[1] for linear in report.linears)
    for kind in kinds:
        linears = [(*_split(li.name), li) for li in report.linears if _split(li.name)[1] == kind]
        layers = [layer for layer, _, _ in linears]
        values = [li.activation_error if known else li.relative_error for _, _, li in linears]
        errors.plot(layers, values, marker="o", markersize=3, label=kind)
        bits.plot(layers, [li.bits_per_weight for _, _, li in linears], marker="o", markersize=3)
    errors.set_yscale("log")
    errors.set_ylabel("activation error" if known else "weight error")
    errors.legend(ncols=4, fontsize="small")
    errors.grid(alpha=0.3)
    bits.set_ylabel("bits per weight")
    bits.set_xlabel("layer")
    bits.grid(alpha=0.3)
    figure.suptitle(f"{report.bits_per_weight:.2f} bits per weight")
    figure.savefig(Path(directory) / FILE)


def _split(name: str) -> tuple[int, str]:
    """`layers.3.mlp.up_proj` as (3, "mlp.up_proj")."""
    _, layer, kind = name.split(".", 2)
    return int(layer), kind
