"""PEFT adapters are read exactly, or refused by the name of what is wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxcodec.checkpoints.peft import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    LoraCheckpoint,
    read_adapter,
    write_adapter,
)
from jaxcodec.checkpoints.safetensors import read_tensor_file, write_tensor_file

FIXTURES = Path(__file__).parents[2] / "fixtures"
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
RANK, K, N = 3, 8, 6


@pytest.fixture
def adapter() -> LoraCheckpoint:
    rng = np.random.default_rng(0)

    def pair() -> tuple[np.ndarray, np.ndarray]:
        shapes = (RANK, K), (N, RANK)
        a, b = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
        return a, b

    return LoraCheckpoint({Q: pair(), UP: pair()}, RANK, 6.0, "base")


@pytest.fixture
def saved(tmp_path: Path, adapter: LoraCheckpoint) -> Path:
    write_adapter(tmp_path, adapter)
    return tmp_path


def configure(directory: Path, **changes: Any) -> None:
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retensor(directory: Path, **changes: np.ndarray | None) -> None:
    """Set tensors by a key such as `q_A`, or drop them."""
    names = {
        f"{short}_{half}": f"{PREFIX}{module}.lora_{half}.weight"
        for short, module in (("q", Q), ("up", UP))
        for half in "AB"
    }
    tensors = {k: np.array(v) for k, v in read_tensor_file(directory / WEIGHTS).items()}
    for short, tensor in changes.items():
        tensors.pop(names.get(short, short), None)
        if tensor is not None:
            tensors[names.get(short, short)] = tensor
    write_tensor_file(directory / WEIGHTS, tensors)


def test_what_is_written_is_read_back(saved: Path, adapter: LoraCheckpoint) -> None:
    read = read_adapter(saved)
    assert (read.rank, read.alpha, read.base_model) == (RANK, 6.0, "base")
    assert read.weights.keys() == adapter.weights.keys()
    for module, pair in adapter.weights.items():
        np.testing.assert_array_equal(read.weights[module][0], pair[0])
        np.testing.assert_array_equal(read.weights[module][1], pair[1])


@pytest.mark.parametrize(
    ("case", "rank", "alpha"), [("llama31_lora", 4, 8), ("llama31_lora_all", 3, 6)]
)
def test_a_directory_that_peft_wrote_is_read(case: str, rank: int, alpha: float) -> None:
    read = read_adapter(FIXTURES / case)
    tensors = read_tensor_file(FIXTURES / case / WEIGHTS)
    assert (read.rank, read.alpha) == (rank, alpha)
    assert len(tensors) == 2 * len(read.weights)
    for module, (a, b) in read.weights.items():
        np.testing.assert_array_equal(a, tensors[f"{PREFIX}{module}.lora_A.weight"])
        np.testing.assert_array_equal(b, tensors[f"{PREFIX}{module}.lora_B.weight"])


def test_a_rank_stabilised_adapter_keeps_its_scale(saved: Path) -> None:
    configure(saved, use_rslora=True)
    read = read_adapter(saved)
    assert read.alpha / read.rank == pytest.approx(6.0 / RANK**0.5)


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q_proj|up_proj)", [Q, "up_proj"]])
def test_targets_may_be_names_paths_or_a_regular_expression(saved: Path, targets: Any) -> None:
    configure(saved, target_modules=targets)
    assert set(read_adapter(saved).weights) == {Q, UP}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("layers_to_transform", [0]),
        ("exclude_modules", ["k_proj"]),
        ("layer_replication", [[0, 2]]),
        ("fan_in_fan_out", True),
        ("trainable_token_indices", [1]),
        ("a_field_of_the_future", {"x": 1}),
    ],
)
def test_options_that_change_the_result_are_refused_by_name(
    saved: Path, field: str, value: Any
) -> None:
    configure(saved, **{field: value})
    with pytest.raises(ValueError, match=f"{CONFIG}: {field} = .* is not supported"):
        read_adapter(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base weights"),
        ({"r": "8"}, "must be numbers, got '8'"),
        ({"r": 0}, "r must be positive"),
        ({"r": 5}, r"lora_A of .*q_proj must be \[5, K\] for r = 5, got \[3, 8\]"),
        ({"target_modules": ["q_proj"]}, "changes .*up_proj, which target_modules"),
        ({"target_modules": ["q_proj", "up_proj", "o_proj"]}, "names o_proj, for which"),
        ({"target_modules": r".*q_proj"}, "changes .*up_proj, which target_modules"),
        ({"target_modules": "("}, "is no regular expression"),
        ({"target_modules": None}, "must be a list of names or one regular expression"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    saved: Path, changes: dict[str, Any], message: str
) -> None:
    configure(saved, **changes)
    with pytest.raises(ValueError, match=message):
        read_adapter(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_A": None}, "q_proj lacks lora_A.weight"),
        ({"up_B": None}, "up_proj lacks lora_B.weight"),
        ({"base_model.model.lm_head.weight": np.ones(3)}, r"unexpected key .*lm_head\.weight"),
        ({"q_B": np.ones((N, RANK + 1), np.float32)}, r"lora_B of .* must be \[N, 3\]"),
        ({"q_A": np.ones(RANK, np.float32)}, r"lora_A of .* must be \[3, K\] .*got \[3\]"),
        ({"up_B": np.full((N, RANK), np.nan)}, "lora_B of .*up_proj holds NaN"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    saved: Path, changes: dict[str, Any], message: str
) -> None:
    retensor(saved, **changes)
    with pytest.raises(ValueError, match=message):
        read_adapter(saved)


def test_missing_fields_and_files_are_named(saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    del config["lora_alpha"]
    (saved / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{CONFIG} lacks lora_alpha"):
        read_adapter(saved)
    (saved / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=CONFIG):
        read_adapter(saved)


def test_a_missing_weights_file_is_named(saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        read_adapter(saved)


def test_an_adapter_of_nothing_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no LoRA weights"):
        write_adapter(tmp_path, LoraCheckpoint({}, RANK, 1.0))
