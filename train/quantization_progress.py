"""What a quantization says while it runs: a live table on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType

from jaxcodec.train.progress import clock
from jaxcodec.train.quantization_report import BlockReport


class QuantizationProgress:
    """Blocks done with their errors, the stage at hand, and the time left.

    Time left is the mean of the blocks made in this process, the first of which also compiles.
    """

    # Blocks shown: what fits a small terminal beside the totals.
    SHOWN = 16

    def __init__(self, layers: int, quiet: bool = False):
        self._layers, self._quiet = layers, quiet
        self._reports: list[BlockReport] = []
        self._layer, self._stage = 0, ""
        self._made, self._start, self._began = 0, time.perf_counter(), 0.0
        self._earlier = False
        self._live = None

    def __enter__(self) -> "QuantizationProgress":
        if not self._quiet and sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(self, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, layer: int) -> None:
        """A block is begun."""
        self._layer, self._stage, self._began = layer, "", time.perf_counter()

    def stage(self, text: str) -> None:
        """Something is begun within the block."""
        self._stage = text

    def end(self, report: BlockReport, earlier: bool = False) -> None:
        """A block is done, in this process or, `earlier`, in one before it."""
        self._reports.append(report)
        if not earlier:
            self._made += 1
        else:
            self._start = time.perf_counter()
        if not self._quiet and self._live is None:
            done = "finished earlier" if earlier else f"{self._seconds():.1f} s"
            print(
                f"block {report.layer + 1}/{self._layers}  error {errors(report)}  {done}  "
                f"{self._left()} left",
                flush=True,
            )

    def _seconds(self) -> float:
        return time.perf_counter() - self._began

    def _left(self) -> str:
        if not self._made:
            return "?"
        each = (time.perf_counter() - self._start) / self._made
        return clock(each * (self._layers - len(self._reports)))

    def __rich__(self):
        from rich.table import Table

        table = Table(caption=f"{len(self._reports)} of {self._layers} blocks, {self._left()} left")
        for column in ("block", "stage", "error", "seconds"):
            table.add_column(column, justify="left" if column == "stage" else "right")
        for report in self._reports[-self.SHOWN :]:
            seconds = f"{sum(report.seconds.values()):.1f}"
            table.add_row(str(report.layer), "done", errors(report), seconds)
        if len(self._reports) < self._layers:
            table.add_row(str(self._layer), self._stage, "", f"{self._seconds():.1f}")
        return table


def errors(report: BlockReport) -> str:
    """The block's output error before and after tuning, or the mean of its linears' errors."""
    if report.tuning is not None:
        return str(report.tuning)
    mean = sum(linear.activation_error or 0.0 for linear in report.linears)
    return f"{mean / max(len(report.linears), 1):.4f}"
