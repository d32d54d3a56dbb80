"""What a run says while it trains: a bar on a terminal, plain lines elsewhere."""

import contextlib
import datetime
import sys
from collections.abc import Callable, Iterator

Report = Callable[[int, str, float], None]


@contextlib.contextmanager
def progress(total: int, start: int, *, stderr: bool = False) -> Iterator[Report]:
    """Yields report(step, text, seconds left): `text` beside a bar, or a line a call.

    Args:
      total: steps of the run.
      start: steps already taken.
      stderr: leave standard output to the result.
    """
    file = sys.stderr if stderr else sys.stdout
    if file.isatty():
        with _bar(total, start, stderr) as report:
            yield report
    else:
        yield lambda step, text, left: print(
            f"step {step}/{total}  {text}  {clock(left)} left", file=file, flush=True
        )


@contextlib.contextmanager
def _bar(total: int, start: int, stderr: bool) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[text]}  {task.fields[left]} left"),
    )
    with Progress(*columns, console=Console(stderr=stderr)) as bar:
        task = bar.add_task("train", total=total, completed=start, text="compiling", left="?")
        yield lambda step, text, left: bar.update(task, completed=step, text=text, left=clock(left))


def clock(seconds: float) -> str:
    """Seconds as hours:minutes:seconds."""
    return str(datetime.timedelta(seconds=round(seconds)))
