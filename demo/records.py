"""Orders in plain sentences, the small world that the demo's agents read about.

A record is one line of text such as

    Order 17, Friday: Anna ordered 7 lamps and 12 ropes. The lamps cost 4 coins each. ...

`make_record` writes one from random facts and `read_record` recovers the facts from the text, so
the text alone is enough to check any answer about it.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]

# Common words: after a few thousand records each is a single token of a 4096-token vocabulary.
NAMES = tuple(
    "Anna Bruno Clara David Emma Felix Grace Henry Iris Jacob Karen Louis Maria Nora Oscar Paula "
    "Robert Sara Tom Ulla Victor Wanda Xavier Yara".split()
)
ITEMS = tuple(
    "apples bags bells books bottles bowls boxes candles chairs clocks coats cups drums hats jars "
    "keys lamps maps nails pens plates ropes shoes spoons".split()
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PLACES = ("bridge", "farm", "harbor", "market", "mill", "school", "station", "tower")

# A model of a few million parameters can learn by heart all sums and products up to these.
MAX_QUANTITY = 20
MAX_FACTOR = 9

# One record in sixteen, picked by a hash of its facts, is held out of all training.
HELDOUT_PERIOD = 16

ORDERS = (
    "{name} ordered {a} and {b}.",
    "{name} asked for {a}, and later for {b}.",
    "{name} wants {a} and also {b}.",
    "We packed {a} and {b} for {name}.",
    "The cart brings {name} {a} with {b}.",
    "There are {a} and {b} for {name}.",
)
PRICES = (
    "The {item} cost {price} coins each.",
    "We sell {item} at {price} coins apiece.",
    "The price of {item} is {price} coins.",
)
DISTRACTORS = (
    "The road to the {place} is wet.",
    "{name} drives the cart to the {place}.",
    "The cart leaves the {place} at {number}.",
    "{name} was at the {place} on {day}.",
    "The {place} stays closed until {day}.",
    "It is {number} miles to the {place}.",
)


@dataclass(frozen=True)
class Entry:
    """`quantity` pieces of `item` for the person `name`."""

    name: str
    item: str
    quantity: int


@dataclass(frozen=True)
class Record:
    """The text of an order, and the facts that the text states, in its order."""

    text: str
    entries: tuple[Entry, ...]
    priced_item: str
    price: int

    @property
    def names(self) -> tuple[str, ...]:
        """The people who get something."""
        return tuple(dict.fromkeys(entry.name for entry in self.entries))

    @property
    def items(self) -> tuple[str, ...]:
        """The goods that somebody gets."""
        return tuple(dict.fromkeys(entry.item for entry in self.entries))

    @property
    def split(self) -> Split:
        """The side on which these facts lie, however they are phrased."""
        facts = sorted((entry.name, entry.item, entry.quantity) for entry in self.entries)
        digest = hashlib.sha256(repr((facts, self.priced_item, self.price)).encode()).digest()
        held_out = int.from_bytes(digest[:4], "big") % HELDOUT_PERIOD == 0
        return "heldout" if held_out else "train"

    def of(self, name: str, item: str) -> Entry | None:
        """Returns the entry of this person and item, None if there is none."""
        found = (entry for entry in self.entries if (entry.name, entry.item) == (name, item))
        return next(found, None)


def make_record(rng: random.Random) -> Record:
    """Returns a random order: three people with two of three items each, and one item's price.

    All three people share one of the items, so that a question can sum two or three quantities.
    """
    common, *others = rng.sample(ITEMS, 3)
    baskets = {name: rng.sample([common, rng.choice(others)], 2) for name in rng.sample(NAMES, 3)}
    priced_item = rng.choice([item for basket in baskets.values() for item in basket])
    price = rng.randint(2, MAX_FACTOR)
    entries: list[Entry] = []
    sentences = [rng.choice(PRICES).format(item=priced_item, price=price)]
    for name, basket in baskets.items():
        limits = [MAX_FACTOR if item == priced_item else MAX_QUANTITY for item in basket]
        quantities = [rng.randint(2, limit) for limit in limits]
        entries += [Entry(name, *pair) for pair in zip(basket, quantities, strict=True)]
        a, b = (f"{entry.quantity} {entry.item}" for entry in entries[-2:])
        sentences.append(rng.choice(ORDERS).format(name=name, a=a, b=b))
    sentences += [_distractor(rng) for _ in range(rng.randint(1, 2))]
    rng.shuffle(sentences)
    heading = f"Order {rng.randint(1, 99)}, {rng.choice(DAYS)}:"
    return read_record(" ".join([heading, *sentences]))


def _distractor(rng: random.Random) -> str:
    return rng.choice(DISTRACTORS).format(
        name=rng.choice(NAMES),
        place=rng.choice(PLACES),
        day=rng.choice(DAYS),
        number=rng.randint(2, 12),
    )


def read_record(text: str) -> Record:
    """Recovers the facts from the text of a record; ValueError if it does not state them all."""
    entries: list[Entry] = []
    prices: list[tuple[str, int]] = []
    for sentence in re.split(r"[.:]", text):
        amounts = re.findall(r"(\d+) (\w+)", sentence)
        names, items = words_of(NAMES, sentence), words_of(ITEMS, sentence)
        prices += [(items[0], int(n)) for n, unit in amounts if unit == "coins" and items]
        entries += [Entry(names[0], unit, int(n)) for n, unit in amounts if unit in ITEMS and names]
    if not entries or len(prices) != 1:
        raise ValueError(
            f"Expected a record with its entries and one price, got {text!r}: pass the one line "
            "that make_record writes."
        )
    return Record(text, tuple(entries), *prices[0])


def words_of(vocabulary: tuple[str, ...], text: str) -> tuple[str, ...]:
    """Returns the words of `vocabulary` in `text`, in the text's order."""
    return tuple(word for word in re.findall(r"\w+", text) if word in vocabulary)
