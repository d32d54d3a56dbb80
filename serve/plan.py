"""What the scheduler decides about: sequences, and the plan of a step."""

import dataclasses

from jaxcodec.serve.host_pages import Copies
from jaxcodec.serve.prefix_tree import Node, PageNames

NO_ROW = -1


@dataclasses.dataclass(eq=False)
class Sequence:
    """The tokens of one answer, and where their keys and values are.

    Attributes:
      id: the request's id, and which of its answers this is.
      model: the name that shares of the engine are counted by.
      tokens: prompt and response, as far as it is known.
      prompt_length: how many of them are prompt.
      limit: most tokens that it may come to.
      names: of the pages that its prompt's writer fills.
      shares_response: that writer also writes the response, so that its pages can be found.
      adapter: key of its adapter; None for none.
      priority: lower ones go first.
      needs_host: its next step cannot be planned before all its tokens are known.
      row: its place among the running ones; NO_ROW while it waits.
      slot: of its adapter, while it runs.
      node: the deepest page of the prefix tree that it has locked; None while it waits.
      pages: pages of the tokens from the first on: those of `node`'s path, then its own.
      moved: `pages` has changed; for whoever keeps a copy.
      cached: of the known tokens, those that plans have put into the cache, from the first on.
      pending: tokens that plans will add, and which are not known yet.
      found: tokens found in the tree when it last started.
      reused: the same when it first started; None before.
      order: of waiting: priority, fair share, arrival.
      overtaken: how often a later one was admitted before it though it could have been.
    """

    id: tuple[str, int]
    model: str
    tokens: list[int]
    prompt_length: int
    limit: int
    names: PageNames
    shares_response: bool
    adapter: str | None = None
    priority: int = 0
    needs_host: bool = False
    row: int = NO_ROW
    slot: int = 0
    node: Node | None = None
    pages: list[int] = dataclasses.field(default_factory=list)
    moved: bool = False
    cached: int = 0
    pending: int = 0
    found: int = 0
    reused: int | None = None
    order: tuple[int, float, int] = (0, 0.0, 0)
    overtaken: int = 0

    @property
    def shareable(self) -> int:
        """Tokens, from the first on, that its prompt's writer writes: all, or the prompt's but one.

        The prompt's last token is the first that the response's writer sees.
        """
        return len(self.tokens) if self.shares_response else self.prompt_length - 1

    @property
    def to_prefill(self) -> int:
        """Tokens to write before the last one can be decoded."""
        return len(self.tokens) - 1 - self.cached

    @property
    def to_decode(self) -> int:
        """Most tokens that the next launch may add."""
        if self.cached < len(self.tokens) - 1 or (self.needs_host and self.pending):
            return 0
        return self.limit - len(self.tokens) - self.pending


@dataclasses.dataclass(frozen=True)
class Prefill:
    """`count` tokens of a sequence to write from position `start` on.

    Attributes:
      by_prompt_writer: whether the weights that write the prompt do so, or those that write the
        response (which happens only when a sequence comes back after preemption).
    """

    sequence: Sequence
    start: int
    count: int
    by_prompt_writer: bool

    def follows(self, other: "Prefill") -> bool:
        """Whether the two are one chunk of one sequence."""
        return (
            self.sequence is other.sequence
            and self.start == other.start + other.count
            and self.by_prompt_writer == other.by_prompt_writer
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step, to be run in this order.

    Attributes:
      preempted: sequences that were pushed out, before anything else.
      admitted: sequences that have just been given a row.
      copies: of pages to host memory and back.
      loads: (key, slot) of adapters that must be put into slots.
      prefills: a later one may read what an earlier one writes.
      decodes: (sequence, most tokens to add); each has the pages for them.
    """

    preempted: list[Sequence]
    admitted: list[Sequence]
    copies: Copies
    loads: list[tuple[str, int]]
    prefills: list[Prefill]
    decodes: list[tuple[Sequence, int]]

    @property
    def empty(self) -> bool:
        """Whether nothing is to be launched."""
        return not self.prefills and not self.decodes


@dataclasses.dataclass(frozen=True)
class PageCounts:
    """Pages by state; free + held + cached = total.

    Attributes:
      total: pages of the cache.
      free: pages with nothing in them.
      held: pages that running sequences use, each counted once.
      cached: pages of the prefix tree that nobody uses now.
      peak: most pages that were not free at any time.
      host: further pages, whose contents are in host memory.
    """

    total: int
    free: int
    held: int
    cached: int
    peak: int
    host: int = 0
