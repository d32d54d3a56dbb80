"""Who runs in the next step, on which pages.

Plain Python over token ids and page numbers. Every page is in one place: free, private to one
running sequence, or in the prefix tree, where running sequences may lock it. A plan is made before
the results of the plan before it are known: the device does things in the order of the plans, so a
page may be found, or given to somebody else, as soon as the launch that writes it has been planned.
"""

import bisect
import collections
import dataclasses
import itertools
from collections.abc import Iterable

from jaxcodec.serve.adapters import AdapterSlots
from jaxcodec.serve.host_pages import HostNames
from jaxcodec.serve.pages import PagePool
from jaxcodec.serve.plan import NO_ROW, PageCounts, Plan, Prefill, Sequence
from jaxcodec.serve.prefix_tree import Node, PrefixTree

# How far a request with a longer known prefix may jump the queue, and how often one may be jumped
# over: large enough to let turns of the same conversations meet their pages, small enough that
# whoever is first waits for that many admissions at most.
WINDOW = 32


class Scheduler:
    """Continuous batching under a token budget, over one page pool and one prefix tree.

    Args:
      pages: pages of the cache.
      page_size: tokens in a page.
      max_batch: most sequences that run at once.
      step_tokens: most tokens computed in one step: one for each sequence that decodes, the rest
        for prompts. A longer prompt takes several steps.
      decode_steps: most tokens a sequence that one plan adds, when nothing waits.
      adapters: where adapters are.
      host_pages: most pages that are kept in host memory when the prefix tree gives them up.
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        max_batch: int,
        step_tokens: int,
        decode_steps: int = 1,
        adapters: AdapterSlots | None = None,
        host_pages: int = 0,
    ):
        sizes = {"max_batch": max_batch, "decode_steps": decode_steps, "page_size": page_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        if step_tokens < max_batch + 2:  # a token of a prompt, and one that follows it
            raise ValueError(
                f"step_tokens = {step_tokens} leaves no room for prompts beside max_batch = "
                f"{max_batch} sequences that decode; make it larger."
            )
        self.page_size = page_size
        self.max_batch = max_batch
        self.step_tokens = step_tokens
        self.decode_steps = decode_steps
        self.adapters = adapters or AdapterSlots(2)
        self.pool = PagePool(pages)
        self.tree = PrefixTree()
        self.host = HostNames(host_pages)
        self.waiting: list[Sequence] = []  # by `order`
        self.running: list[Sequence] = []  # in order of admission
        self.preempted: collections.Counter[str] = collections.Counter()  # by model
        self.evictions = 0
        self.peak = 0
        self._rows = list(range(max_batch - 1, -1, -1))
        self._numbers = itertools.count()
        # Each priority is a queue of its own: fair among its models, whatever the others hold.
        self._virtual: dict[int, float] = collections.defaultdict(float)
        self._shares: dict[tuple[int, str], float] = collections.defaultdict(float)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence: behind those of its own model, fairly among those of other models.

        Start-time fair queueing (Goyal, Vin, Cheng 1996): each sequence starts, in a time that
        counts tokens, when the one before it of the same model would have come to its limit, or at
        the present if that is later.
        """
        if sequence.limit > self.pool.total * self.page_size + 1:
            raise ValueError(
                f"{self.pool.total} pages of {self.page_size} hold no {sequence.limit} tokens."
            )
        if not self.waiting and not self.running:  # nobody is owed anything
            self._virtual.clear()
            self._shares.clear()
        share = sequence.priority, sequence.model
        start = max(self._virtual[sequence.priority], self._shares[share])
        self._shares[share] = start + sequence.limit
        sequence.order = (sequence.priority, start, next(self._numbers))
        self._enqueue(sequence)

    def plan(self, settled: bool = True) -> Plan | None:
        """Decide the next step; every sequence in it has the pages that it will write.

        Args:
          settled: the results of all plans are known.

        Returns:
          None if not settled, and somebody has to be pushed out: first tell the results, which may
          make that unnecessary.
        """
        preempted, admitted, loads, prefills = [], [], [], []
        steps = 0
        if self._yield_to_priority(settled, preempted):
            steps = self._grow(settled, preempted)
        if not steps:
            return None
        # A token for each that decodes, one more for each whose prompt may be done in this step.
        budget = self.step_tokens - sum(s.to_decode > 0 for s in self.running)
        behind = sum(s.to_prefill > 0 for s in self.running)
        for sequence in self.running:
            if sequence.to_prefill and budget > 1:
                behind -= 1
                budget -= 1 + self._prefill(sequence, self._chunk(budget - 1, behind), prefills)
        # Whoever was just pushed out must not take the freed pages back in the same breath.
        while not preempted and budget > 1 and (sequence := self._admit(loads)):
            admitted.append(sequence)
            budget -= 1 + self._prefill(sequence, self._chunk(budget - 1, 0), prefills)
        for sequence in (
            self.running if budget > 1 else ()
        ):  # what was left for others, who took less
            budget -= self._prefill(sequence, budget, prefills)
        decodes = [(s, min(steps, s.to_decode)) for s in self.running if s.to_decode > 0]
        for sequence, count in decodes:
            sequence.pending += count
        self.peak = max(self.peak, self.pool.total - self.pool.free)
        return Plan(preempted, admitted, self.host.copies(), loads, prefills, decodes)

    @property
    def preemptions(self) -> int:
        """Times that a sequence was pushed out."""
        return self.preempted.total()

    def decoded(self, sequence: Sequence, count: int, planned: int) -> None:
        """Tell that a running sequence has grown by `count` tokens, which follow its others now.

        Args:
          planned: as the plan said; `count` is less only if the sequence ends here.
        """
        sequence.cached += count
        sequence.pending -= planned

    def remove(self, sequence: Sequence, share: bool = True) -> None:
        """Take a sequence out, wherever it is; all its pages become free or findable.

        Those of its model that wait move up by what it has not used of its share.

        Args:
          share: leave its full pages in the prefix tree; False for contents not to be trusted.
        """
        if sequence.node is None:
            del self.waiting[self._place_of(sequence)]
        self._refund(sequence)
        if sequence.node is None:
            return
        if share:
            self._share(sequence)
        node = sequence.node
        self._release(sequence)
        if not share:
            self.pool.give_back(self.tree.forget(node))

    def restart(self, sequences: Iterable[Sequence]) -> None:
        """Forget everything but these sequences, which wait at their old places then.

        For when contents of pages are lost: all that was computed is computed again.
        """
        self.pool, self.tree = PagePool(self.pool.total), PrefixTree()
        self.host.clear()
        self.adapters.clear()
        self.running, self._rows = [], list(range(self.max_batch - 1, -1, -1))
        self.waiting = sorted(sequences, key=lambda s: s.order)
        for sequence in self.waiting:
            sequence.node, sequence.row, sequence.pages = None, NO_ROW, []
            sequence.cached = sequence.pending = 0

    def counts(self) -> PageCounts:
        """Pages by state, now."""
        private = sum(len(s.pages) - s.node.depth for s in self.running if s.node is not None)
        held = private + self.tree.locked
        return PageCounts(
            self.pool.total,
            self.pool.free,
            held,
            self.tree.evictable,
            max(self.peak, held),
            len(self.host),
        )

    def check_idle(self) -> None:
        """Verify that nothing is held when nothing runs or waits; takes no time to speak of.

        Raises:
          AssertionError: a page, row or slot has leaked: a fault of ours.
        """
        assert len(self.running) + len(self.waiting) == 0, "not idle"
        assert self.tree.locked == 0, f"{self.tree.locked} pages are locked by nobody"
        assert self.pool.free + len(self.tree) == self.pool.total, "a page has leaked"
        assert len(self._rows) == self.max_batch, "a row has leaked"
        assert self.adapters.users == 0, "an adapter's slot has leaked"

    def check(self) -> None:
        """Verify that every page is in exactly one place.

        Raises:
          AssertionError: one is lost, or in two places: a fault of ours.
        """
        self.tree.check()
        private = []
        for s in self.running:
            assert s.node is not None
            assert s.pages[: s.node.depth] == s.node.pages(), f"{s.id} reads pages not its own"
            private += s.pages[s.node.depth :]
        taken = self.tree.pages() + private
        assert len(set(taken)) == len(taken), "a page is in two places"
        assert self.pool.free + len(taken) == self.pool.total, "a page is lost"
        counts = self.counts()
        assert counts.free + counts.held + counts.cached == counts.total
        rows = [*self._rows, *(s.row for s in self.running)]
        assert sorted(rows) == list(range(self.max_batch)), "a row is lost"
        assert self.adapters.users == sum(s.adapter is not None for s in self.running)
        assert [s.order for s in self.waiting] == sorted(s.order for s in self.waiting)

    # Who goes on

    def _yield_to_priority(self, settled: bool, preempted: list[Sequence]) -> bool:
        """Push the last of the least urgent out, if a more urgent one waits and has no room."""
        if not self.waiting or not self.running:
            return True
        head, victim = self.waiting[0], self._victim()
        if head.priority >= victim.priority:
            return True
        node = self.tree.match(head.names, self._findable(head))
        own = self._pages_wanted(head) - node.depth
        known = sum(n.locks == 0 for n in node.path())
        room = self.pool.free + self.tree.evictable - known >= own
        if self._rows and room and self.adapters.can_acquire(head.adapter):
            return True
        # Pushing out all that are less urgent must be enough, or it is for nothing.
        stay = [s for s in self.running if s.priority <= head.priority]
        kept = {*node.pages(), *(page for s in stay for page in s.pages)}
        users = {s.adapter for s in stay}
        if self.pool.total - len(kept) < own or not self.adapters.could_acquire(
            head.adapter, users
        ):
            return True
        if settled:
            preempted.append(self._preempt(victim))
        return settled

    def _grow(self, settled: bool, preempted: list[Sequence]) -> int:
        """Give sequences that decode the pages for it; returns the tokens to add to each.

        Whoever finds no pages has the least urgent one pushed out, itself perhaps. Returns 0 where
        that would have to happen, but is not settled.
        """
        idle = not self.waiting and not any(s.to_prefill or s.needs_host for s in self.running)
        steps = self.decode_steps if idle else 1
        if steps > 1:
            short = sum(self._short_of(s, steps) for s in self.running)
            if short > self.pool.free + self.tree.evictable:
                steps = 1
        for sequence in list(self.running):
            while sequence.node and (short := self._short_of(sequence, steps)):
                if self._make_room(short):
                    sequence.pages += self.pool.take(short)
                    sequence.moved = True
                elif settled:
                    preempted.append(self._preempt(self._victim()))
                else:
                    return 0
        return steps

    def _short_of(self, sequence: Sequence, steps: int) -> int:
        """Pages that it lacks to add so many tokens."""
        count = min(steps, sequence.to_decode)
        if count <= 0:
            return 0
        end = sequence.cached + sequence.pending + count
        return max(0, self._pages_for(end) - len(sequence.pages))

    def _victim(self) -> Sequence:
        """Who is pushed out first: the last admitted of the least urgent."""
        return max(reversed(self.running), key=lambda s: s.priority)

    def _chunk(self, budget: int, behind: int) -> int:
        """Most tokens of one prompt, of `budget` left: half of it where others want some too.

        So a long prompt delays the first tokens of short ones by steps, not by its own length.
        """
        return -(-budget // 2) if behind or (self.waiting and self._rows) else budget

    def _prefill(self, sequence: Sequence, budget: int, prefills: list[Prefill]) -> int:
        """Plan a chunk of a sequence that is not wholly cached; returns its tokens.

        Its full pages can be found from now on.
        """
        start, end = sequence.cached, len(sequence.tokens) - 1
        boundary = sequence.prompt_length - 1
        by_prompt_writer = start < boundary
        if by_prompt_writer:
            end = min(end, boundary)
        count = min(end - start, budget)
        if count > 0:
            chunk = Prefill(sequence, start, count, by_prompt_writer)
            before = next((i for i, p in enumerate(prefills) if chunk.follows(p)), None)
            if before is None:
                prefills.append(chunk)
            else:  # nobody between them can have read what is only planned now
                first = prefills[before]
                prefills[before] = dataclasses.replace(first, count=first.count + count)
            sequence.cached += count
            self._share(sequence)
        return count

    # Who comes in

    def _admit(self, loads: list[tuple[str, int]]) -> Sequence | None:
        """Start a sequence that waits, if a row, a slot and pages are free for it."""
        if not self.waiting or not self._rows:
            return None
        candidates = self._candidates()
        overdue = [c for c in candidates if c[0].overtaken >= WINDOW][:1]
        ready = [c for c in overdue or candidates if self.adapters.can_acquire(c[0].adapter)]
        if not ready:
            return None
        sequence, node = max(ready, key=lambda c: c[1].depth)  # the first of the longest
        self.tree.lock(node)
        if not self._make_room(self._pages_wanted(sequence) - node.depth):
            self.tree.unlock(node)
            return None
        for overtaken, _ in itertools.takewhile(lambda c: c[0] is not sequence, candidates):
            overtaken.overtaken += 1
        del self.waiting[self._place_of(sequence)]
        self._start(sequence, node, loads)
        return sequence

    def _candidates(self) -> list[tuple[Sequence, Node]]:
        """Who may be next, in order, each with the page to which its prefix is known.

        Left out are those whose next page a running sequence is about to compute: it is computed
        once, and found.
        """
        coming = {
            s.names[s.node.depth]
            for s in self.running
            if s.to_prefill and s.node and s.node.depth < self._findable(s)
        }
        found = []
        for s in itertools.islice(self.waiting, WINDOW):
            if s.priority != self.waiting[0].priority:
                break
            most = self._findable(s)
            node = self.tree.match(s.names, most)
            if node.depth == most or s.names[node.depth] not in coming:
                found.append((s, node))
        return found

    def _start(self, sequence: Sequence, node: Node, loads: list[tuple[str, int]]) -> None:
        # What is only scored never writes its last token, and has no limit beyond it.
        own = self._pages_for(min(len(sequence.tokens), sequence.limit - 1)) - node.depth
        sequence.node = node
        sequence.pages, sequence.moved = node.pages() + self.pool.take(own), True
        known = self._restore(sequence, node.depth)
        sequence.cached = sequence.found = known * self.page_size
        self._share(sequence)
        if sequence.reused is None:
            sequence.reused = sequence.found
        sequence.row = self._rows.pop()
        sequence.slot, is_new = self.adapters.acquire(sequence.adapter)
        if is_new and sequence.adapter is not None:
            loads.append((sequence.adapter, sequence.slot))
        priority, start, _ = sequence.order
        self._virtual[priority] = max(self._virtual[priority], start)
        self.running.append(sequence)

    def _restore(self, sequence: Sequence, known: int) -> int:
        """Bring back pages that follow the `known` first and are in host memory.

        Returns:
          how many are known then.
        """
        most = self._findable(sequence)
        while known < most and (name := sequence.names[known]) in self.host:
            self.host.restore(name, sequence.pages[known])
            known += 1
        return known

    def _findable(self, sequence: Sequence) -> int:
        """Full pages of a sequence that may be in the tree and of use to it."""
        return min(sequence.shareable, len(sequence.tokens) - 1) // self.page_size

    def _pages_wanted(self, sequence: Sequence) -> int:
        """Pages to start with, of which the tree may have some: those of its tokens and one more,
        lest the next step push it out again."""
        length = len(sequence.tokens)
        return self._pages_for(min(length + self.page_size, sequence.limit - 1))

    # Pages

    def _make_room(self, count: int) -> bool:
        """Have `count` free pages, if evicting cached ones can do it; else evict none."""
        short = count - self.pool.free
        if short > self.tree.evictable:
            return False
        if short > 0:
            for node in self.tree.evict(short):
                self.host.keep(node.name, node.page)
                self.pool.give_back([node.page])
            self.evictions += short
        return True

    def _preempt(self, sequence: Sequence) -> Sequence:
        """Push a sequence out, to its old place in the queue; it computes its pages again, where
        the prefix tree has lost them."""
        assert sequence.pending == 0, "who is pushed out must be settled"
        self._share(sequence)
        self._release(sequence)
        self._enqueue(sequence)
        self.preempted[sequence.model] += 1
        return sequence

    def _share(self, sequence: Sequence) -> None:
        """Hand the full pages of a running sequence to the tree; it keeps using them."""
        old = sequence.node
        assert old is not None
        full = min(sequence.cached, sequence.shareable) // self.page_size
        if full <= old.depth:
            return
        node, duplicates = self.tree.insert(
            old, sequence.names.upto(full)[old.depth : full], sequence.pages[old.depth : full]
        )
        self.tree.relock(old, node)
        sequence.node = node
        if duplicates:
            sequence.pages[:full], sequence.moved = node.pages(), True
            self.pool.give_back(duplicates)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.node is not None
        self.pool.give_back(sequence.pages[sequence.node.depth :])
        self.tree.unlock(sequence.node)
        self.adapters.release(sequence.adapter)
        self._rows.append(sequence.row)
        self.running.remove(sequence)
        sequence.node, sequence.row, sequence.pages = None, NO_ROW, []
        sequence.cached = sequence.pending = 0

    def _refund(self, sequence: Sequence) -> None:
        """Give back what a sequence that ends here was charged for and has not used."""
        used = 0 if sequence.reused is None else len(sequence.tokens)
        unused = sequence.limit - used
        if unused <= 0:
            return
        self._shares[sequence.priority, sequence.model] -= unused
        behind = [
            s
            for s in self.waiting
            if (s.priority, s.model) == (sequence.priority, sequence.model)
            and s.order > sequence.order
        ]
        for s in behind:
            priority, start, number = s.order
            s.order = priority, start - unused, number
        if behind:
            self.waiting.sort(key=lambda s: s.order)

    def _enqueue(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    def _place_of(self, sequence: Sequence) -> int:
        return bisect.bisect_left(self.waiting, sequence.order, key=lambda s: s.order)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
