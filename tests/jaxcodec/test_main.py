"""The command line: quantize, convert, show; and bad input is one sentence."""

import sys
from pathlib import Path

import jax
import pytest

from jaxcodec.__main__ import main
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.load import load_model, save_model
from jaxcodec.models.transformer import init_model, linear_shapes
from jaxcodec.spec import CodebookSpec

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=32,
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    max_positions=32,
    windows=(None,),
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", init_model(CONFIG, jax.random.key(0)))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model"


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["jaxcodec", *map(str, words)])
    main()


def test_quantize_writes_a_model_that_inspect_shows(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    out = tmp_path / "out"
    run(monkeypatch, "quantize", model, "--spec", "m1v2b2g32", "--preset", "fast", "--out", out)
    printed = capsys.readouterr().out
    assert {str(spec) for _, spec in load_model(out).specs} == {"m1v2b2g32"}
    assert (out / "tokenizer.json").read_text() == "{}"
    run(monkeypatch, "inspect", out)
    shown = capsys.readouterr().out
    assert printed.endswith(shown)
    assert "layers.0.self_attn.q_proj" in shown
    assert "whole model" in shown


def test_convert_writes_another_layout_that_inspect_shows(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    specs = tuple((path, CodebookSpec.parse("m1v2g32")) for path, _ in linear_shapes(CONFIG))
    save_model(model, init_model(CONFIG, jax.random.key(0), specs=specs))
    run(monkeypatch, "inspect", model)
    shown = capsys.readouterr().out
    run(monkeypatch, "convert", model, tmp_path / "packed", "--to", "codegemm")
    assert "7/7  layers.0.self_attn.v_proj  m1v2g32" in capsys.readouterr().out
    run(monkeypatch, "inspect", tmp_path / "packed")
    assert capsys.readouterr().out == shown
    assert (tmp_path / "packed" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["inspect", "{tmp}/nowhere"], "There is no checkpoint directory"),
        (["quantize", "{tmp}/nowhere", "--spec", "m1v2b2g32", "--out", "{tmp}/out"], "nowhere"),
        (["quantize", "{tmp}/model", "--spec", "2bit", "--out", "{tmp}/out"], "such as m2v8g128"),
        (["quantize", "{tmp}/model", "--spec", "m1v4g32", "--out", "{tmp}/model"], "is not empty"),
        (["quantize", "{tmp}/model", "--spec", "m1v4g128", "--out", "{tmp}/out"], "layers.0."),
        (
            ["quantize", "{tmp}/model", "--spec", "m1v2b2g32", "--out", "{tmp}/out"]
            + ["--layers", "q_proj=dense", "--layers", "k_proj=dense"],
            "--layers is given 2 times: give it once, several values after one name.",
        ),
        (
            ["quantize", "{tmp}/model", "--spec", "m1v2b2g32", "--out", "{tmp}/out"]
            + ["--batch_size", "2", "--batch-size=4"],
            "--batch-size is given 2 times",
        ),
        (["convert", "{tmp}/model", "{tmp}/out", "--to", "aqlm"], "is dense"),
        (["convert", "{tmp}/nowhere", "{tmp}/out", "--to", "aqlm"], "There is no checkpoint"),
    ],
)
def test_bad_input_ends_with_a_sentence(
    words: list[str],
    sentence: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SystemExit, match=f"^jaxcodec: .*{sentence}"):
        run(monkeypatch, *(word.replace("{tmp}", str(tmp_path)) for word in words))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "inner", "sentence"),
    [
        (
            ["quantize", "{tmp}/model", "--spec", "m1v2b2g32", "--out", "{tmp}/out"],
            "jaxcodec.train.quantize.quantize_model",
            "Stopped. The same command goes on at the first block that {tmp}/out does not hold.",
        ),
        (
            ["convert", "{tmp}/model", "{tmp}/out", "--to", "aqlm"],
            "jaxcodec.models.convert.open_model",
            "Stopped. Nothing was written; convert anew.",
        ),
        (
            ["inspect", "{tmp}/model"],
            "jaxcodec.train.quantization_report.inspect_model",
            "Stopped.",
        ),
    ],
)
def test_ctrl_c_is_a_sentence_and_status_130(
    words: list[str], inner: str, sentence: str, model: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inner, interrupted)
    filled = [word.replace("{tmp}", str(tmp_path)) for word in words]
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
        run(monkeypatch, *filled)
    assert end.value.code == 130
    assert capsys.readouterr().err == f"jaxcodec: {sentence}\n".replace("{tmp}", str(tmp_path))


def test_a_full_device_is_one_sentence(model: Path, tmp_path: Path, monkeypatch) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr("jaxcodec.train.quantize.quantize_model", exhausted)
    with pytest.raises(SystemExit, match="memory is full.*--batch-size"):
        run(monkeypatch, "quantize", model, "--spec", "m1v2b2g32", "--out", tmp_path / "out")
