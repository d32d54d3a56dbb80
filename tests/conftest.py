"""One strict session for every test: no network, four CPU devices (or a GPU), no rank promotion."""

import gc
import os

import jax
import pytest

# An interpreted kernel calls back from its threads: on two cores, work sent after it could take the
# thread that its callbacks wait for.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# Tracing makes many objects that stay; to look for garbage among them took 8 % of the time.
gc.set_threshold(100_000)

# Tokenizers and configs come from the test's own files; a hub look-up is a mistake.
os.environ["HF_HUB_OFFLINE"] = "1"

DEVICE = os.environ.get("JAXCODEC_TEST_DEVICE", "cpu")

if DEVICE not in ("cpu", "gpu"):
    raise pytest.UsageError(f"JAXCODEC_TEST_DEVICE must be cpu or gpu, got {DEVICE!r}.")
if DEVICE == "cpu":
    # The tests compile far more than they compute. XLA's newer emitters set up a compiler of their
    # own for every fusion: three quarters of the time to compile a training step of a tiny model.
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
        " --xla_cpu_parallel_codegen_split_count=1",
    )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
elif jax.default_backend() != "gpu":
    raise pytest.UsageError(f"JAXCODEC_TEST_DEVICE=gpu, but JAX runs on {jax.default_backend()}.")

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key() -> jax.Array:
    """A fixed PRNG key; split it for more than one draw."""
    return jax.random.key(0)
