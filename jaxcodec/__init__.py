"""Codebook-quantized weights: format, quantizers and checkpoint formats."""

from jaxcodec.pack import pack_codes as pack_codes
from jaxcodec.pack import unpack_codes as unpack_codes
from jaxcodec.spec import CodebookSpec as CodebookSpec
from jaxcodec.tensor import CodebookTensor as CodebookTensor
from jaxcodec.tensor import dequantize as dequantize

__version__ = "0.1.0"
