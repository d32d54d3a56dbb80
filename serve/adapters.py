"""The LoRA adapters of the base, in the slots of one bank, and the names of what they write."""

import hashlib

import numpy as np

from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.lora import ALL_TARGETS, Adapter, set_adapter, with_bank
from jaxcodec.models.transformer import Model

# Room to begin with, slot 0 included; it doubles when it is full, and with it the steps recompile.
FIRST_SLOTS = 4


class AdapterSlots:
    """A base model and its adapters: slot 0 changes nothing, the others hold one adapter each.

    Attributes:
      model: the base, with a bank as soon as there is an adapter.
    """

    def __init__(self, base: Model):
        self.model = base if base.bank is None else with_bank(base, None)
        self._adapters: list[Adapter | None] = [None]

    def add(self, adapter: Adapter) -> int:
        """Load an adapter; returns its slot.

        Where the bank lacks slots, rank or a target, it is made anew with all adapters in it.

        Raises:
          ValueError: the adapter does not fit the base; nothing has changed then.
        """
        adapters = [*self._adapters, adapter]
        model, start = self.model, len(self._adapters)
        bank = _with_room(model.bank, len(adapters), adapter)
        if bank != model.bank:
            model, start = with_bank(model, bank), 1
        for slot in range(start, len(adapters)):
            model = set_adapter(model, adapters[slot], slot)
        self.model, self._adapters = model, adapters
        return len(adapters) - 1


def adapted_namespace(base: str, adapter: Adapter) -> str:
    """Content hash (SHA-256, hex) of a base, given by its own, with an adapter."""
    digest = hashlib.sha256(f"{base} {adapter.alpha / adapter.rank}".encode())
    for path in sorted(adapter.weights):
        for matrix in adapter.weights[path]:
            value = np.ascontiguousarray(matrix)
            digest.update(repr((path, value.dtype, value.shape)).encode())
            digest.update(value.view(np.uint8).data)
    return digest.hexdigest()


def _with_room(bank: AdapterBank | None, slots: int, adapter: Adapter) -> AdapterBank:
    old = bank or AdapterBank(FIRST_SLOTS, 1, ())
    size = old.slots
    while size < slots:
        size *= 2
    targets = {*old.targets, *adapter.targets}
    return AdapterBank(
        size, max(old.rank, adapter.rank), tuple(t for t in ALL_TARGETS if t in targets)
    )
