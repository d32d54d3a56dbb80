"""Whatever the pressure, no page is lost, and every sequence reads what was written for it."""

import collections
import dataclasses
import itertools
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from jaxcodec.serve.adapters import AdapterSlots
from jaxcodec.serve.plan import NO_ROW, Sequence
from jaxcodec.serve.scheduler import WINDOW, Scheduler
from tests.serve.plain_device import STOPPING, PlainDevice, answer, sequence

PAGE = 4
# Methods of the page pool and of the device in which a step may fail.
FAULTS = ("take", "_copy", "_prefill", "_decode")


class Fault(Exception):
    """What a test raises."""


def scheduler(
    pages: int = 16,
    max_batch: int = 4,
    step_tokens: int = 12,
    decode_steps: int = 1,
    slots: int = 3,
    host: int = 0,
) -> Scheduler:
    return Scheduler(pages, PAGE, max_batch, step_tokens, decode_steps, AdapterSlots(slots), host)


def drain(device: PlainDevice, steps: int = 1000) -> None:
    """Run until nothing is left, which must come to pass."""
    for _ in range(steps):
        if not (device.scheduler.waiting or device.scheduler.running):
            break
        device.step()
        device.scheduler.check()
    device.scheduler.check_idle()


class Machine(RuleBasedStateMachine):
    """Requests of all kinds come, run and are taken away, in any order.

    `PlainDevice` says what is right: what is read was written by whom it should be, every answer is
    that of the request alone, and adapters are where they are used.
    """

    sequences = Bundle("sequences")
    faults: ClassVar[collections.Counter[str]] = collections.Counter()  # of all runs, by place

    @initialize(
        pages=st.integers(6, 30),
        max_batch=st.integers(1, 5),
        decode_steps=st.integers(1, 4),
        slots=st.integers(2, 4),
        host=st.sampled_from([0, 1, 5, 100]),
    )
    def start(self, pages: int, max_batch: int, **sizes: int) -> None:
        self.scheduler = scheduler(pages, max_batch, max_batch + 5, **sizes)
        self.device = PlainDevice(self.scheduler)
        self.left: list[Sequence] = []
        self.number = 0

    @rule(
        target=sequences,
        # few tokens, so that prompts have prefixes in common
        prompts=st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=15), max_size=3),
        new=st.integers(1, 9),
        namespace=st.sampled_from(["base", "own"]),
        model=st.sampled_from([STOPPING, "other"]),
        shares=st.booleans(),
        adapter=st.sampled_from([None, "x", "y", "z"]),
        priority=st.sampled_from([0, 0, 0, 1]),
        needs_host=st.sampled_from([False, False, True]),
    )
    def submit(self, prompts, new, **options):
        added = []
        for prompt in prompts:
            self.number += 1
            added.append(sequence(f"{self.number}", prompt, new, **options))
            self.scheduler.add(added[-1])
        self.left += added
        return multiple(*added)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.device.step()

    @rule(place=st.sampled_from(FAULTS), call=st.integers(0, 3))
    def fault(self, place: str, call: int) -> None:
        """A step fails for want of room, or on the device; all that was computed is lost."""
        owner = self.scheduler.pool if place == "take" else self.device
        method, number = getattr(owner, place), itertools.count()

        def failing(*args):
            if next(number) == call:
                raise Fault
            return method(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, place, failing)
            try:
                self.device.step()
            except Fault:
                self.faults[place] += 1
                self.device.forget()
                self.scheduler.restart(s for s in self.left if s not in self.device.ended)

    @rule(one=sequences, share=st.booleans())
    def take_away(self, one: Sequence, share: bool) -> None:
        if one in self.left and one not in self.device.ended:
            self.left.remove(one)
            self.scheduler.remove(one, share=share)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            assert len(self.scheduler.running) <= self.scheduler.max_batch

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            drain(self.device)
            assert {s.id for s in self.left} == {s.id for s in self.device.ended if s in self.left}
            for s in self.left:
                assert s.tokens == answer(s)


def test_any_load_in_any_order() -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=200,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert {*Machine.faults} == {*FAULTS}


def run_alone(s: Scheduler, one: Sequence) -> int:
    """Run a sequence to its end; returns the tokens that were prefilled."""
    device, prefilled = PlainDevice(s, trusts=True), 0  # what earlier devices wrote is not known
    s.add(one)
    while s.waiting or s.running:
        prefilled += sum(chunk.count for chunk in device.step().prefills)
    return prefilled


def test_pages_of_prompt_and_response_are_found_again() -> None:
    s = scheduler()
    first = sequence("first", [1, 2, 3] * 3, 8)
    assert run_alone(s, first) == 8
    # all but the last token is cached, as far as pages are full
    known = (len(first.tokens) - 1) // PAGE * PAGE
    second = sequence("second", [*first.tokens, 1])
    assert run_alone(s, second) == len(first.tokens) - known
    assert second.reused == known


def test_a_response_of_other_weights_is_not_found() -> None:
    s = scheduler()
    first = sequence("first", [1, 2, 3] * 3, 8, shares=False)
    run_alone(s, first)
    second = sequence("second", [*first.tokens, 1])
    assert run_alone(s, second) == len(first.tokens) - 8
    assert second.reused == 8


def test_a_prompt_is_prefilled_in_chunks_while_others_decode() -> None:
    s = scheduler(max_batch=2, step_tokens=10)
    device = PlainDevice(s)
    short, long = sequence("short", [1, 2], 30), sequence("long", [1, 1, 2] * 9)
    s.add(short)
    s.add(long)
    chunks = []
    while long.tokens == [1, 1, 2] * 9 and len(chunks) < 9:
        plan = device.step()
        chunks.append(sum(p.count for p in plan.prefills if p.sequence is long))
        computed = sum(p.count for p in plan.prefills) + sum(n for _, n in plan.decodes)
        assert computed <= 10
        if short in s.running:
            assert short in [decoding for decoding, _ in plan.decodes]
    assert [c for c in chunks if c] == [7, 8, 8, 3]


def test_several_tokens_a_launch_when_nothing_waits() -> None:
    s = scheduler(max_batch=2, decode_steps=4)
    device = PlainDevice(s)
    s.add(sequence("one", [1, 2], 9))
    assert [n for _, n in device.step().decodes] == [1]  # it waited
    assert [n for _, n in device.step().decodes] == [4]
    s.add(sequence("two", [1, 2], 9))
    assert {n for _, n in device.step().decodes} == {1}


def test_a_common_prefix_is_computed_once() -> None:
    s = scheduler(pages=64, max_batch=8, step_tokens=14)
    device = PlainDevice(s)
    for i in range(6):
        s.add(sequence(f"{i}", [1, 2] * 12 + [3, i % 3 + 1], 4))
    prefilled = 0
    while s.waiting or s.running:
        prefilled += sum(chunk.count for chunk in device.step().prefills)
        s.check()
    # 24 tokens are common: six pages; each has one more of its own before its last
    assert prefilled == 24 + 6


def test_whoever_waits_for_a_prefix_holds_up_nobody() -> None:
    s = scheduler(pages=64, max_batch=8, step_tokens=14)
    device = PlainDevice(s)
    first, same = (sequence(n, [1, 2] * 16, 4) for n in ("first", "same"))
    other = sequence("other", [2], 4)
    for one in (first, same, other):
        s.add(one)
    device.step()
    assert (first in s.running, same in s.running, other in s.running) == (True, False, True)
    drain(device)


def test_the_last_is_pushed_out_and_comes_back_first() -> None:
    s = Scheduler(5, PAGE, 4, 64)
    device = PlainDevice(s)
    first, second, third = (sequence(n, [i] * 7, 12) for i, n in enumerate("123", 1))
    for one in (first, second, third):
        s.add(one)
    for _ in range(12):
        if not s.preemptions:
            device.step()
    assert s.running == [first]
    assert s.waiting == [second, third]
    drain(device)


def test_one_model_alone_is_served_in_order() -> None:
    s = scheduler(max_batch=1)
    device = PlainDevice(s)
    for i in range(5):
        s.add(sequence(f"{i}", [i + 1, 2], 3))
    drain(device)
    assert [one.id[0] for one in device.ended] == [f"base/{i}" for i in range(5)]


def test_a_longer_known_prefix_goes_first_but_not_for_ever() -> None:
    s = scheduler(pages=64, max_batch=1)
    device = PlainDevice(s)
    known = [1, 2] * 8
    s.add(sequence("known", known, 2))
    drain(device)
    patient = sequence("patient", [3, 3], 2)
    s.add(patient)
    jumped = 0
    while patient not in device.ended:
        while len(s.waiting) < 2 * WINDOW:
            s.add(sequence(f"later {jumped} {len(s.waiting)}", [*known, 3], 2))
        jumped += sum(a is not patient for a in device.step().admitted)
        assert jumped <= WINDOW
    assert jumped == WINDOW


def test_no_model_starves_another() -> None:
    s = scheduler(pages=64, max_batch=2)
    device = PlainDevice(s)
    for i in range(200):
        s.add(sequence(f"{i}", [1, i % 3 + 1], 6, model="greedy"))
    device.step()
    modest = [sequence(f"modest {i}", [2, 2], 6, model="modest") for i in range(5)]
    for one in modest:
        s.add(one)
    while not all(one in device.ended for one in modest):
        device.step()
    # each of the modest model's waits for about one of the other's
    assert sum(one.model == "greedy" for one in device.ended) <= 2 * len(modest) + s.max_batch


def test_the_more_urgent_is_served_first_and_takes_a_row() -> None:
    s = scheduler(max_batch=2)
    device = PlainDevice(s)
    calm = [sequence(f"{i}", [i + 1], 12, priority=5) for i in range(2)]
    for one in calm:
        s.add(one)
    device.step()
    s.add(sequence("later", [1, 1], 2, priority=5))
    urgent = sequence("urgent", [2, 2], 2, priority=-1)
    s.add(urgent)
    device.step()
    device.step()
    assert urgent in s.running or urgent in device.ended
    assert calm[0].row != NO_ROW or calm[0] in device.ended
    assert calm[1] in s.waiting
    drain(device)


def test_what_is_not_to_be_trusted_leaves_nothing_behind() -> None:
    s = scheduler()
    device = PlainDevice(s)
    one = sequence("one", [1, 2] * 5, 9)
    s.add(one)
    for _ in range(3):
        device.step()
    s.remove(one, share=False)
    assert s.counts().free == s.counts().total
    s.check()


def test_more_adapters_than_slots_take_turns() -> None:
    s = scheduler(pages=64, max_batch=4, slots=3)
    device = PlainDevice(s)
    for i in range(20):
        s.add(sequence(f"{i}", [1, i % 3 + 1], 5, model=f"m{i % 5}", adapter=f"a{i % 5}"))
    drain(device)
    assert len(device.ended) == 20
    assert len(s.adapters.resident) <= 2


def test_an_adapter_in_use_is_not_kept_for_ever() -> None:
    s = scheduler(pages=64, max_batch=4, slots=2)
    device = PlainDevice(s)
    patient = sequence("patient", [3, 3], 2, model="patient", adapter="patient")
    admitted = 0
    while patient not in device.ended:
        while len(s.waiting) < 8:
            s.add(sequence(f"{admitted} {len(s.waiting)}", [1], 4, model="busy", adapter="busy"))
        if admitted == 0:
            s.add(patient)
        admitted += len(device.step().admitted)
        assert admitted <= 2 * WINDOW


def test_pages_given_up_come_back_from_host_memory() -> None:
    s = scheduler(pages=8, host=8)
    device = PlainDevice(s)
    first = sequence("first", [1, 2, 3, 1] * 4, 2)
    s.add(first)
    drain(device)
    s.add(sequence("other", [3, 3] * 12, 2))
    drain(device)
    assert s.host.offloaded > 0
    again = sequence("again", [1, 2, 3, 1] * 4, 2)
    s.add(again)
    prefilled = 0
    while s.waiting or s.running:
        prefilled += sum(chunk.count for chunk in device.step().prefills)
    assert (again.reused, prefilled) == (12, 15 - 12)
    assert s.host.restored > 0


def test_after_a_fault_nothing_is_known() -> None:
    s = scheduler(pages=8, host=8)
    device = PlainDevice(s)
    prompt = [1, 2, 3, 1] * 4
    for one in (sequence("first", prompt, 2), sequence("other", [3, 3] * 12, 2)):
        s.add(one)
        drain(device)
    assert s.counts().host > 0
    running = sequence("running", prompt, 4, adapter="x")
    s.add(running)
    device.step()
    assert running.reused
    device.forget()
    s.restart([running])
    assert s.counts() == dataclasses.replace(s.counts(), free=8, held=0, cached=0, host=0)
    drain(device)
    assert running.tokens == answer(running)


def test_what_can_never_run_is_refused() -> None:
    with pytest.raises(ValueError, match="2 pages of 4 hold no 10 tokens"):
        scheduler(pages=2).add(sequence("long", [1] * 5, 5))
    with pytest.raises(ValueError, match="leaves no room for prompts"):
        scheduler(max_batch=8, step_tokens=9)


def test_a_backlog_of_low_priority_delays_no_other() -> None:
    s = scheduler(pages=64, max_batch=1)
    device = PlainDevice(s)
    for i in range(50):
        s.add(sequence(f"low {i}", [1, 2], 8, model="a", priority=5))
    rival = [sequence(f"b {i}", [2, 2], 8, model="b") for i in range(5)]
    mine = sequence("a", [1, 1], 8, model="a")
    for one in (*rival, mine):
        s.add(one)
    while mine not in device.ended:
        device.step()
    assert sum(one in device.ended for one in rival) <= 1


def test_what_was_cancelled_delays_nobody() -> None:
    s = scheduler(pages=64, max_batch=1)
    device = PlainDevice(s)
    queued = [sequence(f"{i}", [1, 2], 8, model="a") for i in range(50)]
    behind = sequence("behind", [1, 3], 8, model="a")
    for one in (*queued, behind):
        s.add(one)
    rival = [sequence(f"b {i}", [2, 2], 8, model="b") for i in range(5)]
    for one in rival:
        s.add(one)
    for one in queued:
        s.remove(one)
    later = sequence("later", [3, 3], 8, model="a")
    s.add(later)
    s.check()
    while later not in device.ended:
        device.step()
    assert behind in device.ended
    assert sum(one in device.ended for one in rival) <= 2


def test_what_was_not_used_is_not_charged() -> None:
    s = scheduler(pages=64, max_batch=1)
    device = PlainDevice(s)
    first = sequence("first", [1, 2], 200, model="a")
    s.add(first)
    device.step()
    s.remove(first)
    rival = [sequence(f"b {i}", [2, 2], 8, model="b") for i in range(5)]
    mine = sequence("mine", [1, 1], 8, model="a")
    for one in (*rival, mine):
        s.add(one)
    while mine not in device.ended:
        device.step()
    assert sum(one in device.ended for one in rival) <= 1


def test_a_long_prompt_delays_the_first_token_of_a_short_one_by_a_few_steps() -> None:
    s = Scheduler(2000, PAGE, 4, 64)
    device = PlainDevice(s, trusts=True)
    long = sequence("long", [1, 2, 3] * 2000, 8, model="a")
    s.add(long)
    device.step()
    short = sequence("short", [2, 2, 2], 8, model="b")
    s.add(short)
    for _ in range(3):
        device.step()
    assert len(short.tokens) > 3
    assert long.to_prefill > 5000


def test_the_whole_budget_goes_to_prompts_if_nobody_else_can_use_it() -> None:
    s = scheduler(pages=10, max_batch=4, step_tokens=12)
    device = PlainDevice(s)
    s.add(sequence("one", [1, 2, 3] * 9, 4))
    s.add(sequence("two", [2] * 30, 4))  # no pages for it
    assert [chunk.count for chunk in device.step().prefills] == [11]
    drain(device)


def test_nobody_is_pushed_out_for_nothing() -> None:
    s = scheduler(pages=18, max_batch=4, step_tokens=64)
    device = PlainDevice(s)
    urgent = sequence("urgent", [1] * 40, 12, priority=-1)
    calm = sequence("calm", [2] * 8, 12, priority=5)
    for one in (urgent, calm):
        s.add(one)
    device.step()
    assert {*s.running} == {urgent, calm}
    head = sequence("head", [3] * 36, 4, priority=-1)  # more than calm holds
    s.add(head)
    while urgent in s.running:
        assert not device.step().preempted
    drain(device)
