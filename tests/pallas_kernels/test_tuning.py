"""The table of tile sizes: which entry serves a call, and that a bad file is refused."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from jaxcodec.pallas_kernels import tune, tuning
from jaxcodec.pallas_kernels.matmul import KERNELS
from jaxcodec.spec import CodebookSpec

SPEC = CodebookSpec.parse("m2v8g128")
ENTRY = tuning.Entry("m2v8g128", 4096, (4096,), 4, "mma_mosaic", {"warps": 8}, 6.5)
MORE = dataclasses.replace(ENTRY, M=16, us=9.0)


@pytest.fixture(autouse=True)
def user_directory(tmp_path, monkeypatch):
    """A user without tables, who must not meet those of whoever runs the tests."""
    monkeypatch.setenv("JAXCODEC_TUNING", str(tmp_path))
    tuning.table.cache_clear()
    yield tmp_path
    tuning.table.cache_clear()


@pytest.mark.parametrize(
    ("M", "wanted"), [(0, None), (1, ENTRY), (4, ENTRY), (5, MORE), (16, MORE), (17, None)]
)
def test_rows_are_served_by_the_next_larger_entry(M, wanted):
    assert tuning.Table.of([MORE, ENTRY]).entry(M, 4096, (4096,), SPEC) == wanted


def test_other_shapes_and_formats_have_no_entry():
    table = tuning.Table.of([ENTRY])
    assert table.entry(4, 4096, (4096, 4096), SPEC) is None
    assert table.entry(4, 8192, (4096,), SPEC) is None
    assert table.entry(4, 4096, (4096,), CodebookSpec.parse("m2v8g64")) is None


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "device.json"
    tuning.write(path, {"device": "some GPU"}, [MORE, ENTRY])
    assert tuning.read(path) == [ENTRY, MORE]
    assert json.loads(path.read_text())["device"] == "some GPU"
    tuning.write(path, {"device": "some GPU"}, [])
    assert tuning.read(path) == []


def test_the_users_table_goes_before_the_packages(user_directory):
    faster = dataclasses.replace(ENTRY, us=1.0)
    kind = "NVIDIA H100 80GB HBM3"
    before = tuning.table(kind)
    tuning.write(user_directory / "nvidia_h100_80gb_hbm3.json", {"device": kind}, [faster])
    tuning.table.cache_clear()
    after = tuning.table(kind)
    assert after.entry(4, 4096, (4096,), SPEC) == faster
    assert set(after.entries) == {*before.entries, ENTRY.key[:3]}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"entries": [{"spec": "m2v8g128"}]}'])
def test_a_broken_table_is_refused_by_name(tmp_path, text):
    path = tmp_path / "device.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"device\.json"):
        tuning.read(path)


def test_a_device_that_was_never_tuned_has_an_empty_table():
    assert tuning.table("Some GPU of 2031").entries == {}


def test_shipped_tables_name_tiles_that_exist():
    for path in (tuning.Path(tuning.__file__).parent / "tuning").glob("*.json"):
        entries = tuning.read(path)
        assert entries, path
        for entry in entries:
            CodebookSpec.parse(entry.spec).check_shape(entry.K, sum(entry.N))
            KERNELS[entry.kernel].Tiling(**entry.tiles)


def test_tasks_of_the_tuner():
    options = tune.Options(shapes=("256x128+64",), specs=("m2v8g128",), rows=(1, 8))
    assert [task.key for task in tune.tasks(options)] == [
        ("m2v8g128", 256, (128, 64), 1),
        ("m2v8g128", 256, (128, 64), 8),
    ]
    with pytest.raises(ValueError, match="such as 4096x14336, got '4096'"):
        tune.tasks(dataclasses.replace(options, shapes=("4096",)))
    with pytest.raises(ValueError, match="K = 100"):
        tune.tasks(dataclasses.replace(options, shapes=("100x64",)))


def faked(monkeypatch, us):
    """A GPU that takes us[kernel] microseconds, and computes by the reference."""

    def kernel_time(call, operands):
        x, weights = operands[0]
        name = call.keywords["name"]
        if name not in us:
            raise RuntimeError("out of registers")
        return us[name], 1.0, [tune.reference(x, w) for w in weights]

    class Device:
        platform, device_kind = "gpu", "Some GPU"

    def calls(task):
        tiles = KERNELS["psumbook_mosaic"].tiling(task.M, task.K, sum(task.Ns), task.spec)
        return {(name, tiles): tune.functools.partial(print, name=name) for name in KERNELS}

    monkeypatch.setattr(tune, "rotation", lambda call, operands: call)
    monkeypatch.setattr(tune, "kernel_time", kernel_time)
    monkeypatch.setattr(tune, "calls", calls)
    monkeypatch.setattr(tune.jax, "devices", lambda: [Device])
    monkeypatch.setattr(tune, "FOOTPRINT", 1)


def test_the_fastest_that_runs_is_kept_and_a_second_run_goes_on(monkeypatch, capsys):
    options = tune.Options(shapes=("128x128",), specs=("m2v8g128",), rows=(1,))
    faked(monkeypatch, {"psumbook_mosaic": 7.0, "mma_mosaic": 5.0})
    path = tune.tune(options)
    assert "wgmma_mosaic" in capsys.readouterr().err
    (entry,) = tuning.read(path)
    assert (entry.kernel, entry.us) == ("mma_mosaic", 5.0)
    faked(monkeypatch, {})  # would fail if anything were measured again
    tune.tune(options)
    assert tuning.read(path) == [entry]
    faked(monkeypatch, {"psumbook_mosaic": 3.0})
    tune.tune(dataclasses.replace(options, again=True))
    assert [e.us for e in tuning.read(path)] == [3.0]


def test_tuning_needs_a_gpu():
    options = tune.Options(shapes=("128x128",), rows=(1,))
    if tune.jax.default_backend() != "gpu":
        with pytest.raises(RuntimeError, match="cpu"):
            tune.tune(options)


def test_preferences_without_a_measurement():
    assert tuning.preferences(1, SPEC, jnp.dtype("bfloat16"))[0] == "psumbook_mosaic"
    assert tuning.preferences(8, SPEC, jnp.dtype("bfloat16"))[0] == "mma_mosaic"
    assert tuning.preferences(512, SPEC, jnp.dtype("bfloat16"))[0] == "wgmma_mosaic"
    assert tuning.preferences(512, SPEC, jnp.dtype("float32")) == ()
