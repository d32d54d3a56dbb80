"""The command: a directory in, a directory out, and the same again when it is given again."""

import json
import shutil
from pathlib import Path

import jax
import pytest

from jaxcodec.models.load import load_model
from jaxcodec.spec import CodebookSpec
from jaxcodec.train.quantization_report import inspect_model
from jaxcodec.train.quantize import compiled_programs_in, quantize

SPEC = "m1v4b4g32"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    sums = [f"{a} and {b} make {a + b}. " * 4 for a in range(9) for b in range(9)]
    lines = [json.dumps({"text": text}) for text in sums]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "text.jsonl"


def test_the_result_loads_and_the_same_command_finds_it(
    base: Path, text: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    (base / "generation_config.json").write_text("{}")
    config = json.loads((base / "config.json").read_text())
    config |= {"their_own": 1, "jaxcodec": None, "auto_map": {"AutoModel": "theirs.py"}}
    (base / "config.json").write_text(json.dumps(config))
    options = {"spec": SPEC, "out": out, "data": text, "preset": "kmeans", "length": 16}
    options |= {"sequences": 18, "batch_size": 4, "layers": ("down_proj=dense", "q_proj=m2v4b4g32")}
    quantize(base, **options)
    assert "16 calibration sequences of 16 tokens" in capsys.readouterr().out
    formats = {path.rsplit(".", 1)[1]: str(spec) for path, spec in load_model(out).specs}
    assert formats["q_proj"] == "m2v4b4g32"
    assert formats["up_proj"] == SPEC
    assert "down_proj" not in formats
    files = {path.name for path in out.iterdir()}
    expected = {"run.json", "config.json", "model.safetensors", "tokenizer.json"}
    assert files >= expected | {"quantization.json", "quantization.svg", "generation_config.json"}
    written = json.loads((out / "config.json").read_text())
    assert written["their_own"] == 1
    assert written["jaxcodec"]["specs"]
    assert not files & {"blocks", "compiled"}
    before = (out / "model.safetensors").stat().st_mtime_ns
    (out / "blocks").mkdir()  # killed before it was removed
    quantize(base, **options)
    assert not (out / "blocks").exists()
    printed = capsys.readouterr().out
    assert printed.endswith(f"{inspect_model(out)}\n")
    mean = json.loads((out / "quantization.json").read_text())["bits_per_weight"]
    assert f"7 linears at {(6 * mean + 32) / 7:.3f} bits per weight, 6 of them quantized" in printed
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds another run: seed was 0 and is 7"):
        quantize(base, **options, seed=7)
    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="finished run whose files are damaged: .*Remove its conf"):
        quantize(base, **options)
    (out / "config.json").unlink()
    quantize(base, **options)
    assert (out / "model.safetensors").read_bytes() == weights


def test_a_format_that_makes_a_linear_larger_is_told(base: Path, tmp_path: Path, capsys) -> None:
    layers = ("q_proj=m1v4b8g32", r"\.=dense")
    quantize(base, spec=SPEC, out=tmp_path / "out", preset="kmeans", layers=layers)
    # float32 here: 2 bits of codes, 8 of codebooks (256 x 4 of 32 bits for 64 x 64), 1 of scales.
    assert "no smaller than dense" not in capsys.readouterr().out
    layers = ("q_proj=m4v4b8g32", r"\.=dense")
    quantize(base, spec=SPEC, out=tmp_path / "large", preset="kmeans", layers=layers)
    found = capsys.readouterr().out
    assert "32 bits per weight, codebooks counted: 1 of the linears" in found
    assert "layers.0.self_attn.q_proj 41.0" in found


def test_the_report_tells_bits_and_errors_of_every_linear(
    base: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize(base, spec=SPEC, out=out, data=text, preset="fast", length=16, sequences=16)
    report = inspect_model(out)
    for linear in report.linears:
        assert linear.activation_error is not None
        assert linear.relative_error is not None
        assert 0 < linear.activation_error < linear.relative_error
        bits = CodebookSpec.parse(SPEC).bits_per_weight(linear.K, linear.N, value_bits=32)
        assert linear.bits_per_weight == bits


def test_compiled_programs_are_kept_for_one_run_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in options]
    for number in range(2):
        folder = tmp_path / str(number)
        with compiled_programs_in(folder):
            jax.jit(lambda x, number=number: x + number)(1.0)
        assert any(folder.iterdir())
        assert [getattr(jax.config, name) for name in options] == before
        shutil.rmtree(folder)
        jax.jit(lambda x, number=number: x - number)(1.0)
        assert not folder.exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layers": ("down_proj",)}, "Expected EXPRESSION=SPEC"),
        ({"layers": ("gate=m1v4b4g32x",)}, "such as m2v8g128"),
        ({"length": 100_000_000, "sequences": 1}, "not one sequence of"),
        ({"sequences": 0}, "at least 1 sequence"),
        ({"batch_size": 0}, "batch_size must be a whole number, at least 1"),
    ],
)
def test_bad_input_is_a_sentence(
    base: Path, text: Path, tmp_path: Path, change: dict, sentence: str
) -> None:
    short = text if "length" not in change else tmp_path / "short.jsonl"
    short.write_text(text.read_text() if short == text else '{"text": "a"}\n')
    with pytest.raises(ValueError, match=sentence):
        quantize(base, **{"spec": SPEC, "out": tmp_path / "out", "data": short} | change)
    assert not (tmp_path / "out").exists()
