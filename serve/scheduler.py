"""Who runs in the next step: first come, first served, as far as rows and pages go.

Plain Python over token ids and page numbers. Between two steps every page is in one place: free,
private to one running sequence, or in the prefix tree, where running sequences may lock it.
"""

import collections
import dataclasses

from jaxcodec.serve.pages import PagePool
from jaxcodec.serve.prefix_tree import Node, PrefixTree


@dataclasses.dataclass(eq=False)
class Sequence:
    """The tokens of one request, and where their keys and values are.

    Attributes:
      id: the request's.
      namespace: of the weights that write its prompt.
      tokens: prompt and response so far.
      prompt_length: how many of them are prompt.
      shares_response: the same namespace also writes the response, so that its pages can be found.
      cached: tokens whose keys and values are in the cache, from the first on.
      pages: pages of the tokens from the first on: those of `node`'s path, then its own.
      node: the deepest page of the prefix tree that it has locked; None while it waits.
      reused: tokens found in the tree when it first started; None before.
    """

    id: str
    namespace: str
    tokens: list[int]
    prompt_length: int
    shares_response: bool
    cached: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    node: Node | None = None
    reused: int | None = None

    @property
    def shareable(self) -> int:
        """Tokens, from the first on, that its namespace writes: all, or the prompt's but the last.

        The prompt's last token is the first that the response's writer sees.
        """
        return len(self.tokens) if self.shares_response else self.prompt_length - 1

    @property
    def to_prefill(self) -> int:
        """Tokens to write before the last one can be decoded."""
        return len(self.tokens) - 1 - self.cached


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step: first the prefills, in order, then one token of each sequence in `decodes`."""

    prefills: list[Prefill]
    decodes: list[Sequence]


@dataclasses.dataclass(frozen=True)
class PageCounts:
    """Pages by state; free + held + cached = total.

    Attributes:
      total: pages of the cache.
      free: pages with nothing in them.
      held: pages that running sequences use, each counted once.
      cached: pages of the prefix tree that nobody uses now.
      peak: most pages that were not free at any time.
    """

    total: int
    free: int
    held: int
    cached: int
    peak: int


class Scheduler:
    """Continuous batching over one page pool and one prefix tree.

    Args:
      pages: pages of the cache.
      page_size: tokens in a page.
      context: most tokens of one sequence; at most what the pages hold.
      max_batch: most sequences that run at once.
      max_prefill_tokens: most tokens prefilled in one step; a longer prompt takes several.
    """

    def __init__(
        self, pages: int, page_size: int, context: int, max_batch: int, max_prefill_tokens: int
    ):
        if context > pages * page_size:
            raise ValueError(f"{pages} pages of {page_size} hold no context of {context} tokens.")
        if min(max_batch, max_prefill_tokens) < 1:
            raise ValueError("max_batch and max_prefill_tokens must be at least 1.")
        self.page_size = page_size
        self.context = context
        self.max_batch = max_batch
        self.max_prefill_tokens = max_prefill_tokens
        self.pool = PagePool(pages)
        self.tree = PrefixTree(page_size)
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.running: list[Sequence] = []  # in order of admission
        self.preemptions = 0
        self.peak = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def plan(self) -> Plan:
        """Decide the next step; every sequence in it has the pages that it will write."""
        # Whoever was just pushed out must not take the freed pages back in the same breath.
        may_admit = not self._grow()
        budget, prefills = self.max_prefill_tokens, []
        for sequence in self.running:
            budget -= self._prefill(sequence, budget, prefills)
        while may_admit and budget > 0 and self._admit():
            budget -= self._prefill(self.running[-1], budget, prefills)
        self.peak = max(self.peak, self.pool.total - self.pool.free)
        planned = {id(p.sequence): p.count for p in prefills}
        decodes = [s for s in self.running if s.to_prefill == planned.get(id(s), 0)]
        return Plan(prefills, decodes)

    def prefilled(self, prefill: Prefill) -> None:
        """Note that a prefill of the plan has been run; a whole prompt becomes findable."""
        sequence = prefill.sequence
        sequence.cached += prefill.count
        if sequence.to_prefill == 0:
            self._share(sequence)

    def decoded(self, sequence: Sequence, token: int) -> None:
        """Note that a sequence's last token has been written, and `token` follows it."""
        sequence.cached += 1
        sequence.tokens.append(token)

    def remove(self, sequence: Sequence, share: bool = True) -> None:
        """Take a sequence out, wherever it is; all its pages become free or findable.

        Args:
          share: leave its full pages in the prefix tree; False for contents not to be trusted.
        """
        if sequence.node is None:
            self.waiting.remove(sequence)
            return
        if share:
            self._share(sequence)
        self._release(sequence)

    def counts(self) -> PageCounts:
        """Pages by state, now."""
        private = sum(len(s.pages) - s.node.depth for s in self.running if s.node is not None)
        held = private + self.tree.locked
        return PageCounts(
            self.pool.total, self.pool.free, held, self.tree.evictable, max(self.peak, held)
        )

    def check(self) -> None:
        """Verify that every page is in exactly one place.

        Raises:
          AssertionError: one is lost, or in two places: a fault of ours.
        """
        self.tree.check()
        shared = self.tree.pages()
        private = []
        for s in self.running:
            assert s.node is not None
            assert s.pages[: s.node.depth] == s.node.pages(), f"{s.id} reads pages not its own"
            private += s.pages[s.node.depth :]
        taken = shared + private
        assert len(set(taken)) == len(taken), "a page is in two places"
        assert self.pool.free + len(taken) == self.pool.total, "a page is lost"
        counts = self.counts()
        assert counts.free + counts.held + counts.cached == counts.total

    def _grow(self) -> bool:
        """Give every running sequence pages for its tokens; True if that pushed others out."""
        before = self.preemptions
        for sequence in list(self.running):
            while sequence.node and len(sequence.pages) < self._pages_for(len(sequence.tokens)):
                if self._make_room(1):
                    sequence.pages += self.pool.take(1)
                else:
                    self._preempt(self.running[-1])
        return self.preemptions > before

    def _admit(self) -> bool:
        """Start the sequence that has waited longest, if a row and pages are free for it."""
        if not self.waiting or len(self.running) == self.max_batch:
            return False
        sequence = self.waiting[0]
        length = len(sequence.tokens)
        findable = min(sequence.shareable, length - 1)
        node = self.tree.match(sequence.namespace, sequence.tokens[:findable])
        self.tree.lock(node)
        # A page more than the tokens need, lest the next step push it out again.
        wanted = self._pages_for(min(length + self.page_size, self.context))
        if not self._make_room(wanted - node.depth):
            self.tree.unlock(node)
            return False
        sequence.node = node
        sequence.pages = node.pages() + self.pool.take(self._pages_for(length) - node.depth)
        sequence.cached = node.depth * self.page_size
        if sequence.reused is None:
            sequence.reused = sequence.cached
        self.running.append(self.waiting.popleft())
        return True

    def _prefill(self, sequence: Sequence, budget: int, prefills: list[Prefill]) -> int:
        """Plan a chunk of a sequence that is not wholly cached; returns its tokens."""
        start, end = sequence.cached, len(sequence.tokens) - 1
        boundary = sequence.prompt_length - 1
        by_prompt_writer = start < boundary
        if by_prompt_writer:
            end = min(end, boundary)
        count = min(end - start, budget)
        if count > 0:
            prefills.append(Prefill(sequence, start, count, by_prompt_writer))
        return count

    def _make_room(self, count: int) -> bool:
        """Have `count` free pages, if evicting cached ones can do it; else evict none."""
        short = count - self.pool.free
        if short > self.tree.evictable:
            return False
        if short > 0:
            self.pool.give_back(self.tree.evict(short))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Push a sequence out, to the front of the queue; it computes its pages again, where the
        prefix tree has lost them."""
        self._share(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _share(self, sequence: Sequence) -> None:
        """Hand the full pages of a running sequence to the tree; it keeps using them."""
        assert sequence.node is not None
        full = min(sequence.cached, sequence.shareable) // self.page_size
        if full <= sequence.node.depth:
            return
        tokens = sequence.tokens[: full * self.page_size]
        node, duplicates = self.tree.insert(sequence.namespace, tokens, sequence.pages[:full])
        self.tree.lock(node)
        self.tree.unlock(sequence.node)
        sequence.node = node
        sequence.pages[:full] = node.pages()
        self.pool.give_back(duplicates)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.node is not None
        self.pool.give_back(sequence.pages[sequence.node.depth :])
        self.tree.unlock(sequence.node)
        self.running.remove(sequence)
        sequence.node, sequence.pages, sequence.cached = None, [], 0

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
