"""What a model's linears are stored as, and what that costs: made by quantizing, or read off disk.

Letters: K input and N output features.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxcodec.checkpoints.files import read_json, write_json
from jaxcodec.models.load import DTYPES, Checkpoint, open_model
from jaxcodec.models.load import REPORT_FILE as FILE
from jaxcodec.models.transformer import linear_shapes
from jaxcodec.train.block_tuning import TuningResult

HEADER = (
    "linear",
    "K x N",
    "stored as",
    "bits/weight",
    "weight error",
    "activation error",
    "seconds",
)


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
      activation_error: tr(dW^T H dW) / tr(W^T H W) with the H of its inputs, before the block was
        tuned; H = I without calibration data. None where it is not known.
      seconds: time to quantize it (the first of a shape compiles); None where it is not known.
    """

    name: str
    K: int
    N: int
    stored: str
    bits_per_weight: float
    relative_error: float | None = None
    activation_error: float | None = None
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """One block.

    Attributes:
      layer: its number.
      linears: those that were quantized.
      tuning: its output errors before and after tuning; None without calibration data.
      seconds: by stage of the work.
    """

    layer: int
    linears: tuple[LinearReport, ...]
    tuning: TuningResult | None
    seconds: dict[str, float]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "BlockReport":
        """Inverse of `dataclasses.asdict`."""
        tuning = content["tuning"]
        return cls(
            content["layer"],
            tuple(LinearReport(**linear) for linear in content["linears"]),
            None if tuning is None else TuningResult(**tuning),
            content["seconds"],
        )


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """Linears of a model's blocks.

    Attributes:
      linears: in the model's order: those that were quantized where the report is of that, all of
        them where it is of `inspect_model`.
      nbytes: bytes of the whole model, embeddings, norms and head included.
      blocks: how each block came about; empty where that is not known.
    """

    linears: tuple[LinearReport, ...]
    nbytes: int
    blocks: tuple[BlockReport, ...] = ()

    @classmethod
    def of(cls, blocks: Sequence[BlockReport], nbytes: int) -> "QuantizationReport":
        """The report of a model from those of its blocks."""
        linears = tuple(linear for block in blocks for linear in block.linears)
        return cls(linears, nbytes, tuple(blocks))

    @property
    def seconds(self) -> dict[str, float]:
        """Time by stage, of all blocks together."""
        total: dict[str, float] = {}
        for block in self.blocks:
            for stage, seconds in block.seconds.items():
                total[stage] = total.get(stage, 0.0) + seconds
        return total

    @property
    def bits_per_weight(self) -> float:
        """Mean over the weights of `linears`."""
        return _mean_bits(self.linears)

    def __str__(self) -> str:
        """A table with a line for each linear, and the totals."""
        rows = [HEADER, *map(_row, self.linears)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        total = f"{len(self.linears)} linears at {self.bits_per_weight:.3f} bits per weight"
        quantized = [linear for linear in self.linears if linear.stored not in DTYPES]
        if 0 < len(quantized) < len(self.linears):
            total += f", {len(quantized)} of them quantized at {_mean_bits(quantized):.3f}"
        lines.append(f"{total}; whole model {self.nbytes:,} bytes")
        tuned = [(b.layer, b.tuning) for b in self.blocks if b.tuning is not None]
        if tuned:
            errors = (f"{i}: {t}" for i, t in tuned)
            lines.append("output error of the blocks: " + ", ".join(errors))
        if self.seconds:
            stages = (f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
            lines.append("seconds: " + ", ".join(stages))
        return "\n".join(lines)

    def write(self, directory: str | Path) -> None:
        """Write the report as JSON into the directory of the model."""
        totals = {"bits_per_weight": self.bits_per_weight, "nbytes": self.nbytes}
        write_json(Path(directory) / FILE, totals | dataclasses.asdict(self))


def inspect_model(directory: str | Path) -> QuantizationReport:
    """Report on a model directory in any layout, and from its report where it has one.

    Raises:
      FileNotFoundError: no such directory, or no config.json or weights in it.
      ValueError: what `load_model` refuses; it is named.
    """
    directory = Path(directory)
    checkpoint = open_model(directory)
    known = read_report(directory)
    measured = {linear.name: linear for linear in known.linears}
    linears = tuple(
        _inspect(name, checkpoint, measured.get(name))
        for name, _ in linear_shapes(checkpoint.config)
    )
    nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    return QuantizationReport(linears, nbytes, known.blocks)


def read_report(directory: str | Path) -> QuantizationReport:
    """The report that quantizing left in the directory of a model; an empty one where it did not.

    Raises:
      ValueError: the file is not such a report.
    """
    path = Path(directory) / FILE
    if not path.exists():
        return QuantizationReport((), 0)
    content = read_json(path)
    try:
        linears = tuple(LinearReport(**linear) for linear in content["linears"])
        blocks = tuple(map(BlockReport.from_json, content.get("blocks", ())))
        return QuantizationReport(linears, content.get("nbytes", 0), blocks)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a report as quantizing writes it: {error}.") from None


def _mean_bits(linears: Sequence[LinearReport]) -> float:
    """Bits per weight, mean over the weights of all."""
    bits = sum(linear.bits_per_weight * linear.K * linear.N for linear in linears)
    return bits / sum(linear.K * linear.N for linear in linears)


def _inspect(name: str, checkpoint: Checkpoint, known: LinearReport | None) -> LinearReport:
    dense = checkpoint.tensors.get(f"model.{name}.weight")
    if dense is not None:
        N, K = dense.shape
        return LinearReport(name, K, N, dense.dtype.name, 8.0 * dense.itemsize)
    w = checkpoint.linear(name)
    here = LinearReport(name, *w.shape, str(w.spec), w.bits_per_weight)
    if known is None:
        return here
    measured = ("relative_error", "activation_error", "seconds")
    return dataclasses.replace(here, **{field: getattr(known, field) for field in measured})


def _row(linear: LinearReport) -> tuple[str, ...]:
    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return (
        linear.name,
        f"{linear.K} x {linear.N}",
        linear.stored,
        number(linear.bits_per_weight, 3),
        number(linear.relative_error, 4),
        number(linear.activation_error, 5),
        number(linear.seconds, 2),
    )
