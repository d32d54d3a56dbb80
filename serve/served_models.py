"""The models that an engine serves: names, weights, adapters, and who writes whose cache."""

import dataclasses
from typing import NamedTuple

from jaxcodec.models.load import namespace
from jaxcodec.models.lora import Adapter, check_icarus
from jaxcodec.models.scheme import ICARUS, Scheme
from jaxcodec.models.transformer import Model
from jaxcodec.serve.adapters import AdapterSlots, adapted_namespace

BASE = ""  # key of the base's weights; those of other full models go by the models' names


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A name that requests can ask for.

    Attributes:
      name: unique in the engine.
      scheme: who writes its prompts and responses.
      weights: whose weights answer: `BASE`, or its own name.
      slot: its adapter on the base; 0 for none.
      namespace: of the pages of its prompts, by the content of the weights that write them.
      eos_ids: tokens that end its responses.
    """

    name: str
    scheme: Scheme
    weights: str
    slot: int
    namespace: str
    eos_ids: tuple[int, ...]

    @property
    def shares_response(self) -> bool:
        """Whether one namespace writes prompt and response."""
        return self.scheme.prompt_writer == self.scheme.response_writer


class Lane(NamedTuple):
    """Rows that one device call can take together: the same weights, as many streams."""

    weights: str
    streams: int


class ServedModels:
    """A base and what has been made of it.

    Args:
      base: the model that all share.
      name: under which it is served itself, with the zero adapter.
      share_prefixes: False keeps the pages of each model to itself.
    """

    def __init__(self, base: Model, name: str, share_prefixes: bool):
        self._base = AdapterSlots(base)
        self._full: dict[str, Model] = {}
        self._namespace = namespace(base)
        self._share_prefixes = share_prefixes
        self._by_name: dict[str, ServedModel] = {}
        self._two_streams = False
        self._register(name, ICARUS, BASE, 0, self._namespace)

    @property
    def names(self) -> tuple[str, ...]:
        """Names that requests can ask for."""
        return tuple(self._by_name)

    @property
    def lanes(self) -> list[Lane]:
        """Every lane that a request can decode in."""
        return sorted({self.lane(model) for model in self._by_name.values()})

    @property
    def writers(self) -> list[tuple[str, bool]]:
        """Every writer: whose weights, and whether with adapters."""
        return sorted(
            {
                self.writer(model, by_prompt_writer)
                for model in self._by_name.values()
                for by_prompt_writer in (True, False)
            }
        )

    def find(self, name: str) -> ServedModel:
        """The model of that name.

        Raises:
          ValueError: there is none; those that there are, are named.
        """
        if name not in self._by_name:
            raise ValueError(f"No model is served as {name!r}; there are {', '.join(self.names)}.")
        return self._by_name[name]

    def weights(self, key: str) -> Model:
        """The weights that `ServedModel.weights` stands for."""
        return self._base.model if key == BASE else self._full[key]

    def lane(self, model: ServedModel) -> Lane:
        """Where a model's rows decode.

        The base goes with the icarus models. While there are none it has one stream: its encoder
        and its decoder are the same.
        """
        return Lane(model.weights, 2 if self._two_streams and model.scheme == ICARUS else 1)

    def writer(self, model: ServedModel, by_prompt_writer: bool) -> tuple[str, bool]:
        """Whose weights write a model's prompt, or else its response, and whether adapted."""
        scheme = model.scheme
        writer = scheme.prompt_writer if by_prompt_writer else scheme.response_writer
        return (BASE, False) if writer == "base" else (model.weights, model.slot > 0)

    def add(
        self,
        name: str,
        scheme: Scheme,
        adapter: Adapter | None = None,
        model: Model | None = None,
    ) -> None:
        """See `Engine.add_model`."""
        if not name or name in self._by_name:
            raise ValueError(f"A model needs a name of its own, got {name!r}.")
        if adapter is not None and model is None:
            if scheme == ICARUS:
                check_icarus(adapter)
            own = adapted_namespace(self._namespace, adapter)
            weights, slot = BASE, self._base.add(adapter)
        elif model is not None and adapter is None:
            self._check_full(name, scheme, model)
            own = namespace(model)
            weights, slot = name, 0
            self._full[name] = model
        else:
            raise ValueError(f"{name}: give an adapter or a model, and not both.")
        written_by = self._namespace if scheme.prompt_writer == "base" else own
        self._register(name, scheme, weights, slot, written_by)

    def _register(self, name: str, scheme: Scheme, weights: str, slot: int, writer: str) -> None:
        pages_of = writer if self._share_prefixes else f"{writer} {name}"
        eos_ids = self.weights(weights).config.eos_ids
        self._two_streams |= scheme == ICARUS and slot > 0
        self._by_name[name] = ServedModel(name, scheme, weights, slot, pages_of, eos_ids)

    def _check_full(self, name: str, scheme: Scheme, model: Model) -> None:
        if scheme == ICARUS:
            raise ValueError(f"{name}: an icarus model is an adapter on the base, not a model.")
        base = self._base.model
        for field in dataclasses.fields(base.config):
            ours, theirs = (getattr(m.config, field.name) for m in (base, model))
            if field.name not in ("bos_id", "eos_ids") and ours != theirs:
                raise ValueError(
                    f"{name} shares the base's cache, so its config must be the base's, "
                    f"but its {field.name} is {theirs!r}, not {ours!r}."
                )
        if model.dtype != base.dtype:
            raise ValueError(f"{name} computes in {model.dtype}, the base in {base.dtype}.")
