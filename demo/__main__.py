"""`python -m jaxcodec.demo`: three agents, one growing context, with shared and private KV caches.

Each agent reads all that is there and adds one line. The same held-out stories are played three
times: with one cache for all agents, with a cache for each, and with prompts alone shared.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from rich.console import Console

from jaxcodec.checkpoints.files import write_json
from jaxcodec.demo.agents import (
    ARRANGEMENTS,
    PAGE_SIZE,
    Arrangement,
    load_base,
    make_engine,
    play,
)
from jaxcodec.demo.report import BaseNumbers, DemoReport, RunNumbers
from jaxcodec.demo.screen import Screen, render_context
from jaxcodec.demo.tasks import Story, stories
from jaxcodec.models.transformer import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Play stories with three arrangements of the same agents, and compare.

    Attributes:
      weights: folder of the demo's models, as `jaxcodec.demo.recipe` leaves it.
      out: JSON file of the numbers in the closing table.
      stories: held-out stories to play.
      seed: of the stories.
    """

    weights: Path = Path(__file__).parent / "weights"
    out: Path = Path("build/demo.json")
    stories: int = 8
    seed: int = 0


def run_demo(options: Options, console: Console) -> DemoReport:
    """Play all arrangements, print them and the table, and write the JSON file.

    Raises:
      FileNotFoundError, ValueError: the weights are missing or damaged; fewer than one story.
    """
    start = time.perf_counter()
    if options.stories < 1:
        raise ValueError(f"Expected one story or more, got {options.stories}.")
    base = load_base(options.weights)
    sizes = BaseNumbers.read(options.weights)
    told = list(islice(stories(options.seed, "heldout"), options.stories))
    console.print(render_context(told[0]))
    console.print("The models compute in float32.")
    runs = tuple(
        run_arrangement(options.weights, base, arrangement, told, console)
        for arrangement in ARRANGEMENTS
    )
    report = DemoReport(options.seed, sizes, runs, time.perf_counter() - start)
    console.print(report)
    write_json(options.out, report.to_json())
    console.print(f"{report.seconds:.0f} s in all; the numbers are in {options.out}.")
    return report


def run_arrangement(
    weights: Path, base: Model, arrangement: Arrangement, told: Sequence[Story], console: Console
) -> RunNumbers:
    """Play `told` with one arrangement on an engine of its own.

    Raises:
      FileNotFoundError, ValueError: an adapter or a model is missing, damaged, or does not fit.
    """
    console.rule(arrangement.name)
    console.print(f"{arrangement.meaning}; compiling ...", style="dim", soft_wrap=True)
    start = time.perf_counter()
    engine, screen = make_engine(weights, base, arrangement, len(told)), Screen(console)
    engine.warm_up()
    warm = time.perf_counter()
    ended = []
    with screen.live():
        for turn in play(engine, told):
            screen.show(turn)
            if turn.right is not None:
                ended.append(turn)
    seconds = time.perf_counter() - warm
    return RunNumbers.of(arrangement.name, ended, engine.stats(), PAGE_SIZE, warm - start, seconds)


def main() -> None:
    """Run the command line; the exit status is 2 if the weights cannot be read."""
    import tyro

    options = tyro.cli(Options)
    try:
        run_demo(options, Console())
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
