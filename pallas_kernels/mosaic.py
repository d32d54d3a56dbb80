"""How this package compiles and interprets its Mosaic GPU kernels, and what all of them hold."""

from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxcodec.spec import CodebookSpec

# Tables of more codebooks leave no room in shared memory, and an entry is read as 32 bytes at most.
MOST_CODEBOOKS, LONGEST_VECTOR = 4, 16


def format_refusal(spec: CodebookSpec) -> str | None:
    """Why no kernel can hold a format, or None."""
    if spec.num_codebooks > MOST_CODEBOOKS or spec.vector_length > LONGEST_VECTOR:
        return (
            f"it holds at most m = {MOST_CODEBOOKS} codebooks of vectors of v = {LONGEST_VECTOR}, "
            f"and the format is {spec}"
        )
    return None


def compiler_params() -> plgpu.CompilerParams:
    """Code per CUDA thread, with no barrier but those that a kernel names."""
    return plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        # The barriers above order everything that threads of a block share.
        unsafe_no_auto_barriers=True,
    )


def interpreter(interpret: bool) -> plgpu.InterpretGPUParams | None:
    """JAX's interpreter, looking for races, if asked for."""
    return plgpu.InterpretGPUParams(detect_races=True) if interpret else None
