"""The layouts in which a checkpoint may hold codebook linears, told apart by config.json.

All of them keep Hugging Face's names, and have <linear>.codes, .codebooks and .scales where a dense
linear has .weight; native.py, codegemm.py and aqlm.py say what these hold and what each layout
cannot. A dense checkpoint is one of ours without specs.

Letters: K input and N output features.
"""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np

from jaxcodec.checkpoints import aqlm, codegemm, native
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor

Specs = Mapping[str, CodebookSpec]
Shapes = Mapping[str, tuple[int, int]]


class Layout(Protocol):
    """What a module of a layout provides; paths are such as `layers.0.mlp.up_proj`."""

    @property
    def KEY(self) -> str: ...

    def read_specs(
        self, hf: Mapping[str, Any], shapes: Shapes, names: Collection[str]
    ) -> dict[str, CodebookSpec]: ...

    def write_config(
        self, specs: Specs, shapes: Shapes, dense: Collection[str]
    ) -> dict[str, Any]: ...

    def field_shapes(self, spec: CodebookSpec, K: int, N: int) -> tuple[tuple[int, ...], ...]: ...

    def read_linear(
        self,
        name: str,
        spec: CodebookSpec,
        codes: np.ndarray,
        codebooks: np.ndarray,
        scales: np.ndarray,
        /,
    ) -> CodebookTensor: ...

    def write_linear(self, w: CodebookTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


LAYOUTS: dict[str, Layout] = {"jaxcodec": native, "codegemm": codegemm, "aqlm": aqlm}


def layout_named(name: str) -> Layout:
    """The layout of that name, refused unless it is one of `LAYOUTS`."""
    if name not in LAYOUTS:
        raise ValueError(f"The layout must be one of {', '.join(LAYOUTS)}, got {name!r}.")
    return LAYOUTS[name]


def recognise(hf: Mapping[str, Any]) -> Layout:
    """The layout that config.json speaks of; ours where it speaks of none.

    Raises:
      ValueError: several layouts.
    """
    found = [name for name, layout in LAYOUTS.items() if hf.get(layout.KEY) is not None]
    if len(found) > 1:
        keys = " and ".join(LAYOUTS[name].KEY for name in found)
        raise ValueError(f"config.json holds both {keys}; expected one layout of codebooks.")
    return LAYOUTS[found[0]] if found else native


def config_in(
    layout: Layout,
    hf: Mapping[str, Any],
    specs: Specs,
    shapes: Shapes,
    dense: Collection[str],
) -> dict[str, Any]:
    """config.json `hf` as `layout` writes it.

    Args:
      layout: one of `LAYOUTS`.
      hf: config.json, in any layout.
      specs: of the codebook linears, by path.
      shapes: (K, N) of every linear of the blocks, by path.
      dense: names of all tensors that are not codes, codebooks or scales.

    Raises:
      ValueError: what the layout cannot hold, by name; for all but ours also a dense model.
    """
    keys = {other.KEY for other in LAYOUTS.values()}
    plain = {key: value for key, value in hf.items() if key not in keys}
    if specs:
        return plain | layout.write_config(specs, shapes, dense)
    if layout is not native:
        raise ValueError("The model is dense: quantize it before it is written in this layout.")
    return plain
