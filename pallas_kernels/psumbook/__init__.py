"""One row times a codebook weight by gathering precomputed products: the Psumbook kernel."""

from jaxcodec.pallas_kernels.psumbook.kernel import matmul
from jaxcodec.pallas_kernels.psumbook.plan import Tiling, candidates, refusal, tiling

__all__ = ["Tiling", "candidates", "matmul", "refusal", "tiling"]
