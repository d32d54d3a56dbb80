"""Rows times a codebook weight, with codebook vectors as operands of wgmma."""

from jaxcodec.pallas_kernels.wgmma.kernel import matmul
from jaxcodec.pallas_kernels.wgmma.plan import Tiling, candidates, refusal, tiling

__all__ = ["Tiling", "candidates", "matmul", "refusal", "tiling"]
