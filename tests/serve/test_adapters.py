"""Adapters share slots: those in use stay, and of the others the one not used for longest goes."""

import pytest

from jaxcodec.serve.adapters import AdapterSlots


def test_no_adapter_is_slot_zero_and_nothing_to_load() -> None:
    assert AdapterSlots(2).acquire(None) == (0, False)


def test_an_adapter_is_loaded_once_while_it_stays() -> None:
    slots = AdapterSlots(3)
    slot, is_new = slots.acquire("a")
    assert (slot > 0, is_new) == (True, True)
    assert slots.acquire("a") == (slot, False)
    slots.release("a")
    slots.release("a")
    assert slots.acquire("a") == (slot, False)
    assert slots.loads == 1


def test_the_least_recently_used_makes_room() -> None:
    slots = AdapterSlots(3)
    for key in "ab":
        slots.acquire(key)
        slots.release(key)
    slots.acquire("a")
    slots.release("a")
    slots.acquire("c")
    assert set(slots.resident) == {"a", "c"}


def test_adapters_in_use_or_pinned_stay() -> None:
    slots = AdapterSlots(3)
    slots.acquire("used")
    slots.pin("pinned")
    with pytest.raises(MemoryError, match="1 adapters are pinned: of the bank's 3 slots"):
        slots.pin("used")
    assert not slots.can_acquire("new")
    with pytest.raises(MemoryError, match="in use or pinned"):
        slots.acquire("new")
    slots.unpin("pinned")
    assert slots.can_acquire("new")
    slots.acquire("new")
    assert set(slots.resident) == {"used", "new"}


def test_a_dropped_adapter_frees_its_slot() -> None:
    slots = AdapterSlots(2)
    slots.acquire("a")
    with pytest.raises(ValueError, match="in use"):
        slots.drop("a")
    slots.release("a")
    slots.drop("a")
    assert slots.resident == {}
    assert slots.acquire("a")[1]


def test_releasing_too_often_is_refused() -> None:
    with pytest.raises(ValueError, match="more often"):
        AdapterSlots(2).release("a")


def test_a_bank_of_the_zero_adapter_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="got 1 in all"):
        AdapterSlots(1)
