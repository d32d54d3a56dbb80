"""The table says what the statistics say."""

import io
import itertools

from rich.console import Console

from jaxcodec.serve.live_table import live_table, render
from jaxcodec.serve.plan import PageCounts
from jaxcodec.serve.statistics import EngineStats, ModelStats

PAGES = PageCounts(total=64, free=14, held=30, cached=20, peak=50, host=6)


def stats(generated: int, seconds: float) -> EngineStats:
    sums = ModelStats(
        waiting=3, running=8, finished={"stop": 4, "length": 1}, prompt_tokens=1200,
        reused_tokens=300, prefill_tokens=900, decode_tokens=generated, preemptions=2,
    )  # fmt: skip
    return EngineStats.of({"sums": sums}, PAGES, seconds=seconds, evictions=5, offloaded=7)


def printed(renderable: object) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_every_number_is_there() -> None:
    lines = printed(render(stats(5000, 12.0), stats(1000, 10.0)))
    for expected in (
        "responses 3 waiting, 8 running, 5 ended (1 length, 4 stop)",
        "prompt tokens 1,200, of which 25% reused",
        "tokens/s 2,000.0",
        "30 held, 20 cached, 14 free of 64; at most 50 in use",
        "5 evicted, 7 to host memory, 0 back, 6 there",
        "sums 3 8 5 1,200 25% 5,000 2,000 2",
    ):
        assert any(expected in line for line in lines), expected


def test_a_model_that_is_new_has_a_rate() -> None:
    nothing = EngineStats.of({}, PAGES, seconds=10.0)
    assert any(" 500 " in line for line in printed(render(stats(1000, 12.0), nothing)))


def test_without_a_terminal_only_the_end_is_printed(monkeypatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    made = (stats(1000 * i, 10.0 + i) for i in itertools.count())
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    with live_table(lambda: next(made), console) as draw:
        for _ in range(5):
            draw()
        assert console.file.getvalue() == ""
    text = console.file.getvalue()
    assert text.count("tokens/s") == 1
    assert "1,000.0" in text


def test_a_terminal_sees_it_change(monkeypatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    made = (stats(1000 * i, 10.0 + i) for i in itertools.count())
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with live_table(lambda: next(made), console) as draw:
        for _ in range(3):
            draw()
        assert console.file.getvalue().count("tokens/s") == 3
    assert console.file.getvalue().count("tokens/s") >= 4


def test_it_fits_a_narrow_terminal() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(render(stats(1_000_000, 12.0), stats(1000, 10.0)))
    assert "…" not in console.file.getvalue()
