"""The matrix that a codebook weight stands for, written about as fast as memory takes it."""

from jaxcodec.pallas_kernels.dequantizer.kernel import dequantize
from jaxcodec.pallas_kernels.dequantizer.plan import refusal

__all__ = ["dequantize", "refusal"]
