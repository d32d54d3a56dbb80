"""What the demo measures: the numbers of a run and the size of the base, as table and as JSON."""

import dataclasses
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Group
from rich.table import Table
from rich.text import Text

import jaxcodec
from jaxcodec.demo.agents import AGENT_NAMES, BASE_FOLDER, Turn
from jaxcodec.serve.statistics import EngineStats
from jaxcodec.train.quantization_report import QuantizationReport, inspect_model


@dataclasses.dataclass(frozen=True)
class RunNumbers:
    """One arrangement's run through all stories.

    Attributes:
      name: the arrangement's.
      stories: stories played, each with one turn of every agent.
      right: right lines, by agent.
      stories_right: stories of which every line is right.
      prompt_tokens: tokens in all prompts.
      prefill_tokens_computed: of them, those that a prefill computed.
      prefill_tokens_reused: of them, those whose pages were found.
      decode_tokens: tokens generated.
      peak_pages: most pages that held keys and values at any time.
      page_size: tokens in a page.
      compile_seconds: warm-up, before the clock of the run starts.
      seconds: wall time of the run itself.
    """

    name: str
    stories: int
    right: dict[str, int]
    stories_right: int
    prompt_tokens: int
    prefill_tokens_computed: int
    prefill_tokens_reused: int
    decode_tokens: int
    peak_pages: int
    page_size: int
    compile_seconds: float
    seconds: float

    @classmethod
    def of(
        cls,
        name: str,
        turns: Sequence[Turn],
        stats: EngineStats,
        page_size: int,
        compile_seconds: float,
        seconds: float,
    ) -> "RunNumbers":
        """The numbers of `turns`, all ended, and of the engine that served nothing else."""
        stories = {turn.story for turn in turns}
        wrong = {turn.story for turn in turns if not turn.right}
        return cls(
            name=name,
            stories=len(stories),
            right={a: sum(bool(t.right) for t in turns if t.agent == a) for a in AGENT_NAMES},
            stories_right=len(stories - wrong),
            prompt_tokens=stats.prompt_tokens,
            prefill_tokens_computed=stats.prefill_tokens,
            prefill_tokens_reused=stats.reused_tokens,
            decode_tokens=stats.decode_tokens,
            peak_pages=stats.pages.peak,
            page_size=page_size,
            compile_seconds=compile_seconds,
            seconds=seconds,
        )

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated per second of the run, prefills included in the time."""
        return self.decode_tokens / max(self.seconds, 1e-9)


@dataclasses.dataclass(frozen=True)
class BaseNumbers:
    """The base on disk, against the dense model that it was made of.

    Attributes:
      bits_per_weight: mean over the linears of codes, scales and codebooks together.
      linear_bytes: bytes of the linears, the same things counted.
      dense_linear_bytes: bytes of the dense linears.
      bytes: bytes of the whole model, embeddings and norms included.
      dense_bytes: bytes of the whole dense model.
    """

    bits_per_weight: float
    linear_bytes: int
    dense_linear_bytes: int
    bytes: int
    dense_bytes: int

    @classmethod
    def read(cls, weights: Path) -> "BaseNumbers":
        """Read off the shapes of the files.

        Raises:
          FileNotFoundError, ValueError: the base, dense or quantized, is missing or damaged.
        """
        quantized, dense = inspect_model(weights / BASE_FOLDER), inspect_model(weights / "base")
        return cls(
            bits_per_weight=quantized.bits_per_weight,
            linear_bytes=_linear_bytes(quantized),
            dense_linear_bytes=_linear_bytes(dense),
            bytes=quantized.nbytes,
            dense_bytes=dense.nbytes,
        )


def _linear_bytes(report: QuantizationReport) -> int:
    return round(sum(w.K * w.N * w.bits_per_weight / 8 for w in report.linears))


@dataclasses.dataclass(frozen=True)
class DemoReport:
    """All that the demo measured.

    Attributes:
      seed: of the stories.
      base: see `BaseNumbers`.
      runs: one for each arrangement, over the same stories.
      seconds: wall time of the whole demo, loading and compiling included.
    """

    seed: int
    base: BaseNumbers
    runs: tuple[RunNumbers, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The same for `write_json`, with the versions that it was measured with."""
        runs = [
            dataclasses.asdict(run) | {"tokens_per_second": run.tokens_per_second}
            for run in self.runs
        ]
        return {
            "command": "python -m jaxcodec.demo "
            f"--stories {self.runs[0].stories} --seed {self.seed}",
            "versions": {
                "jaxcodec": jaxcodec.__version__,
                "jax": jax.__version__,
                "python": platform.python_version(),
            },
            "device": jax.devices()[0].device_kind,
            "dtype": "float32",
            **dataclasses.asdict(self),
            "runs": runs,
        }

    def __rich__(self) -> Group:
        """The table of the runs, and two lines on the base."""
        table = Table(title="The same stories, three ways", title_justify="left")
        table.add_column("")
        for run in self.runs:
            table.add_column(run.name.replace(" (", "\n("), justify="right")
        for cells in zip(*(_column(run) for run in self.runs), strict=True):
            table.add_row(cells[0][0], *(value for _, value in cells))
        base = self.base
        return Group(
            table,
            Text(
                f"Linears of the base: {base.bits_per_weight:.2f} bits per weight, codes, scales "
                f"and codebooks counted; {base.linear_bytes:,} bytes against "
                f"{base.dense_linear_bytes:,} dense."
            ),
            Text(f"Whole base: {base.bytes:,} bytes against {base.dense_bytes:,} dense."),
        )


def _column(run: RunNumbers) -> list[tuple[str, str]]:
    return [
        *(
            (f"right answers: {agent}", f"{right} of {run.stories}")
            for agent, right in run.right.items()
        ),
        ("stories all right", f"{run.stories_right} of {run.stories}"),
        ("prompt tokens", f"{run.prompt_tokens:,}"),
        ("prefill tokens computed", f"{run.prefill_tokens_computed:,}"),
        ("prefill tokens reused", f"{run.prefill_tokens_reused:,}"),
        (f"peak pages of {run.page_size} tokens", f"{run.peak_pages:,}"),
        ("tokens generated", f"{run.decode_tokens:,}"),
        ("seconds", f"{run.seconds:.1f}"),
        ("tokens/s", f"{run.tokens_per_second:,.0f}"),
        ("seconds to compile, before", f"{run.compile_seconds:.1f}"),
    ]
