"""The agents' text as it streams by: ended lines above, growing ones in place below."""

import contextlib
from collections.abc import Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from jaxcodec.demo.agents import Turn
from jaxcodec.demo.tasks import AGENTS, Story

COLORS = dict(zip(AGENTS, ("cyan", "magenta", "yellow"), strict=True))
# Faster than one reads, and slow enough to cost the model nothing.
REFRESHES_PER_SECOND = 10


class Screen:
    """Prints turns. Where stdout is no terminal, only ended lines, each whole.

    Args:
      console: to print on.
    """

    def __init__(self, console: Console):
        self._console = console
        self._growing: dict[int, Turn] = {}  # by story: it has one turn at a time

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """While it is open, growing lines are shown below."""
        if not self._console.is_terminal:
            yield
            return
        with Live(
            get_renderable=self._render_growing,
            console=self._console,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
        ):
            yield

    def show(self, turn: Turn) -> None:
        """Take the newest state of a turn."""
        if turn.right is None:
            self._growing[turn.story] = turn
        else:
            self._growing.pop(turn.story, None)
            self._console.print(render(turn), soft_wrap=True)

    def _render_growing(self) -> Group:
        # list first: another thread refreshes, while this dict changes
        turns = sorted(list(self._growing.values()), key=lambda turn: turn.story)
        return Group(*(render(turn) for turn in turns))


def render(turn: Turn) -> Text:
    """One line: `story 3 extract │ Anna lamps 7; Clara lamps 9 ✓`."""
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(f"story {turn.story:<2} ", style="dim")
    line.append(f"{turn.agent:<7} │ ", style=f"bold {COLORS[turn.agent]}")
    line.append(turn.text, style=COLORS[turn.agent])
    if turn.right is not None:
        line.append(" ✓" if turn.right else " ✗", style="bold green" if turn.right else "bold red")
    return line


def render_context(story: Story) -> Panel:
    """A whole context with the right lines, as the agents should leave it."""
    last = list(AGENTS)[-1]
    text = Text(story.prompt(last) + story.completion(last).rstrip())
    for agent, color in COLORS.items():
        text.highlight_regex(rf"(?m)^### {agent}\n.*$", color)
    return Panel(text, title="story 1, with the right lines", title_align="left")
