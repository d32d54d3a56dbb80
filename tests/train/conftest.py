"""A tiny model, a byte tokenizer and a tiny task, for every test of training."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxcodec.models.config import ModelConfig
from jaxcodec.models.load import save_model
from jaxcodec.models.transformer import Model, init_model
from jaxcodec.spec import CodebookSpec
from jaxcodec.train.data import Batch, read_examples
from jaxcodec.train.step import (
    Objective,
    TrainState,
    init_state,
    make_optimizer,
    make_schedule,
    make_train_step,
)

KEY = jax.random.key(0)
PATHS = ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")
PAIRS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(4) for b in range(4)]


class ByteTokenizer:
    """Bytes of ASCII are ids; 0 ends a text."""

    eos_id = 0
    eos_ids = (0,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("ascii"))

    def encode_completion(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("ascii")


@pytest.fixture(scope="session")
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_positions=128,
        windows=(None, None),
        tie_embeddings=True,
        eos_ids=(0,),
    )


@pytest.fixture(scope="session")
def shallow(config: ModelConfig) -> ModelConfig:
    """One layer: half the time to compile, where depth has no part in what is tested."""
    return dataclasses.replace(config, num_layers=1, windows=(None,))


@pytest.fixture(scope="session")
def shallow_model(shallow: ModelConfig) -> Model:
    return init_model(shallow, KEY)


@pytest.fixture(scope="session")
def model(config: ModelConfig) -> Model:
    return init_model(config, KEY)


@pytest.fixture(scope="session")
def codebook_model(config: ModelConfig) -> Model:
    spec = CodebookSpec.parse("m1v4g32")
    return init_model(config, jax.random.key(1), specs=tuple((path, spec) for path in PATHS))


def write(path: Path, *lines: dict | bytes) -> Path:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes each argument as a line of data.jsonl: a record as JSON, bytes as they are."""
    return functools.partial(write, tmp_path / "data.jsonl")


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", *PAIRS)


@pytest.fixture(scope="session")
def batch(pairs_file: Path, tokenizer: ByteTokenizer) -> Batch:
    return read_examples(pairs_file, tokenizer, 8).rows(np.arange(8))


@pytest.fixture
def run() -> Callable[..., tuple[TrainState, list[float]]]:
    return run_steps


@pytest.fixture
def differing() -> Callable[[nnx.State, nnx.State], set[str]]:
    return differing_paths


def run_steps(
    objective: Objective,
    batch: Batch,
    steps: int = 3,
    optimizer: optax.GradientTransformation | None = None,
    accumulate: int = 1,
) -> tuple[TrainState, list[float]]:
    """The state after some steps on one batch, and the losses on the way."""
    if optimizer is None:
        optimizer = make_optimizer(make_schedule(1e-2, 0, 100), weight_decay=0.0, clip_norm=1.0)
    train_step = make_train_step(objective, optimizer, accumulate)
    state, losses = init_state(objective, optimizer), []
    for _ in range(steps):
        state, metrics = train_step(state, objective.frozen, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


def differing_paths(before: nnx.State, after: nnx.State) -> set[str]:
    """Paths of the leaves that changed."""
    pairs = zip(nnx.to_flat_state(before), nnx.to_flat_state(after), strict=True)
    return {
        ".".join(map(str, path))
        for (path, old), (_, new) in pairs
        if not np.array_equal(old.get_value(), new.get_value())
    }


@pytest.fixture
def base(shallow: ModelConfig, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with a model, whose linears have one shape, and the tokenizer of the fixtures."""
    directory = tmp_path / "base"
    config = dataclasses.replace(shallow, vocab_size=300, num_kv_heads=4, intermediate_size=64)
    save_model(directory, init_model(config, KEY))
    tokenizer = request.config.rootpath / "tests/fixtures/tokenizer"
    shutil.copytree(tokenizer, directory, dirs_exist_ok=True)
    return directory
