"""Few rows times a codebook weight, with codebook vectors as operands of mma.sync."""

from jaxcodec.pallas_kernels.mma.kernel import matmul
from jaxcodec.pallas_kernels.mma.plan import Tiling, candidates, refusal, tiling

__all__ = ["Tiling", "candidates", "matmul", "refusal", "tiling"]
