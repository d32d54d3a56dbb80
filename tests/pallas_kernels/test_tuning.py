"""The table of tile sizes: which entry serves a call, and that a bad file is refused."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxcodec.pallas_kernels import matmul, tune, tuning
from jaxcodec.pallas_kernels.kernels import KERNELS
from jaxcodec.pallas_kernels.timing import UNTUNED
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import random_codebook_tensor

KEY = jax.random.key(0)
SPEC = CodebookSpec.parse("m2v8g128")
TILES = {"rows": 16, "columns": 32, "width": 16, "parts": 4, "stages": 4}
ENTRY = tuning.Entry("m2v8g128", 4096, (4096,), 4, "mma_mosaic", TILES, 6.5)
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


REFUSED = r"device\.json is not a table of tile sizes \(.*{}.*\); delete it, then run python -m"


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "\x00", '{"entries": 5}', '{"entries": {}}', '{"entries": null}'),
        *('{"entries": [[]]}', '{"entries": [7]}', '{"entries": [{"spec": "m2v8g128"}]}'),
        '{"entries": ' + 100_000 * "[",
    ],
)
def test_a_broken_table_is_refused_by_name(tmp_path, text):
    path = tmp_path / "device.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=REFUSED.format("")):
        tuning.read(path)


def write_rows(path, *changes):
    """A table of ENTRY with other values, and as JSON has it."""
    rows = [dataclasses.asdict(ENTRY) | change for change in changes]
    path.write_text(json.dumps({"entries": rows}))
    return path


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("spec", [None, 3]),
        ("K", [0, -4096, 4096.0, "4096", True, None]),
        ("N", [4096, [], [0], ["4096"], [[4096]], "4096", None]),
        ("M", [0, 4.0, [4], False]),
        ("kernel", [None, ["mma_mosaic"], 3]),
        ("tiles", [None, [], {"rows": 0}, TILES | {"stages": "4"}, TILES | {"parts": 1.5}]),
        ("us", [0, -1.0, "6.5", None, True, float("nan"), float("inf")]),
        ("more", [1]),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(tmp_path, field, values):
    for value in values:
        path = write_rows(tmp_path / "device.json", {}, {field: value})
        with pytest.raises(ValueError, match=REFUSED.format(field)):
            tuning.read(path)


def test_mma_tiles_of_fewer_rows_than_the_entry_are_refused(tmp_path):
    path = write_rows(tmp_path / "device.json", {"M": 16}, {"M": 17})
    with pytest.raises(ValueError, match=REFUSED.format("M = 17 but tiles of 16 rows")):
        tuning.read(path)
    tiles = dataclasses.asdict(KERNELS["wgmma_mosaic"].tiling(64, 4096, [4096], SPEC))
    change = {"M": 1024, "kernel": "wgmma_mosaic", "tiles": tiles}
    assert len(tuning.read(write_rows(path, change))) == 1  # which walks tiles of rows


def test_a_directory_in_place_of_a_table_is_refused_by_name(user_directory):
    (user_directory / "device.json").mkdir()
    with pytest.raises(ValueError, match=REFUSED.format("")):
        tuning.table("Device")


def test_entries_of_other_versions_are_left_out_with_a_warning(user_directory):
    fewer = {name: value for name, value in TILES.items() if name != "parts"}
    path = write_rows(
        user_directory / "device.json",
        *({}, {"M": 5, "kernel": "future"}, {"M": 6, "tiles": TILES | {"warps": 8}}),
        *({"M": 7, "tiles": fewer}, {"M": 8, "tiles": {}}),
    )
    with pytest.warns(UserWarning, match=r"device\.json: 4 of 5 entries are left out") as told:
        table = tuning.table("Device")
    assert len(told) == 1
    assert table.entries == {ENTRY.key[:3]: (ENTRY,)}
    tuning.write(path, {"device": "Device"}, [ENTRY])
    assert tuning.read(path) == [ENTRY]


@pytest.mark.parametrize(
    ("kernel", "changes"),
    [
        ("psumbook_mosaic", {"warpgroups": 9, "columns": 3, "chunks": 99, "words": 64, "books": 3}),
        (
            "mma_mosaic",
            {"rows": 24, "columns": 1000, "width": 8, "parts": 99, "stages": 3},
        ),
        (
            "wgmma_mosaic",
            {"rows": 512, "strips": 5, "parts": 5, "cluster": 8, "stages": 1},
        ),
    ],
)
def test_sizes_that_cannot_be_are_left_out(tmp_path, kernel, changes):
    tiles = dataclasses.asdict(KERNELS[kernel].tiling(1, 4096, [4096], SPEC))
    row = {"kernel": kernel, "M": 1, "tiles": tiles}
    assert len(tuning.read(write_rows(tmp_path / "device.json", row))) == 1
    for name, value in changes.items():
        path = write_rows(tmp_path / "device.json", row | {"tiles": tiles | {name: value}})
        with pytest.warns(UserWarning, match="1 of 1 entries are left out"):
            assert tuning.read(path) == []


def test_a_shape_that_finds_no_room_does_not_stop_the_next(monkeypatch, capsys):
    faked(monkeypatch, {"mma_mosaic": 5.0})
    multiply = tune.references

    def references(x, weights):
        if not isinstance(x, jax.core.Tracer) and x.shape[1] == 128:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return multiply(x, weights)

    monkeypatch.setattr(tune, "references", references)
    options = tune.Options(shapes=("128x128", "256x128"), specs=("m2v8g128",), rows=(1,))
    path = tune.tune(options)
    assert "m2v8g128 128x128 M=1: RuntimeError: RESOURCE_EXHAUSTED" in capsys.readouterr().err
    assert [entry.K for entry in tuning.read(path)] == [256]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("spec", ["m1v4g128", "m2v8g128", "m3v4g32", "m4v8g64"])
def test_candidates_can_be(kernel, spec):
    spec = CodebookSpec.parse(spec)
    for M, K, N in [(1, 4096, 4096), (32, 8192, 28672), (64, 14336, 1000)]:
        for tiles in KERNELS[kernel].candidates(M, K, [N], spec):
            tiles.check(spec)


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
    for rows in (0, -3):
        with pytest.raises(ValueError, match=f"rows must be at least 1, got {rows}"):
            tune.tasks(dataclasses.replace(options, rows=(8, rows)))
    for name in ("shapes", "specs", "rows"):
        with pytest.raises(ValueError, match=f"{name} must not be empty"):
            tune.tasks(dataclasses.replace(options, **{name: ()}))


def faked(monkeypatch, us):
    """A GPU that takes us[kernel] microseconds, and computes by the reference."""

    def kernel_time(runs, wait):
        name = runs[0].keywords["name"]
        if name not in us:
            raise RuntimeError("out of registers")
        return us[name], 1.0

    def multiply(x, weights, *, name):
        return [tune.reference(x, w) for w in weights]

    class Device:
        platform, device_kind = "gpu", "Some GPU"

    def calls(task):
        return {
            (name, KERNELS[name].tiling(task.M, task.K, task.Ns, task.spec)): (
                tune.functools.partial(multiply, name=name)
            )
            for name in KERNELS
        }

    def compiled(call, operands, options=None):
        # Whatever XLA tunes by running it would run while another process measures.
        candidate = isinstance(call, tune.functools.partial) and call.func is multiply
        assert options == (None if candidate else UNTUNED)
        return call

    monkeypatch.setattr(tune, "compiled", compiled)
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


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tune", *map(str, arguments)])
    tune.main()


ONE = ("--shapes", "128x128", "--specs", "m2v8g128", "--rows", "1")


def test_the_command_tells_where_the_table_is(monkeypatch, capsys, tmp_path):
    faked(monkeypatch, dict.fromkeys(KERNELS, 7.0))
    path = tmp_path / "other.json"
    run_main(monkeypatch, *ONE, "--out", path)
    assert capsys.readouterr().out.endswith(f"Written to {path}.\n")
    assert len(tuning.read(path)) == 1
    faked(monkeypatch, {})  # all fail, and the table stays
    run_main(monkeypatch, *ONE, "--out", path, "--again")
    assert capsys.readouterr().out.endswith(f"Written to {path}.\n")


def test_the_command_tells_that_nothing_was_measured(monkeypatch, capsys, user_directory):
    faked(monkeypatch, {})
    monkeypatch.setattr(tune, "calls", lambda task: {})
    run_main(monkeypatch, *ONE)
    told = capsys.readouterr()
    assert told.out.endswith("Nothing measured.\n")
    assert "Written" not in told.out
    assert "m2v8g128 128x128 M=1: no kernel can run it." in told.err
    assert not list(user_directory.iterdir())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--rows", "0"), "rows must be at least 1, got 0"),
        (("--shapes",), "shapes must not be empty"),
        (("--shapes", "4096"), "such as 4096x14336"),
        (("--specs", "m9"), "such as m2v8g128"),
        ((*ONE, "--out", "broken"), "broken is not a table of tile sizes"),
        ((*ONE, "--out", "."), r"\. is not a table of tile sizes"),
    ],
)
def test_the_command_ends_with_one_sentence(monkeypatch, tmp_path, arguments, reason):
    faked(monkeypatch, {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").write_text('{"entries": [[]]}')
    with pytest.raises(SystemExit, match=rf"jaxcodec.pallas_kernels.tune: .*{reason}"):
        run_main(monkeypatch, *arguments)


def test_the_help_tells_which_tables_are_read(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, "--help")
    told = "".join(c for c in capsys.readouterr().out if c.isalnum() or c in "_./$")
    assert "codebook_matmulreadsonlytablesintuning.user_directory" in told


def test_tuning_needs_a_gpu():
    options = tune.Options(shapes=("128x128",), rows=(1,))
    if tune.jax.default_backend() != "gpu":
        with pytest.raises(RuntimeError, match="cpu"):
            tune.tune(options)


# M differs, as a call of one shape is traced once.
@pytest.mark.parametrize(
    ("M", "together", "apart"), [(2, 16.9, False), (3, 17.1, True), (4, None, False)]
)
def test_weights_go_apart_where_that_was_clearly_faster(
    user_directory, monkeypatch, M, together, apart
):
    entries = [dataclasses.replace(ENTRY, K=256, N=(N,), us=6.0) for N in (64, 128)]
    if together is not None:
        entries.append(dataclasses.replace(ENTRY, K=256, N=(64, 128), us=together))
    kind = jax.devices()[0].device_kind
    tuning.write(user_directory / tuning.file_name(kind), {"device": kind}, entries)
    asked = []

    def choose(M, K, Ns, spec, dtype):
        asked.append(tuple(Ns))
        return "reference"

    monkeypatch.setattr(matmul, "choose", choose)
    weights = [random_codebook_tensor(KEY, SPEC, 256, N) for N in (64, 128)]
    launches = [(64,), (128,)] if apart else [(64, 128)]
    x = jax.random.normal(KEY, (M, 256), jnp.bfloat16)
    ys, pull_back = jax.vjp(lambda x: matmul.codebook_matmuls(x, weights), x)
    assert asked == launches
    pull_back(ys)
    assert asked == 2 * launches
    asked.clear()
    matmul.codebook_matmuls(jnp.ones((M, 256)), weights)  # float32, of which no table tells
    assert asked == [(64, 128)]


def test_preferences_without_a_measurement():
    first = lambda M, Ns, spec: tuning.preferences(M, 8192, Ns, spec, jnp.dtype("bfloat16"))[0]
    one, two = CodebookSpec.parse("m1v4g128"), CodebookSpec.parse("m2v8g128")
    assert first(1, [28672], one) == first(1, [1024], two) == "psumbook_mosaic"
    assert first(1, [28672, 28672], one) == "psumbook_mosaic"
    assert first(1, [1024], one) == first(1, [8192, 1024, 1024], two) == "mma_mosaic"
    assert first(8, [28672], two) == first(32, [8192], one) == "mma_mosaic"
    assert first(32, [8192], two) == first(512, [28672], two) == "wgmma_mosaic"
    assert tuning.preferences(512, 8192, [8192], two, jnp.dtype("float32")) == ()
