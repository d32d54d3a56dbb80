"""Plain-text exercises that teach a base model the world of the agents, not their trade.

Each document trains one skill that the agents' turns are made of: looking facts up in a record,
small sums and products, copying rows from one notation into another, sequences that repeat. The
records and questions are those of `tasks` (its training split alone); the answers come in many
notations, none of them an agent's, and no document holds a tag line. So the base writes keys and
values from which an adapter can read the answers, and yet answers no agent's turn by itself.
"""

import json
import random
from collections.abc import Callable, Iterator

from jaxcodec.demo.records import ITEMS, MAX_FACTOR, MAX_QUANTITY, NAMES, PLACES, Entry, Record
from jaxcodec.demo.tasks import Story, enumerate_words, make_story, stories

# Between the fields of a row and between rows. An agent writes "Anna lamps 7; Clara lamps 9":
# spaces alone within a row and "; " between two never meet here.
FIELD_MARKS = (", ", " | ", ": ", " - ", " / ", " = ", " -> ", " & ", ",", "=", ":")
ROW_MARKS = ("\n", "\n", " and ", " + ", ", then ", " // ")

Notation = Callable[[Entry], str]


def make_notation(rng: random.Random) -> Notation:
    """Returns a random way to write an entry, to be kept throughout a list of them."""
    json_keys = rng.choice((("name", "item", "count"), ("for", "goods", "n"), ("to", "of", "qty")))
    order, marks = rng.sample(range(3), 3), [rng.choice(FIELD_MARKS), rng.choice(FIELD_MARKS)]

    def as_json(entry: Entry) -> str:
        return json.dumps(dict(zip(json_keys, _fields(entry), strict=True)))

    def as_row(entry: Entry) -> str:
        first, second, third = (str(_fields(entry)[place]) for place in order)
        return first + marks[0] + second + marks[1] + third

    def as_sentence(entry: Entry) -> str:
        return f"{entry.name} gets {entry.quantity} {entry.item}"

    return rng.choice((as_json, as_row, as_row, as_row, as_sentence))


def _fields(entry: Entry) -> tuple[str, str, int]:
    return entry.name, entry.item, entry.quantity


def make_exercise(rng: random.Random, story: Story) -> str:
    """Returns one document; half of them are about the record of `story`."""
    (write,) = rng.choices(
        (_lookups, _questions, _arithmetic, _conversion, _repetition), weights=(3, 5, 3, 3, 2)
    )
    return write(rng, story)


def _lookups(rng: random.Random, story: Story) -> str:
    """The record, its entries in one notation, and a few entries asked for singly."""
    record, notation = story.record, make_notation(rng)
    listed = rng.sample(record.entries, rng.randint(3, len(record.entries)))
    queries = [_lookup(rng, record) for _ in range(rng.randint(3, 6))]
    return "\n".join([record.text, rng.choice(ROW_MARKS).join(map(notation, listed)), *queries])


def _lookup(rng: random.Random, record: Record) -> str:
    entry = rng.choice(record.entries)
    buyers = [e.name for e in record.entries if e.item == entry.item]
    goods = [e.item for e in record.entries if e.name == entry.name]
    return rng.choice(
        (
            f"Q: How many {entry.item} for {entry.name}? A: {entry.quantity}",
            f"How many {entry.item} go to {entry.name}? {entry.quantity} {entry.item}.",
            f"{entry.name} has {entry.quantity} {entry.item}.",
            f"Q: Who gets {entry.item}? A: {enumerate_words(buyers)}",
            f"Q: What does {entry.name} get? A: {enumerate_words(goods)}",
            f"Q: What is the price of {record.priced_item}? A: {record.price} coins",
        )
    )


def _questions(rng: random.Random, story: Story) -> str:
    """The record and several questions, each answered in the same way."""
    answer = rng.choice((_answer_in_words, _answer_by_steps, _answer_with_rows, _answer_in_json))
    notation = make_notation(rng)
    asked = [story, *(make_story(rng, story.record) for _ in range(rng.randint(2, 4)))]
    lines = [f"Question: {each.question}\n{answer(each, notation)}" for each in asked]
    return "\n".join([story.record.text, *lines])


def _sum(story: Story) -> str:
    terms = [entry.quantity for entry in story.entries]
    if story.costs:
        return f"{terms[0]} * {story.record.price} = {story.total}"
    return _chain(terms)


def _chain(terms: list[int]) -> str:
    """Writes a sum with its subtotals: "7 + 5 + 9 = 12 + 9 = 21"."""
    first, second, *rest = terms
    head = [f"{first + second} + {rest[0]}"] if rest else []
    return " = ".join([" + ".join(map(str, terms)), *head, str(sum(terms))])


def _answer_in_words(story: Story, notation: Notation) -> str:
    unit = "coins" if story.costs else enumerate_words(story.items)
    return f"{_sum(story)}, so {enumerate_words(story.names)}: {story.total} {unit}."


def _answer_by_steps(story: Story, notation: Notation) -> str:
    return f"Answer: {_sum(story)}."


def _answer_with_rows(story: Story, notation: Notation) -> str:
    rows = " and ".join(map(notation, story.entries))
    price = f", {story.record.price} coins each" if story.costs else ""
    return f"Facts: {rows}{price}\nAnswer: {_sum(story)}"


def _answer_in_json(story: Story, notation: Notation) -> str:
    answer = {
        "answer": story.total,
        "of": enumerate_words(story.items),
        "for": enumerate_words(story.names),
    }
    return f"{_sum(story)}\n{json.dumps(answer)}"


def _arithmetic(rng: random.Random, story: Story) -> str:
    lines = []
    for _ in range(rng.randint(10, 20)):
        kind = rng.choice(("product", "pair", "subtotal", "chain"))
        a, b, c = (rng.randint(2, MAX_QUANTITY) for _ in range(3))
        if kind == "product":
            a, b = rng.randint(2, MAX_FACTOR), rng.randint(2, MAX_FACTOR)
            lines.append(f"{a} * {b} = {a * b}")
        elif kind == "chain":
            lines.append(_chain([a, b, c]))
        else:
            first = a if kind == "pair" else a + b
            lines.append(f"{first} + {c} = {first + c}")
    return "\n".join(lines)


def _random_entries(rng: random.Random, count: int) -> list[Entry]:
    return [
        Entry(rng.choice(NAMES), rng.choice(ITEMS), rng.randint(2, MAX_QUANTITY))
        for _ in range(count)
    ]


def _conversion(rng: random.Random, story: Story) -> str:
    """A list in one notation, then some of it, in another order, in another notation."""
    entries = _random_entries(rng, rng.randint(3, 6))
    chosen = rng.sample(entries, rng.randint(2, len(entries)))
    before, after = make_notation(rng), make_notation(rng)
    return "\n".join([*map(before, entries), "", *map(after, chosen)])


def _repetition(rng: random.Random, story: Story) -> str:
    """A random sequence of words and numbers, written two or three times."""
    pool = NAMES + ITEMS + PLACES + tuple(map(str, range(100)))
    line = " ".join(rng.choices(pool, k=rng.randint(6, 16)))
    return "\n".join([line] * rng.randint(2, 3))


def exercises(seed: int) -> Iterator[str]:
    """Yields endless exercises; the same seed gives the same ones."""
    rng = random.Random(f"exercises {seed}")
    for story in stories(seed, "train"):
        yield make_exercise(rng, story)
