"""Tiny random models shared by the tests of serve/, and a tokenizer of bytes."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcodec.models.config import ModelConfig
from jaxcodec.models.lora import ALL_TARGETS, ICARUS_TARGETS, Adapter, init_adapter
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, PREFILL_SHARE
from jaxcodec.models.transformer import Model, init_model
from jaxcodec.serve.buckets import Buckets
from jaxcodec.serve.engine import Engine

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=64,
    windows=(None, None),
    eos_ids=(0,),
)
ONE_SHAPE = Buckets(rows=(8,), tokens=(32,), pages=(16,))


class ByteTokenizer:
    """Token b is byte b; byte 0 ends a text."""

    eos_id = 0
    eos_ids = (0,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_completion(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t).decode(errors="replace")


@pytest.fixture(scope="session")
def one_shape() -> Buckets:
    """One shape of each step, so that a test compiles a lane once."""
    return ONE_SHAPE


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    """Bytes."""
    return ByteTokenizer()


@pytest.fixture(scope="session")
def base() -> Model:
    """A random model whose logits are far from uniform."""
    return jax.tree.map(lambda x: 4 * x, init_model(CONFIG, jax.random.key(1)))


@pytest.fixture(scope="session")
def module() -> Model:
    """Another of the same architecture, as prefill_share and full conventional models are."""
    return jax.tree.map(lambda x: 4 * x, init_model(CONFIG, jax.random.key(2)))


@pytest.fixture(scope="session")
def adapters(base: Model) -> dict[str, Adapter]:
    """Two for icarus, of different rank; one that writes the cache; one that is broken."""
    first = _random_adapter(base, 3, 4, ICARUS_TARGETS)
    return {
        "first": first,
        "second": _random_adapter(base, 4, 2, ICARUS_TARGETS),
        "writing": _random_adapter(base, 5, 4, ALL_TARGETS),
        # finite itself, but what it computes is not
        "broken": jax.tree.map(lambda x: jnp.full_like(x, 1e30), first),
    }


@pytest.fixture(scope="session")
def make_engine(base: Model, module: Model, adapters: dict[str, Adapter]) -> Callable[..., Engine]:
    """Makes engines that serve every scheme."""

    def make(**options) -> Engine:
        options = {"page_size": 4, "pages": 64, "max_batch": 8, "step_tokens": 32} | options
        options = {"buckets": ONE_SHAPE} | options
        engine = Engine(base, **options)
        engine.add_model("first", ICARUS, adapter=adapters["first"])
        engine.add_model("second", ICARUS, adapter=adapters["second"])
        engine.add_model("own", CONVENTIONAL, adapter=adapters["writing"])
        engine.add_model("whole", CONVENTIONAL, model=module)
        engine.add_model("module", PREFILL_SHARE, model=module)
        engine.add_model("adapted", PREFILL_SHARE, adapter=adapters["writing"])
        return engine

    return make


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    """An engine with room for everything."""
    return make_engine()


def _random_adapter(model: Model, seed: int, rank: int, targets: tuple[str, ...]) -> Adapter:
    adapter = init_adapter(model, jax.random.key(seed), rank=rank, alpha=8.0, targets=targets)
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype)
    return jax.tree.map(draw, adapter)
