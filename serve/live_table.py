"""What an engine is doing, as a table that changes while it works."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from jaxcodec.serve.statistics import EngineStats, ModelStats

# As often as one can read it; rates are of the time between.
SECONDS_BETWEEN = 0.5


@contextlib.contextmanager
def live_table(stats: Callable[[], EngineStats], console: Console) -> Iterator[Callable[[], None]]:
    """Show the statistics while the block lasts, and at its end those of the whole block.

    Where the console is no terminal, only the last is printed.

    Yields:
      what to call between steps; it draws anew when it is time.
    """
    first = before = stats()
    due = time.monotonic() + SECONDS_BETWEEN

    def draw() -> None:
        nonlocal before, due
        if live is not None and time.monotonic() >= due:
            now = stats()
            live.update(render(now, before), refresh=True)
            before, due = now, time.monotonic() + SECONDS_BETWEEN

    live = (
        Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
    )
    with live or contextlib.nullcontext():
        yield draw
    console.print(render(stats(), first))


def render(stats: EngineStats, since: EngineStats) -> Group:
    """Two tables, of the engine and of its models.

    Args:
      since: rates are of the time from here on; all else counts from the engine's beginning.
    """
    seconds = max(stats.seconds - since.seconds, 1e-9)
    pages = stats.pages
    engine = Table("", "", show_header=False, box=box.SIMPLE)
    for name, value in (
        ("responses", f"{stats.waiting:,} waiting, {stats.running:,} running, {_ended(stats)}"),
        ("prompt tokens", f"{stats.prompt_tokens:,}, of which {stats.hit_rate:.0%} reused"),
        ("tokens prefilled", f"{stats.prefill_tokens:,}"),
        ("tokens generated", f"{stats.decode_tokens:,}"),
        ("tokens/s", f"{(stats.decode_tokens - since.decode_tokens) / seconds:,.1f}"),
        (
            "pages",
            f"{pages.held:,} held, {pages.cached:,} cached, {pages.free:,} free of "
            f"{pages.total:,}; at most {pages.peak:,} in use",
        ),
        ("pages given up", f"{stats.evictions:,} evicted, {_moved(stats)}"),
        ("preemptions", f"{stats.preemptions:,}"),
        ("adapter loads", f"{stats.adapter_loads:,}"),
        ("rejections", f"{stats.rejected:,}"),
        ("steps", f"{stats.steps:,}, {stats.launches:,} launches"),
    ):
        engine.add_row(name, value)
    return Group(engine, _models(stats, since, seconds))


def _models(stats: EngineStats, since: EngineStats, seconds: float) -> Table:
    names = ("wait", "run", "ended", "prompt", "reused", "generated", "/s", "preempted")
    table = Table("model", box=box.SIMPLE, collapse_padding=True)  # to fit 80 columns
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for name, model in stats.models.items():
        new = model.decode_tokens - since.models.get(name, ModelStats()).decode_tokens
        values = (
            f"{model.waiting:,}",
            f"{model.running:,}",
            f"{sum(model.finished.values()):,}",
            f"{model.prompt_tokens:,}",
            f"{model.hit_rate:.0%}",
            f"{model.decode_tokens:,}",
            f"{new / seconds:,.0f}",
            f"{model.preemptions:,}",
        )
        table.add_row(name, *values)
    return table


def _ended(stats: EngineStats) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(stats.finished.items()))
    return f"{sum(stats.finished.values()):,} ended" + (f" ({reasons})" if reasons else "")


def _moved(stats: EngineStats) -> str:
    host = stats.pages.host
    return f"{stats.offloaded:,} to host memory, {stats.restored:,} back, {host:,} there"
