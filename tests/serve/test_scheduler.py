"""Whatever the pressure, no page is lost, and every sequence reads what was written for it."""

import random

import pytest

from jaxcodec.serve.scheduler import Plan, Scheduler, Sequence

PAGE = 4


def scheduler(pages: int = 16, max_batch: int = 4, max_prefill_tokens: int = 8) -> Scheduler:
    return Scheduler(pages, PAGE, min(pages * PAGE, 40), max_batch, max_prefill_tokens)


def sequence(id: str, prompt: list[int], namespace: str = "base", shares: bool = True) -> Sequence:
    return Sequence(id, namespace, list(prompt), len(prompt), shares)


class PlainCache:
    """A cache that remembers, of every position, the tokens so far and who wrote it."""

    def __init__(self) -> None:
        self.contents: dict[tuple[int, int], tuple] = {}

    @staticmethod
    def expected(s: Sequence, position: int) -> tuple:
        of_prompt = position < s.prompt_length - 1
        writer = s.namespace if of_prompt or s.shares_response else f"{s.id} itself"
        return (writer, *s.tokens[: position + 1])

    def write(self, s: Sequence, position: int) -> None:
        for earlier in range(position):
            assert self.read(s, earlier) == self.expected(s, earlier), (s.id, earlier, position)
        self.contents[self.place(s, position)] = self.expected(s, position)

    def read(self, s: Sequence, position: int) -> tuple | None:
        return self.contents.get(self.place(s, position))

    @staticmethod
    def place(s: Sequence, position: int) -> tuple[int, int]:
        return s.pages[position // PAGE], position % PAGE


def run(plan: Plan, s: Scheduler, cache: PlainCache, rng: random.Random) -> None:
    for chunk in plan.prefills:
        boundary = chunk.sequence.prompt_length - 1
        assert chunk.by_prompt_writer == (chunk.start < boundary)
        assert not chunk.by_prompt_writer or chunk.start + chunk.count <= boundary
        for position in range(chunk.start, chunk.start + chunk.count):
            cache.write(chunk.sequence, position)
        s.prefilled(chunk)
    assert sum(chunk.count for chunk in plan.prefills) <= s.max_prefill_tokens
    assert len(s.running) <= s.max_batch
    for decoding in plan.decodes:
        assert decoding.to_prefill == 0
        cache.write(decoding, len(decoding.tokens) - 1)
        s.decoded(decoding, rng.randrange(3))


@pytest.mark.parametrize("seed", range(8))
def test_random_load_in_a_small_pool(seed: int) -> None:
    rng = random.Random(seed)
    s, cache = scheduler(pages=rng.choice([10, 12, 30])), PlainCache()
    limit: dict[str, int] = {}
    left, ended = 40, 0
    while left or s.waiting or s.running:
        if left and rng.random() < 0.5:
            left -= 1
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 30))]
            kind = rng.choice([("base", True), ("base", False), ("own", True)])
            new = sequence(f"{left}", prompt, *kind)
            limit[new.id] = min(len(prompt) + rng.randrange(1, 12), s.context + 1)
            s.add(new)
        run(s.plan(), s, cache, rng)
        s.check()
        for active in [*s.running, *s.waiting]:
            cancelled = rng.random() < 0.02
            if cancelled or len(active.tokens) >= limit[active.id]:
                s.remove(active, share=rng.random() < 0.8)
                ended += 1
        s.check()
    assert ended == 40
    counts = s.counts()
    assert (counts.held, counts.free + counts.cached) == (0, counts.total)


def finish(s: Scheduler, one: Sequence, new_tokens: int) -> int:
    """Run a sequence alone to its end; returns the tokens that were prefilled."""
    s.add(one)
    prefilled = 0
    while len(one.tokens) < one.prompt_length + new_tokens:
        plan = s.plan()
        prefilled += sum(chunk.count for chunk in plan.prefills)
        run(plan, s, PlainCacheThatTrusts(), random.Random(0))
    s.remove(one)
    return prefilled


class PlainCacheThatTrusts(PlainCache):
    """For tests that count and do not read."""

    def write(self, s: Sequence, position: int) -> None:
        pass


def test_pages_of_prompt_and_response_are_found_again() -> None:
    s = scheduler()
    first = sequence("first", list(range(9)))
    assert finish(s, first, 8) == 8
    # 16 of the 17 tokens are cached: all but the last, which was never fed
    second = sequence("second", [*first.tokens, 5])
    assert finish(s, second, 1) == 1
    assert second.reused == 16


def test_a_response_of_other_weights_is_not_found() -> None:
    s = scheduler()
    first = sequence("first", list(range(9)), shares=False)
    finish(s, first, 8)
    second = sequence("second", [*first.tokens, 5])
    assert finish(s, second, 1) == 17 - 8
    assert second.reused == 8


def test_a_prompt_is_prefilled_in_chunks_while_others_decode() -> None:
    s = scheduler()
    short, long = sequence("short", [1, 2]), sequence("long", list(range(20)))
    s.add(short)
    s.add(long)
    chunks = []
    while long.to_prefill:
        plan = s.plan()
        chunks.append(sum(p.count for p in plan.prefills if p.sequence is long))
        assert short in plan.decodes
        run(plan, s, PlainCacheThatTrusts(), random.Random(0))
    assert chunks == [7, 8, 4]


def test_the_youngest_is_pushed_out_and_comes_back_first() -> None:
    s = Scheduler(5, PAGE, 20, 4, 64)
    first, second, third = (sequence(n, [i] * 7) for i, n in enumerate(("1", "2", "3")))
    for one in (first, second, third):
        s.add(one)
    rng, cache = random.Random(0), PlainCache()
    while s.preemptions == 0:
        run(s.plan(), s, cache, rng)
    assert s.running == [first]
    assert list(s.waiting) == [second, third]
    s.check()


def test_an_untrusted_sequence_leaves_nothing_behind() -> None:
    s = scheduler()
    one = sequence("one", list(range(4)))
    s.add(one)
    for _ in range(6):
        run(s.plan(), s, PlainCacheThatTrusts(), random.Random(0))
    s.remove(one, share=False)
    assert s.counts().free == s.counts().total


def test_a_context_beyond_the_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="hold no context"):
        Scheduler(2, PAGE, 9, 1, 8)
