"""Three agents over one growing context: `extract`, then `compute`, then `format`.

A story is a record (an order in plain sentences) and one question about it. Every agent reads all
that is there so far and adds one line, under a tag line of its own:

    Order 17, Friday: Anna ordered 7 lamps and 12 ropes. We packed 3 ropes and 9 lamps for ...
    Question: How many lamps go to Anna and Clara?
    ### extract
    Anna lamps 7; Clara lamps 9
    ### compute
    7 + 9 = 16; total 16
    ### format
    {"who": "Anna and Clara", "what": "lamps", "total": 16}

A prompt ends with the newline of its tag line and a completion with `STOP`, also a newline. Both
are single tokens, so a turn has the same tokens alone and within the whole. The text is its own
answer key: `read_story` recovers the facts, and `check` needs nothing but the context.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from rich.progress import track

from jaxcodec.demo.records import (
    ITEMS,
    NAMES,
    Entry,
    Record,
    Split,
    make_record,
    read_record,
    words_of,
)

STOP = "\n"

COUNTS = ("How many {items} go to {names}?", "How many {items} are for {names}?")
COSTS = (
    "How many coins must {names} pay for {items}?",
    "How many coins do the {items} of {names} cost?",
)


@dataclass(frozen=True)
class Example:
    """What one agent is trained on: the context up to its tag line, and its own line."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Story:
    """A record and a question about it: how many of `items` go to `names`, or what they cost."""

    record: Record
    question: str
    names: tuple[str, ...]
    items: tuple[str, ...]

    @property
    def costs(self) -> bool:
        """Whether the question asks for coins rather than pieces."""
        return self.question.startswith("How many coins")

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The one to three entries that the answer rests on, in the question's order."""
        asked = (self.record.of(name, item) for name in self.names for item in self.items)
        return tuple(entry for entry in asked if entry is not None)

    @property
    def total(self) -> int:
        """The right answer to the question."""
        pieces = sum(entry.quantity for entry in self.entries)
        return pieces * self.record.price if self.costs else pieces

    @property
    def opening(self) -> str:
        """What all agents share from the start: the record and the question."""
        return f"{self.record.text}\nQuestion: {self.question}\n"

    def completion(self, agent: str) -> str:
        """Returns the right line of `agent`, STOP included."""
        return AGENTS[agent](self) + STOP

    def prompt(self, agent: str) -> str:
        """Returns the context at the turn of `agent`, all turns before it rightly answered."""
        context = self.opening
        for earlier in AGENTS:
            context += tag(earlier)
            if earlier == agent:
                return context
            context += self.completion(earlier)
        raise ValueError(f"Expected an agent of {', '.join(AGENTS)}, got {agent!r}.")

    def example(self, agent: str) -> Example:
        """Returns the turn of `agent` as prompt and completion."""
        return Example(self.prompt(agent), self.completion(agent))


def _extract(story: Story) -> str:
    facts = [f"{entry.name} {entry.item} {entry.quantity}" for entry in story.entries]
    return "; ".join([*facts, f"price {story.record.price}"] if story.costs else facts)


def _compute(story: Story) -> str:
    subtotal, *rest = (entry.quantity for entry in story.entries)
    steps = [f"{subtotal} * {story.record.price} = {story.total}"] if story.costs else []
    for quantity in rest:
        steps.append(f"{subtotal} + {quantity} = {subtotal + quantity}")
        subtotal += quantity
    return "; ".join([*steps, f"total {story.total}"])


def _format(story: Story) -> str:
    items = enumerate_words(story.items)
    what = f"coins for {items}" if story.costs else items
    return json.dumps({"who": enumerate_words(story.names), "what": what, "total": story.total})


# The agents, in the order of their turns.
AGENTS: dict[str, Callable[[Story], str]] = {
    "extract": _extract,
    "compute": _compute,
    "format": _format,
}


def tag(agent: str) -> str:
    """Returns the line that opens the turn of `agent`."""
    return f"### {agent}\n"


def enumerate_words(words: Iterable[str]) -> str:
    """Joins words as English does: "Anna", "Anna and Bruno", "Anna, Bruno and Clara"."""
    *head, last = words
    return f"{', '.join(head)} and {last}" if head else last


def make_story(rng: random.Random, record: Record) -> Story:
    """Returns the record with a random question, of one of four kinds with equal chances.

    The kinds: one item of two people, one item of all three, both items of one person, and the
    cost of one person's item.
    """
    kind = rng.choice(("two people", "three people", "two items", "cost"))
    if kind == "cost":
        items = (record.priced_item,)
        names = (rng.choice([e.name for e in record.entries if e.item == record.priced_item]),)
    elif kind == "two items":
        names = (rng.choice(record.names),)
        items = tuple(rng.sample([e.item for e in record.entries if e.name == names[0]], 2))
    else:
        names = tuple(rng.sample(record.names, 2 if kind == "two people" else 3))
        shared = [i for i in record.items if all(record.of(name, i) for name in names)]
        items = (rng.choice(shared),)
    template = rng.choice(COSTS if kind == "cost" else COUNTS)
    question = template.format(items=enumerate_words(items), names=enumerate_words(names))
    return Story(record, question, names, items)


def stories(seed: int, split: Split) -> Iterator[Story]:
    """Yields endless stories of one split; the same seed and split give the same stories."""
    rng = random.Random(f"stories {seed} {split}")
    while True:
        record = make_record(rng)
        if record.split == split:
            yield make_story(rng, record)


def read_story(context: str) -> Story:
    """Recovers record and question from a context with any number of turns.

    Raises ValueError if its first two lines are not a record and a question about that record.
    """
    text, question, *_ = [*context.split("\n"), ""]
    question = question.removeprefix("Question: ")
    story = Story(read_record(text), question, words_of(NAMES, question), words_of(ITEMS, question))
    if not story.entries or len(story.entries) != len(story.names) * len(story.items):
        raise ValueError(f"Expected a question about the record {text!r}, got {question!r}.")
    return story


def check(context: str, completion: str) -> bool:
    """Says whether `completion` is right for the agent whose tag line ends `context`.

    Right is what the record and the question say, whatever the turns in between claim: an agent
    that works faithfully from an earlier agent's mistake is still wrong.
    """
    agent = context.removesuffix("\n").rpartition("### ")[2]
    if agent not in AGENTS:
        raise ValueError(
            f"Expected a context that ends with the tag line of one of {', '.join(AGENTS)}, got "
            f"one that ends with {context[-40:]!r}: append tag(agent)."
        )
    return completion.rstrip(STOP) == read_story(context).completion(agent).rstrip(STOP)


def write_examples(directory: Path, split: Split, count: int, seed: int) -> None:
    """Writes `{agent}.{split}.jsonl` for every agent: `count` lines {"prompt", "completion"}.

    Line i of every file is the same story, at that agent's turn.
    """
    endless = stories(seed, split)
    chosen = list(track(islice(endless, count), f"{split + ' stories':20}", total=count))
    for agent in AGENTS:
        with (directory / f"{agent}.{split}.jsonl").open("w", encoding="utf-8") as file:
            for story in chosen:
                file.write(json.dumps(asdict(story.example(agent))) + "\n")
