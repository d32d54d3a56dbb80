"""The kernels by name, for the choice among them, the tuner and its tables."""

from types import ModuleType

from jaxcodec.pallas_kernels import mma, psumbook, wgmma

# Kernels for Hopper GPUs, each a package with Tiling, refusal, tiling, candidates and matmul.
KERNELS: dict[str, ModuleType] = {
    "psumbook_mosaic": psumbook,
    "mma_mosaic": mma,
    "wgmma_mosaic": wgmma,
}
