"""Which adapters are in the slots of the base's bank. Plain Python: an adapter is its key.

Any number of adapters can be served; those in use are in slots, and the one that was not used for
longest makes room for the next.
"""

import collections
from collections.abc import Collection


class AdapterSlots:
    """The slots 1 to `slots` - 1 of a bank; slot 0 is the zero adapter and everybody's.

    Attributes:
      loads: times that an adapter was put into a slot.
    """

    def __init__(self, slots: int):
        if slots < 2:
            raise ValueError(f"A bank needs a slot beside the zero adapter's, got {slots} in all.")
        self.loads = 0
        self._slots = slots
        self._free = list(range(slots - 1, 0, -1))
        self._slot: collections.OrderedDict[str, int] = collections.OrderedDict()  # oldest first
        self._users: collections.Counter[str] = collections.Counter()
        self._pinned: set[str] = set()

    def can_acquire(self, key: str | None) -> bool:
        """Whether `acquire` would find a slot now."""
        return key is None or key in self._slot or bool(self._free) or self._idle() is not None

    def could_acquire(self, key: str | None, users: Collection[str | None]) -> bool:
        """Whether `acquire` would find a slot if `users` were all the adapters in use."""
        kept = self._pinned.union(users)
        return key is None or key in self._slot or bool(self._free) or not kept >= {*self._slot}

    def acquire(self, key: str | None) -> tuple[int, bool]:
        """Use an adapter until it is released.

        Returns:
          (its slot, whether it has to be loaded into it first). (0, False) for None.

        Raises:
          MemoryError: all slots are in use or pinned.
        """
        if key is None:
            return 0, False
        slot = self._slot.get(key)
        if is_new := slot is None:
            slot = self._take()
            self._slot[key] = slot
            self.loads += 1
        self._slot.move_to_end(key)
        self._users[key] += 1
        return slot, is_new

    def release(self, key: str | None) -> None:
        """Undo one `acquire`; the adapter stays in its slot until that is needed."""
        if key is None:
            return
        if not self._users[key]:
            raise ValueError(f"The adapter {key} is released more often than it was acquired.")
        self._users[key] -= 1

    def pin(self, key: str) -> tuple[int, bool]:
        """Keep an adapter in its slot, used or not; returns as `acquire`, and raises like it.

        One slot is never pinned, or other adapters would wait for ever.
        """
        if len(self._pinned | {key}) > self._slots - 2:
            raise MemoryError(
                f"{len(self._pinned)} adapters are pinned: of the bank's {self._slots} slots one "
                "is the zero adapter's and one must stay for the others."
            )
        slot, is_new = self.acquire(key)
        self.release(key)
        self._pinned.add(key)
        return slot, is_new

    def unpin(self, key: str) -> None:
        """Undo `pin`."""
        self._pinned.discard(key)

    def drop(self, key: str) -> None:
        """Forget an adapter that nobody uses: its slot is free at once."""
        if self._users[key]:
            raise ValueError(f"The adapter {key} is in use and cannot be dropped.")
        self._pinned.discard(key)
        del self._users[key]
        if (slot := self._slot.pop(key, None)) is not None:
            self._free.append(slot)

    def clear(self) -> None:
        """Forget what is in the slots and who uses it; pinned ones are loaded when next used."""
        self._free = list(range(self._slots - 1, 0, -1))
        self._slot.clear()
        self._users.clear()

    @property
    def resident(self) -> dict[str, int]:
        """Slot of each adapter that is in one."""
        return dict(self._slot)

    @property
    def users(self) -> int:
        """Acquisitions that have not been released."""
        return self._users.total()

    def _idle(self) -> str | None:
        """The adapter that was not used for longest, and may go."""
        return next((k for k in self._slot if not self._users[k] and k not in self._pinned), None)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        idle = self._idle()
        if idle is None:
            raise MemoryError("All adapter slots are in use or pinned.")
        return self._slot.pop(idle)
