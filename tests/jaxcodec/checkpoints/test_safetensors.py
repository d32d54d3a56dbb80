"""What is written is read back bit for bit; damage is named; a failed write changes nothing."""

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxcodec.checkpoints.safetensors import (
    DTYPES,
    FILE,
    INDEX,
    read_tensor_file,
    read_tensors,
    write_tensor_file,
    write_tensors,
)


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {f"layer.{i}": rng.normal(size=(3, 5)).astype(np.float32) for i in range(4)}
    return tensors | {"norm": np.ones(7, ml_dtypes.bfloat16), "codes": np.arange(6, dtype="<u4")}


def assert_equal(read: dict[str, np.ndarray], written: dict[str, np.ndarray]) -> None:
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype
        np.testing.assert_array_equal(read[name], np.asarray(tensor))


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of several shards with an index."""
    write_tensors(tmp_path, some_tensors(), shard_bytes=100)
    return tmp_path


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file can grow beyond 4 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@settings(deadline=None, max_examples=20)
@given(shard_bytes=st.integers(1, 400))
def test_any_size_of_shard_gives_back_the_same_tensors(
    tmp_path_factory: pytest.TempPathFactory, shard_bytes: int
) -> None:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tensors(directory, some_tensors(), shard_bytes=shard_bytes)
    assert_equal(read_tensors(directory), some_tensors())
    sizes = [path.stat().st_size for path in directory.glob("*.safetensors")]
    assert len(sizes) == 1 or (directory / INDEX).exists()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_survives(tmp_path: Path, dtype: np.dtype) -> None:
    tensors = {"x": np.arange(12).reshape(3, 4).astype(dtype), "scalar": np.ones((), dtype)}
    write_tensors(tmp_path, tensors)
    assert_equal(read_tensors(tmp_path), tensors)


def test_order_in_memory_is_no_part_of_a_tensor(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    write_tensors(tmp_path, {"transposed": x.T, "strided": x[::2, ::3], "jax": jnp.asarray(x)})
    read = read_tensors(tmp_path)
    np.testing.assert_array_equal(read["transposed"], x.T)
    np.testing.assert_array_equal(read["strided"], x[::2, ::3])
    np.testing.assert_array_equal(read["jax"], x)


def test_the_file_is_one_that_others_read(tmp_path: Path) -> None:
    write_tensors(tmp_path, some_tensors())
    assert_equal(load_file(tmp_path / FILE), some_tensors())
    (tmp_path / "plain").touch()
    assert (tmp_path / FILE).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_writing_again_leaves_no_file_of_the_checkpoint_before(sharded: Path) -> None:
    assert len(files(sharded)) > 3
    (sharded / "tokenizer.json").write_text("{}")
    write_tensors(sharded, {"x": np.ones(3)})
    assert files(sharded) == [FILE, "tokenizer.json"]
    write_tensors(sharded, some_tensors(), shard_bytes=200)
    assert FILE not in files(sharded)
    assert_equal(read_tensors(sharded), some_tensors())


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, small_disk: None) -> None:
    write_tensors(tmp_path, some_tensors())
    before = files(tmp_path)
    with pytest.raises(OSError, match="could not be written"):
        write_tensors(tmp_path, {"x": np.zeros(10_000)})
    with pytest.raises(OSError, match="could not be written"):
        write_tensors(tmp_path, some_tensors() | {"x": np.zeros(10_000)}, shard_bytes=100)
    assert files(tmp_path) == before
    assert_equal(read_tensors(tmp_path), some_tensors())


def test_a_dtype_that_is_not_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x has a dtype that is not stored, complex64"):
        write_tensors(tmp_path, {"x": np.ones(2, np.complex64)})
    assert files(tmp_path) == []


def test_a_dtype_that_is_not_read_is_refused(tmp_path: Path) -> None:
    save_file({"x": np.ones(2, np.complex64)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="x has the dtype C64, expected one of BF16"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    write_tensors(tmp_path, some_tensors())
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:kept])
    with pytest.raises(ValueError, match=f"{FILE} is truncated or not a safetensors file"):
        read_tensors(tmp_path)


def test_a_damaged_header_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes((4).to_bytes(8, "little") + b"{]}x")
    with pytest.raises(ValueError, match=f"{FILE} is truncated or not"):
        read_tensors(tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint directory .*nowhere"):
        read_tensors(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"neither {FILE} nor {INDEX}"):
        read_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file .*adapter\.safetensors"):
        read_tensor_file(tmp_path / "adapter.safetensors")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = next(sharded.glob("model-00002-of-*"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names the shard {shard.name}: it is missing"):
        read_tensors(sharded)


def edit_index(directory: Path, edit) -> None:
    index = json.loads((directory / INDEX).read_text())
    edit(index)
    (directory / INDEX).write_text(json.dumps(index))


def test_a_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    shard = next(sharded.glob("model-00001-of-*")).name
    edit_index(sharded, lambda index: index["weight_map"].update(ghost=shard))
    with pytest.raises(ValueError, match=f"{shard} lacks the tensor ghost"):
        read_tensors(sharded)


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*"))[:2]
    write_tensor_file(second, read_tensor_file(second) | {"layer.0": np.zeros(1)})
    with pytest.raises(
        ValueError, match=rf"{second.name} holds .*layer\.0, .* places in {first.name}"
    ):
        read_tensors(sharded)


def test_a_tensor_that_the_index_does_not_name_is_named(sharded: Path) -> None:
    write_tensors(sharded, some_tensors(), shard_bytes=130)  # two in the first shard
    edit_index(sharded, lambda index: index["weight_map"].pop("layer.0"))
    with pytest.raises(ValueError, match=r"holds the tensor layer\.0, .* places in no shard"):
        read_tensors(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object, got a list"),
        ("{}", '"weight_map" from tensor to shard'),
        ('{"weight_map": {}}', '"weight_map" from tensor to shard'),
        ('{"weight_map": {"x": "a"}, "weights": 1}', r"got the keys \['weight_map', 'weights'\]"),
        ('{"weight_map": {"x": "../a.safetensors"}}', "shard of x must be a file name"),
        ('{"weight_map": {"x": 3}}', "shard of x must be a file name, got 3"),
    ],
)
def test_a_wrong_index_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=f"{INDEX}.*{message}"):
        read_tensors(tmp_path)


def test_a_single_file_beside_an_index_is_refused(sharded: Path) -> None:
    write_tensor_file(sharded / FILE, some_tensors())
    with pytest.raises(ValueError, match=f"holds both {FILE} and {INDEX}"):
        read_tensors(sharded)
