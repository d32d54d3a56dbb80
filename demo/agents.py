"""The demo's agents at work: stories played through one engine, and what that cost.

An `Arrangement` says who plays each agent and who writes their caches. `play` lets all stories run
at once; within one, an agent's turn is submitted as soon as the agent before has ended its line,
and reads what that one really said.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp

from jaxcodec.demo.tasks import AGENTS, STOP, Story, check, tag
from jaxcodec.models.cache import pages_for
from jaxcodec.models.load import load_model
from jaxcodec.models.lora import load_adapter
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, PREFILL_SHARE, Scheme
from jaxcodec.models.tokenizer import PretrainedTokenizer
from jaxcodec.models.transformer import Model
from jaxcodec.serve.buckets import Buckets
from jaxcodec.serve.engine import Engine
from jaxcodec.serve.request import Request, RequestOutput, SamplingParams

BASE_FOLDER = "base-quantized"
# The order of turns is that of AGENTS.
FIRST, *_ = AGENT_NAMES = tuple(AGENTS)
# A right turn has at most about 60 tokens; what goes on longer is wrong.
SAMPLING = SamplingParams(temperature=0.0, max_tokens=80, stop=(STOP,))
# Small, so that a turn of a dozen tokens fills pages that the next agent finds.
PAGE_SIZE = 8
# One shape of decode steps and two of prefills (a whole opening; a turn that follows cached pages):
# each is compiled for some seconds, more of them would save less than that.
ROWS = 8
PREFILL_TOKENS = (32, 128)


@dataclasses.dataclass(frozen=True)
class Player:
    """Who plays an agent: the scheme, and the folder with the adapter or model."""

    scheme: Scheme
    folder: str


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """One way to serve the three agents.

    Attributes:
      name: in the table and in the JSON file.
      meaning: a line that says what is shared.
      players: by agent.
    """

    name: str
    meaning: str
    players: dict[str, Player]


ARRANGEMENTS = (
    Arrangement(
        "shared (icarus)",
        "three adapters that read what the frozen base writes: one KV cache for prompts and turns",
        {agent: Player(ICARUS, f"icarus-{agent}") for agent in AGENT_NAMES},
    ),
    Arrangement(
        "private (conventional)",
        "three ordinary adapters, a KV cache each: every agent reads everything anew",
        {agent: Player(CONVENTIONAL, f"conventional-{agent}") for agent in AGENT_NAMES},
    ),
    Arrangement(
        "shared prompts (prefill-share)",
        "compute is a model of its own that reads prompts which the base writes; others as icarus",
        {
            agent: Player(PREFILL_SHARE, "prefill-share-compute")
            if agent == "compute"
            else Player(ICARUS, f"icarus-{agent}")
            for agent in AGENT_NAMES
        },
    ),
)


@dataclasses.dataclass(frozen=True)
class Turn:
    """An agent's line, while it grows and when it has ended.

    Attributes:
      story: number of the story, from 1.
      agent: whose turn it is.
      context: all that the agent reads, its own tag line included.
      text: what it has said so far, without STOP.
      right: whether the line is the right one; None while it grows.
    """

    story: int
    agent: str
    context: str
    text: str = ""
    right: bool | None = None


def load_base(weights: Path) -> Model:
    """The quantized base, to be computed with in float32 whatever the CPU.

    Raises:
      FileNotFoundError: `weights` lacks the folder of the base or of a player.
      ValueError: the base is damaged.
    """
    players = {p.folder for arrangement in ARRANGEMENTS for p in arrangement.players.values()}
    missing = [f for f in sorted({BASE_FOLDER, *players}) if not (weights / f).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"Expected the demo's models in {weights}, which lacks {', '.join(missing)}: give "
            "their folder as --weights, or make them with `python -m jaxcodec.demo.recipe`."
        )
    return load_model(weights / BASE_FOLDER, jnp.float32)


def make_engine(weights: Path, base: Model, arrangement: Arrangement, stories: int) -> Engine:
    """An engine on `base` that serves each agent by its name.

    The pool holds every context in full for every agent, so that nothing is ever evicted and the
    peak of pages is what an arrangement needs.

    Raises:
      FileNotFoundError: an adapter or a model is missing.
      ValueError: one is damaged, or does not fit the base.
    """
    width = pages_for(base.config.max_positions, PAGE_SIZE)
    engine = Engine(
        base,
        PretrainedTokenizer(weights / BASE_FOLDER),
        page_size=PAGE_SIZE,
        pages=stories * len(AGENT_NAMES) * width,
        max_batch=ROWS,
        step_tokens=PREFILL_TOKENS[-1],
        buckets=Buckets(rows=(ROWS,), tokens=PREFILL_TOKENS, pages=(width,)),
    )
    for agent, player in arrangement.players.items():
        folder = weights / player.folder
        if (folder / "adapter_config.json").is_file():
            engine.add_model(agent, player.scheme, adapter=load_adapter(folder, base))
        else:
            engine.add_model(agent, player.scheme, model=load_model(folder, base.dtype))
    return engine


def play(engine: Engine, stories: Sequence[Story]) -> Iterator[Turn]:
    """Yields the turns of all stories: each whenever it begins or grows, and when it has ended."""
    speaking: dict[str, Turn] = {}

    def begin(turn: Turn) -> Turn:
        speaking[engine.submit(Request(turn.agent, turn.context, SAMPLING))] = turn
        return turn

    for number, story in enumerate(stories, 1):
        yield begin(Turn(number, FIRST, story.opening + tag(FIRST)))
    while speaking:
        for event in engine.step():
            turn = speaking[event.id]
            if isinstance(event, RequestOutput):
                del speaking[event.id]
                right = check(turn.context, event.text)
                yield (turn := dataclasses.replace(turn, text=event.text, right=right))
                if (following := next_turn(turn)) is not None:
                    yield begin(following)
            elif event.text:
                turn = dataclasses.replace(turn, text=turn.text + event.text)
                speaking[event.id] = turn
                yield turn


def next_turn(turn: Turn) -> Turn | None:
    """The turn after one that has ended; None after the last agent's."""
    later = AGENT_NAMES[AGENT_NAMES.index(turn.agent) + 1 :]
    if not later:
        return None
    return Turn(turn.story, later[0], turn.context + turn.text + STOP + tag(later[0]))
