"""Rows times a codebook weight, with codebook vectors as operands of wgmma."""

from jaxcodec.pallas_kernels.operands.layout import refusal
from jaxcodec.pallas_kernels.wgmma.kernel import matmul
from jaxcodec.pallas_kernels.wgmma.plan import Tiling, candidates, tiling

__all__ = ["Tiling", "candidates", "matmul", "refusal", "tiling"]
