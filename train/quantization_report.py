"""What a model's linears are stored as, and what that costs: made by quantizing, or read off disk.

Letters: K input and N output features.
"""

import dataclasses
from pathlib import Path
from typing import Any

from jaxcodec.checkpoints.files import read_json, write_json
from jaxcodec.models.load import REPORT_FILE as FILE
from jaxcodec.models.load import Checkpoint, open_model
from jaxcodec.models.transformer import linear_shapes

HEADER = ("linear", "K x N", "stored as", "bits/weight", "relative error", "seconds")


@dataclasses.dataclass(frozen=True)
class LinearReport:
    """One linear.

    Attributes:
      name: such as `layers.0.self_attn.q_proj`.
      K: input features.
      N: output features.
      stored: its spec, such as m2v8g128, or the dtype of a dense one.
      bits_per_weight: codes, codebooks and scales together.
      relative_error: ||W - W'|| / ||W||; None where it is not known.
      seconds: time to quantize it (the first of a shape compiles); None where it is not known.
    """

    name: str
    K: int
    N: int
    stored: str
    bits_per_weight: float
    relative_error: float | None = None
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """All linears of a model's blocks.

    Attributes:
      linears: in the model's order.
      nbytes: bytes of the whole model, embeddings, norms and head included.
    """

    linears: tuple[LinearReport, ...]
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Mean over the weights of all linears."""
        weights = [linear.K * linear.N for linear in self.linears]
        return sum(
            linear.bits_per_weight * w for linear, w in zip(self.linears, weights, strict=True)
        ) / sum(weights)

    def __str__(self) -> str:
        """A table with a line for each linear, and the totals."""
        rows = [HEADER, *map(_row, self.linears)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(
            [
                *lines,
                f"{len(self.linears)} linears at {self.bits_per_weight:.3f} bits per weight; "
                f"whole model {self.nbytes:,} bytes",
            ]
        )

    def write(self, directory: str | Path) -> None:
        """Write the report as JSON into the directory of the model."""
        totals = {"bits_per_weight": self.bits_per_weight, "nbytes": self.nbytes}
        linears = [dataclasses.asdict(linear) for linear in self.linears]
        write_json(Path(directory) / FILE, totals | {"linears": linears})


def inspect_model(directory: str | Path) -> QuantizationReport:
    """Report on a model directory in any layout, and from its report where it has one.

    Raises:
      FileNotFoundError: no such directory, or no config.json or weights in it.
      ValueError: what `load_model` refuses; it is named.
    """
    directory = Path(directory)
    checkpoint = open_model(directory)
    known = _known(directory / FILE)
    linears = tuple(
        _inspect(name, checkpoint, known.get(name, {}))
        for name, _ in linear_shapes(checkpoint.config)
    )
    nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    return QuantizationReport(linears, nbytes)


def _known(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    linears = read_json(path).get("linears")
    if not isinstance(linears, list):
        raise ValueError(f'{path} must hold a list "linears", as quantizing writes it.')
    return {linear["name"]: linear for linear in linears}


def _inspect(name: str, checkpoint: Checkpoint, known: dict[str, Any]) -> LinearReport:
    dense = checkpoint.tensors.get(f"model.{name}.weight")
    if dense is not None:
        N, K = dense.shape
        return LinearReport(name, K, N, dense.dtype.name, 8.0 * dense.itemsize)
    w = checkpoint.linear(name)
    measured = {field: known.get(field) for field in ("relative_error", "seconds")}
    return LinearReport(name, *w.shape, str(w.spec), w.bits_per_weight, **measured)


def _row(linear: LinearReport) -> tuple[str, ...]:
    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return (
        linear.name,
        f"{linear.K} x {linear.N}",
        linear.stored,
        number(linear.bits_per_weight, 3),
        number(linear.relative_error, 4),
        number(linear.seconds, 2),
    )
