"""Named shapes of real linear layers, shared by tests and benchmarks.

Letters: K input and N output features. Source: the config.json of each model.
"""

# k and v have 8 heads of 128, gate and up are alike.
LLAMA_8B = {
    "llama_8b_q_o": (4096, 4096),
    "llama_8b_k_v": (4096, 1024),
    "llama_8b_gate_up": (4096, 14336),
    "llama_8b_down": (14336, 4096),
}
LLAMA_70B = {
    "llama_70b_q_o": (8192, 8192),
    "llama_70b_k_v": (8192, 1024),
    "llama_70b_gate_up": (8192, 28672),
    "llama_70b_down": (28672, 8192),
}
# Weights that share x, which one launch serves: K and the N of each.
LLAMA_8B_TOGETHER = {
    "llama_8b_qkv": (4096, (4096, 1024, 1024)),
    "llama_8b_gate_up_together": (4096, (14336, 14336)),
}
LLAMA_70B_TOGETHER = {
    "llama_70b_qkv": (8192, (8192, 1024, 1024)),
    "llama_70b_gate_up_together": (8192, (28672, 28672)),
}
# A specification, K, N for each branch of the kernels, small enough to interpret.
TINY = {
    "tiny_m1v4": ("m1v4g128", 256, 256),
    "tiny_m2v8": ("m2v8g128", 256, 256),
    "tiny_two_column_tiles": ("m2v8g64", 128, 1024),
    "tiny_ragged_columns": ("m1v4g64", 128, 200),
    "tiny_row_scale": ("m1v8g128", 128, 128),
    "tiny_small_groups": ("m3v4g16", 64, 128),
    "tiny_long_vectors": ("m4v16g64", 64, 128),
    "tiny_short_vectors": ("m1v2g32", 64, 128),
}
