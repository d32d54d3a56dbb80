"""A device for tests of the scheduler: it remembers, of every position of every page, what it is.

Whoever reads a position gets what its own text would have put there, or the test fails. Tokens are
a function of the text, so that an answer is right or wrong whatever happened on the way.
"""

import hashlib

from jaxcodec.serve.host_pages import Copies
from jaxcodec.serve.plan import NO_ROW, Plan, Prefill, Sequence
from jaxcodec.serve.prefix_tree import PageNames
from jaxcodec.serve.scheduler import Scheduler

STOP = 0  # the token that ends a response
STOPPING = "stopping"  # the model that gives it


def sequence(
    id: str,
    prompt: list[int],
    new: int = 8,
    *,
    namespace: str = "base",
    shares: bool = True,
    page_size: int = 4,
    **options,
) -> Sequence:
    """A sequence for `new` tokens more than its prompt; its id begins with its namespace."""
    tokens = list(prompt)
    names = PageNames(namespace, tokens, page_size)
    options = {"model": namespace} | options
    return Sequence(
        (f"{namespace}/{id}", 0),
        tokens=tokens,
        prompt_length=len(prompt),
        limit=len(prompt) + new,
        names=names,
        shares_response=shares,
        **options,
    )


def next_token(s: Sequence, text: list[int]) -> int:
    """What the weights of a sequence say after a text."""
    digest = hashlib.sha256(repr((s.model, s.adapter, text)).encode()).digest()
    return digest[0] % 4 if s.model == STOPPING else 1 + digest[0] % 3


def answer(s: Sequence) -> list[int]:
    """Prompt and response of a sequence that runs alone."""
    text = s.tokens[: s.prompt_length]
    while len(text) < s.limit and (len(text) == s.prompt_length or text[-1] != STOP):
        text.append(next_token(s, text))
    return text


class PlainDevice:
    """Runs plans, as the engine does, and tells their results one step late."""

    def __init__(self, scheduler: Scheduler, trusts: bool = False):
        self.scheduler = scheduler
        self.trusts = trusts  # does not look at what is read
        self.slots: dict[int, str] = {}
        self.flying: list[tuple[Sequence, list[int], int]] = []
        self.ended: list[Sequence] = []
        self._contents: dict[tuple[int, int], tuple | None] = {}
        self._host: dict[bytes, list[tuple | None]] = {}
        self._texts: dict[int, list[int]] = {}  # by row: what the device knows

    def step(self) -> Plan:
        """Plan, run, and tell what the step before made; returns the plan."""
        plan = self.scheduler.plan(settled=not self.flying)
        if plan is None:
            self.collect()
            plan = self.scheduler.plan()
        assert plan is not None
        flying = self._run(plan)
        self.collect()
        self.flying = flying
        return plan

    def forget(self) -> None:
        """Lose all that was computed, as in a fault; what is on its way is lost too."""
        self.flying = []
        for memory in (self.slots, self._contents, self._host, self._texts):
            memory.clear()

    def collect(self) -> None:
        """Tell the results that are on their way; responses that are complete end."""
        flying, self.flying = self.flying, []
        for s, tokens, planned in flying:
            if s.row == NO_ROW:
                continue
            s.tokens += tokens
            self.scheduler.decoded(s, len(tokens), planned)
            if len(s.tokens) == s.limit or s.tokens[-1] == STOP:
                assert s.tokens == answer(s), s.id
                self.scheduler.remove(s)
                self.ended.append(s)

    def _run(self, plan: Plan) -> list[tuple[Sequence, list[int], int]]:
        self._copy(plan.copies)
        for key, slot in plan.loads:
            assert self._free_slot(slot, key), "a slot in use was overwritten"
            self.slots[slot] = key
        for s in plan.admitted:
            self._texts[s.row] = list(s.tokens)
        for chunk in plan.prefills:
            self._prefill(chunk)
        return [(s, self._decode(s, count), count) for s, count in plan.decodes]

    def _copy(self, copies: Copies) -> None:
        size = self.scheduler.page_size
        for name, page in copies.offloads:
            self._host[name] = [self._contents.get((page, i)) for i in range(size)]
        for name, page in copies.restores:
            self._contents |= {(page, i): what for i, what in enumerate(self._host[name])}
        for name in copies.dropped:
            self._host.pop(name, None)
        assert len(self._host) <= self.scheduler.host.limit

    def _free_slot(self, slot: int, key: str) -> bool:
        users = [s for s in self.scheduler.running if s.adapter and s.slot == slot]
        return all(s.adapter == key for s in users)

    def _prefill(self, chunk: Prefill) -> None:
        s, end = chunk.sequence, chunk.start + chunk.count
        boundary = s.prompt_length - 1
        assert chunk.count > 0
        assert chunk.by_prompt_writer == (chunk.start < boundary)
        assert not chunk.by_prompt_writer or end <= boundary
        for position in range(chunk.start, end):
            self._write(s, s.tokens, position)

    def _decode(self, s: Sequence, count: int) -> list[int]:
        assert s.adapter is None or self.slots[s.slot] == s.adapter
        text, made = self._texts[s.row], []
        while len(made) < count and not (len(text) > s.prompt_length and text[-1] == STOP):
            self._write(s, text, len(text) - 1)
            made.append(next_token(s, text))
            text.append(made[-1])
        return made

    def _write(self, s: Sequence, text: list[int], position: int) -> None:
        for earlier in range(0 if self.trusts else position):
            read = self._contents.get(self._place(s, earlier))
            assert read == self._expected(s, text, earlier), (s.id, earlier, position)
        self._contents[self._place(s, position)] = self._expected(s, text, position)

    @staticmethod
    def _expected(s: Sequence, text: list[int], position: int) -> tuple:
        of_prompt = position < s.prompt_length - 1
        namespace, _ = s.id[0].split("/")
        writer = namespace if of_prompt or s.shares_response else f"{s.id} itself"
        return (writer, *text[: position + 1])

    def _place(self, s: Sequence, position: int) -> tuple[int, int]:
        size = self.scheduler.page_size
        return s.pages[position // size], position % size
