"""A checkpoint gives back the same bits; a directory belongs to one run."""

import dataclasses
import errno
import shutil
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import serialization

from jaxcodec.train.checkpoint import Checkpoints, claim_directory, digest
from jaxcodec.train.step import TrainState, full_training, init_state, make_optimizer, make_schedule

OPTIMIZER = make_optimizer(make_schedule(1e-3, 0, 10), weight_decay=0.0, clip_norm=1.0)


@pytest.fixture
def state(codebook_model):
    return init_state(full_training(codebook_model), OPTIMIZER)


def at_step(state, step):
    return TrainState(jnp.int32(step), state.trainable, state.optimizer)


def test_a_checkpoint_gives_back_the_same_bits(state, tmp_path):
    state = jax.tree.map(lambda x: x + jnp.asarray(1 / 3, x.dtype), state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at_step(state, 7), {"next_index": 5})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 7
        restored, position = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    assert position == {"next_index": 5}
    chex.assert_trees_all_equal(restored, at_step(state, 7))
    chex.assert_trees_all_equal_structs(restored, state)


def test_the_last_few_are_kept(state, tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(at_step(state, step), {})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_a_write_that_was_cut_short_does_not_count(state, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at_step(state, 1), {"next_index": 1})
    torn = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-0"
    torn.mkdir()
    (torn / "state").write_bytes(b"half")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 1
        assert checkpoints.restore(state)[1] == {"next_index": 1}


def test_a_checkpoint_that_cannot_be_written_is_a_sentence(state, tmp_path, monkeypatch, caplog):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at_step(state, 1), {})

        async def full(*_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=1000))
            with pytest.raises(OSError, match="step 2 needs .* has 1,000"):
                checkpoints.save(at_step(state, 2), {})
        monkeypatch.setattr(serialization, "async_serialize_from_host", full)
        caplog.clear()
        with pytest.raises(OSError, match="of step 2 could not .* before it are kept: .*No space"):
            checkpoints.save(at_step(state, 2), {})
        assert not caplog.records
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 1


def test_a_checkpoint_of_another_model_is_refused(state, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at_step(state, 1), {})
        for other in ({"other": jnp.zeros(3)}, jax.tree.map(lambda x: x[None], state.trainable)):
            with pytest.raises(ValueError, match="step 1 in .* holds other arrays than this run"):
                checkpoints.restore(dataclasses.replace(state, trainable=other))


def cut(folder, pattern):
    files = [file for file in folder.glob(pattern) if file.is_file()]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    "arrays": lambda folder: cut(folder, "state/ocdbt.process_0/d/*"),
    "metadata": lambda folder: cut(folder, "state/_METADATA"),
    "position": lambda folder: cut(folder, "data/metadata"),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "no position": lambda folder: (folder / "data" / "metadata").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_a_sentence_that_leads_to_the_one_before(
    state, tmp_path, damage, capfd
):
    folders = [tmp_path / "checkpoints" / str(step) for step in (1, 2)]
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(at_step(state, step), {"next_index": step})
    for folder, where in zip(folders[::-1], ("goes on from step 1", "begins anew"), strict=True):
        DAMAGES[damage](folder)
        advice = (
            rf"of step {folder.name} in .* is damaged \(.*remove the folder {folder}, .* {where}"
        )
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=advice) as said:
            checkpoints.restore(state)
        assert len(str(said.value)) < 800
        shutil.rmtree(folder)
    assert "Traceback" not in capfd.readouterr().err  # of reads that were under way
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        MemoryError(),
        PermissionError(13, "Permission denied"),
        OSError(errno.EIO, "Input/output error"),
        TypeError("restore() got an unexpected keyword argument"),
        ValueError("RESOURCE_EXHAUSTED: Too many open files"),
        ValueError("UNAVAILABLE: the file system does not answer"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
    ],
)
def test_what_ails_the_machine_is_no_damage(state, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    def wrap(*_, **__):  # as orbax does
        raise Exception("Encountered error while reading") from error

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at_step(state, 1), {})
        for read in (fail, wrap):
            monkeypatch.setattr(checkpoints._manager, "restore", read)
            with pytest.raises(type(error)) as raised:
                checkpoints.restore(state)
            assert raised.value is error


def test_nothing_to_restore_is_said(state, tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(FileNotFoundError, match="holds no"):
        checkpoints.restore(state)


def test_a_directory_of_another_run_is_refused_naming_what_differs(tmp_path):
    manifest = {"steps": 10, "data": "abc", "seed": 0}
    claim_directory(tmp_path, manifest)
    claim_directory(tmp_path, dict(manifest))
    with pytest.raises(ValueError, match="data was 'abc' and is 'xyz'; steps was 10 and is 20"):
        claim_directory(tmp_path, manifest | {"data": "xyz", "steps": 20})
    with pytest.raises(ValueError, match="rank was None and is 4"):
        claim_directory(tmp_path, manifest | {"rank": 4})


def test_runs_that_have_little_in_common_differ_in_a_sentence(tmp_path):
    claim_directory(tmp_path, {f"a{i}": "x" * 10_000 for i in range(20)})
    with pytest.raises(
        ValueError, match="a0 was 'xxx.*xxx' and is None; .*; and 32 more"
    ) as refused:
        claim_directory(tmp_path, {f"b{i}": i for i in range(20)})
    assert len(str(refused.value)) < 1000


def test_a_directory_with_other_things_is_no_runs(tmp_path):
    (tmp_path / ".run.json.7.tmp").touch()  # killed
    claim_directory(tmp_path, {"steps": 1})
    (tmp_path / "run.json").unlink()
    (tmp_path / "log.jsonl").write_text("somebody's")
    for path, what in ((tmp_path, "is not empty, and"), (tmp_path / "log.jsonl", "is a file")):
        with pytest.raises(ValueError, match=what):
            claim_directory(path, {"steps": 1})
    assert (tmp_path / "log.jsonl").read_text() == "somebody's"


def test_a_digest_sees_every_value_shape_dtype_and_name():
    trees = [
        {"a": np.zeros(4, np.float32)},
        {"a": np.zeros(4, np.int32)},
        {"a": np.zeros((2, 2), np.float32)},
        {"a": np.array([0, 0, 0, 1e-9], np.float32)},
        {"b": np.zeros(4, np.float32)},
        {"a": np.zeros(4, np.float32), "c": np.zeros((), np.float32)},
    ]
    assert len({digest(tree) for tree in trees}) == len(trees)
    assert digest(trees[0]) == digest({"a": jnp.zeros(4)})


def test_a_digest_sees_the_sizes_of_a_model(model, codebook_model):
    assert digest(model) != digest(codebook_model)
