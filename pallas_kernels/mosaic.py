"""How this package compiles and interprets its Mosaic GPU kernels."""

from jax.experimental.pallas import mosaic_gpu as plgpu


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
