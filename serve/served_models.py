"""The models that an engine serves: names, weights, adapters, and who writes whose cache."""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.load import namespace
from jaxcodec.models.lora import (
    ALL_TARGETS,
    Adapter,
    bank_positions,
    check_icarus,
    slot_values,
    with_bank,
    write_slot,
)
from jaxcodec.models.scheme import ICARUS, Scheme
from jaxcodec.models.transformer import Model
from jaxcodec.serve.adapters import AdapterSlots
from jaxcodec.serve.step_program import Layout, ModelTree

BASE = ""  # key of the base's weights; those of other full models go by their namespaces
# Eight adapters beside the zero adapter, of the rank that most are trained with: a percent or two
# of the base's memory.
DEFAULT_BANK = AdapterBank(slots=9, rank=16, targets=ALL_TARGETS)


def bank_for(adapters: Sequence[Adapter]) -> AdapterBank:
    """A bank for these adapters: of the largest rank among them, with as many slots as there are,
    at most those of `DEFAULT_BANK`."""
    targets = {target for adapter in adapters for target in adapter.targets}
    return AdapterBank(
        slots=min(len(adapters) + 1, DEFAULT_BANK.slots),
        rank=max(adapter.rank for adapter in adapters),
        targets=tuple(target for target in ALL_TARGETS if target in targets),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ServedModel:
    """A name that requests can ask for, with what it stood for when it was added.

    Attributes:
      name: unique in the engine.
      scheme: who writes its prompts and responses.
      weights: whose weights answer: `BASE`, or the namespace of its own.
      adapter: key of its adapter on the base, the content; None for none.
      namespace: of the pages of its prompts, by the content of the weights that write them.
      eos_ids: tokens that end its responses.
    """

    name: str
    scheme: Scheme
    weights: str
    adapter: str | None
    namespace: str
    eos_ids: tuple[int, ...]

    @property
    def shares_response(self) -> bool:
        """Whether one namespace writes prompt and response."""
        return self.scheme.prompt_writer == self.scheme.response_writer

    @property
    def adapted_writer(self) -> bool:
        """Whether its adapter writes its responses."""
        return self.adapter is not None and self.scheme.response_writer == "self"


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedModel:
    """A model that has been checked and hashed, and is not served yet.

    Attributes:
      name: under which it is to be served.
      scheme: who writes its prompts and responses.
      namespace: content hash of its own weights.
      model: what answers: itself, or the base with room for adapters.
      values: of an adapter, as `slot_values` gives them; None for a full model.
    """

    name: str
    scheme: Scheme
    namespace: str
    model: Model
    values: list[np.ndarray] | None


class Weights:
    """A model as the step programs take it.

    Attributes:
      tree: how the leaves make the model.
      leaves: its arrays.
    """

    def __init__(self, model: Model):
        self.tree, self.leaves = ModelTree.of(model)
        self._bank = bank_positions(model)

    @property
    def model(self) -> Model:
        """The model."""
        return self.tree.model(self.leaves)

    def load(self, values: Sequence[np.ndarray], slot: int) -> None:
        """Put an adapter, as `slot_values` gives it, into a slot."""
        old = [self.leaves[i] for i in self._bank]
        for i, leaf in zip(self._bank, write_slot(old, list(values), np.int32(slot)), strict=True):
            self.leaves[i] = leaf


class ServedModels:
    """A base and what has been made of it.

    Args:
      base: the model that all share.
      name: under which it is served itself, with the zero adapter.
      bank: room for adapters on the base; it is made when the first is added.
      share_prefixes: False keeps the pages of each model to itself.
    """

    def __init__(self, base: Model, name: str, bank: AdapterBank, share_prefixes: bool):
        if not name:
            raise ValueError("The base needs a name to be served under, got an empty one.")
        self.slots = AdapterSlots(bank.slots)
        self._bank = bank
        self._weights = {BASE: Weights(base if base.bank is None else with_bank(base, None))}
        self._adapters: dict[str, list[np.ndarray]] = {}
        self._users: collections.Counter[str] = collections.Counter()
        self._config, self._dtype = base.config, base.dtype
        self._namespace = namespace(base)
        self._share_prefixes = share_prefixes
        self._by_name: dict[str, ServedModel] = {}
        self._two_streams = False
        self._register(name, ICARUS, BASE, None, self._namespace, base)

    @property
    def names(self) -> tuple[str, ...]:
        """Names that requests can ask for."""
        return tuple(self._by_name)

    def find(self, name: str) -> ServedModel:
        """The model of that name.

        Raises:
          ValueError: there is none; those that there are, are named.
        """
        if name not in self._by_name:
            raise ValueError(f"No model is served as {name!r}; there are {', '.join(self.names)}.")
        return self._by_name[name]

    def weights(self, key: str) -> Weights:
        """The weights that `ServedModel.weights` stands for."""
        return self._weights[key]

    @property
    def all_weights(self) -> tuple[str, ...]:
        """Keys of all weights."""
        return tuple(self._weights)

    def layout(self, models: Iterable[ServedModel]) -> Layout:
        """What models of the same weights need when they decode together.

        The base goes with the icarus models. While there are none it has one stream: its encoder
        and its decoder are the same.
        """
        if not self._two_streams:
            return Layout()
        writes = {model.adapted_writer for model in models if model.weights == BASE}
        two_streams = False in writes
        return Layout(two_streams, two_streams and True in writes)

    def layouts(self, key: str) -> list[Layout]:
        """Every layout in which requests to the models of some weights can decode."""
        models = [model for model in self._by_name.values() if model.weights == key]
        writing = [model for model in models if model.adapted_writer]
        sharing = [model for model in models if not model.adapted_writer]
        possible = {self.layout(some) for some in (models, writing, sharing) if some}
        return sorted(possible, key=dataclasses.astuple)

    def writer(self, model: ServedModel, by_prompt_writer: bool) -> tuple[str, bool]:
        """Whose weights write a model's prompt, or else its response, and whether adapted."""
        scheme = model.scheme
        writer = scheme.prompt_writer if by_prompt_writer else scheme.response_writer
        return (BASE, False) if writer == "base" else (model.weights, model.adapter is not None)

    @property
    def writers(self) -> list[tuple[str, bool]]:
        """Every writer: whose weights, and whether with adapters."""
        models = self._by_name.values()
        return sorted({self.writer(model, prompt) for model in models for prompt in (True, False)})

    def prepare(
        self,
        name: str,
        scheme: Scheme,
        adapter: Adapter | None = None,
        model: Model | None = None,
    ) -> "PreparedModel":
        """See `Engine.prepare_model`; changes nothing."""
        if adapter is not None and model is None:
            if scheme == ICARUS:
                check_icarus(adapter)
            base = self._weights[BASE].model
            base = base if base.bank is not None else with_bank(base, self._bank)
            values = slot_values(base, adapter)
            own = adapted_namespace(self._namespace, adapter)
            return PreparedModel(name, scheme, own, base, values)
        if model is not None and adapter is None:
            self._check_full(name, scheme, model)
            return PreparedModel(name, scheme, namespace(model), model, None)
        raise ValueError(f"{name}: give an adapter or a model, and not both.")

    def add(self, new: "PreparedModel") -> None:
        """See `Engine.add_prepared`."""
        name, own = new.name, new.namespace
        if not name or name in self._by_name:
            raise ValueError(f"A model needs a name of its own, got {name!r}.")
        if new.values is not None:
            if self._weights[BASE].model.bank is None:
                self._weights[BASE] = Weights(new.model)
            self._adapters.setdefault(own, new.values)
            weights, adapter = BASE, own
        else:
            self._weights.setdefault(own, Weights(new.model))
            weights, adapter = own, None
        written_by = self._namespace if new.scheme.prompt_writer == "base" else own
        self._register(name, new.scheme, weights, adapter, written_by, new.model)

    def remove(self, name: str) -> None:
        """See `Engine.remove_model`."""
        model = self.find(name)
        if model.weights == BASE and model.adapter is None:
            raise ValueError(f"{name} is the base: all other models need it.")
        del self._by_name[name]
        self.release(model)

    def hold(self, model: ServedModel) -> None:
        """Keep what a model runs on until it is released."""
        self._users[model.adapter or model.weights] += 1

    def release(self, model: ServedModel) -> None:
        """Undo one `hold`; the last one lets go of weights or adapter."""
        key = model.adapter or model.weights
        self._users[key] -= 1
        if self._users[key] == 0:
            del self._users[key]
            if model.adapter is None:
                del self._weights[key]
            else:
                self.slots.drop(key)
                del self._adapters[key]

    def load(self, adapter: str, slot: int) -> None:
        """Put an adapter into a slot of the bank, after all that was launched before."""
        self._weights[BASE].load(self._adapters[adapter], slot)

    def restart(self) -> None:
        """Forget what the slots of the bank hold, which a fault may have left half written."""
        self.slots.clear()
        model = self._weights[BASE].model
        if model.bank is not None:
            self._weights[BASE] = Weights(with_bank(model, model.bank))

    def load_nothing(self) -> None:
        """Write the zero adapter into its slot again, for that to be compiled."""
        base = self._weights[BASE]
        if (model := base.model).bank is not None:
            base.load(slot_values(model, None), 0)

    def _register(
        self,
        name: str,
        scheme: Scheme,
        weights: str,
        adapter: str | None,
        writer: str,
        answering: Model,
    ) -> None:
        pages_of = writer if self._share_prefixes else f"{writer} {name}"
        self._two_streams |= scheme == ICARUS and adapter is not None
        served = ServedModel(name, scheme, weights, adapter, pages_of, answering.config.eos_ids)
        self._by_name[name] = served
        self.hold(served)

    def _check_full(self, name: str, scheme: Scheme, model: Model) -> None:
        if scheme == ICARUS:
            raise ValueError(f"{name}: an icarus model is an adapter on the base, not a model.")
        for field in dataclasses.fields(self._config):
            ours, theirs = (getattr(c, field.name) for c in (self._config, model.config))
            if field.name not in ("bos_id", "eos_ids") and ours != theirs:
                raise ValueError(
                    f"{name} shares the base's cache, so its config must be the base's, "
                    f"but its {field.name} is {theirs!r}, not {ours!r}."
                )
        if model.dtype != self._dtype:
            raise ValueError(f"{name} computes in {model.dtype}, the base in {self._dtype}.")


def adapted_namespace(base: str, adapter: Adapter) -> str:
    """Content hash (SHA-256, hex) of a base, given by its own, with an adapter."""
    digest = hashlib.sha256(f"{base} {adapter.alpha / adapter.rank}".encode())
    for path in sorted(adapter.weights):
        for matrix in adapter.weights[path]:
            value = np.ascontiguousarray(matrix)
            digest.update(repr((path, value.dtype, value.shape)).encode())
            digest.update(value.view(np.uint8).data)
    return digest.hexdigest()
