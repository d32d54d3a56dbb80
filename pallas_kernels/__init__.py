"""Operations on codebook-quantized weights, and the kernels that serve them."""
