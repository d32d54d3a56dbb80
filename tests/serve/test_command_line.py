"""The command line serves what it can and says what it cannot."""

import json
import sys
from pathlib import Path

import jax
import pytest

from jaxcodec.models.config import ModelConfig
from jaxcodec.models.load import copy_companions, save_model
from jaxcodec.models.lora import init_adapter, save_adapter
from jaxcodec.models.transformer import init_model
from jaxcodec.serve.__main__ import main
from jaxcodec.serve.batch_loop import stream
from jaxcodec.serve.request import RequestOutput

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=64,
    windows=(None, None),
    eos_ids=(2,),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, an adapter that is zero, and a full model."""
    made = tmp_path_factory.mktemp("models")
    base = init_model(CONFIG, jax.random.key(0))
    save_model(made / "base", base)
    copy_companions(Path(__file__).parents[1] / "fixtures" / "tokenizer", made / "base")
    save_adapter(made / "zero", init_adapter(base, jax.random.key(1), rank=2), base_name="base")
    save_model(made / "module", init_model(CONFIG, jax.random.key(2)))
    return made


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["serve", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(str(ended.value.code))


def test_prompts_are_answered_and_bad_lines_reported(
    directory: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    shared = "a prompt of some length"
    lines: list[dict] = [
        {"model": name, "prompt": shared, "max_tokens": 4, "ignore_eos": True}
        for name in ("base", "zero", "module")
    ]
    lines[1]["n"] = 2
    lines += [{"model": "nobody", "prompt": shared}, {"prompt": "x" * 400}, {"promt": shared}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    kept: list[Path] = []
    monkeypatch.setattr("jaxcodec.serve.__main__.use_compilation_cache", kept.append)
    status = run(
        monkeypatch,
        *("--model", directory / "base", "--icarus", f"zero={directory / 'zero'}"),
        *("--prefill-share", f"module={directory / 'module'}", "--pages", 32),
        *("--host-pages", 8, "--max-waiting", 2),
        *("--prompts", prompts, "--out", out, "--trace", tmp_path / "trace.json"),
        *("--compilation-cache", tmp_path / "compiled"),
    )
    assert kept == [tmp_path / "compiled"]
    assert status == 1
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(a["line"], a["index"]) for a in answers] == [
        (1, 0), (2, 0), (2, 1), (3, 0), (4, 0), (5, 0), (6, 0),
    ]  # fmt: skip
    assert [a["finish_reason"] for a in answers] == ["length"] * 4 + ["error"] * 3
    base, zero, again, module, *_ = (a["tokens"] for a in answers)
    assert base == zero == again != module
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    models = {e["args"]["name"] for e in trace if e["name"] == "process_name"}
    assert models == {"engine", "base", "zero", "module"}
    assert {"queued", "prefill", "decode"} <= {e["name"] for e in trace}
    printed = " ".join(capsys.readouterr().out.split())
    assert "tokens generated 16" in printed
    for line, message in ((4, "No model is served as"), (5, "The prompt has"), (6, "unknown keys")):
        assert f"line {line}: {message}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--icarus", "zero"], "Expected NAME=DIRECTORY, got 'zero'"),
        (["--icarus", "new=/no/such/place"], "/no/such/place"),
        (["--trace", "/"], "--trace must be a file"),
        (["--prompts", "/no/such/file"], "There is no file /no/such/file"),
        (["--icarus", "a=x", "--icarus", "b=y"], "--icarus is given 2 times"),
    ],
)
def test_what_cannot_start_says_why(
    arguments: list[str], message: str, directory: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "prompts.jsonl").write_text("")
    given = ["--model", directory / "base", "--out", tmp_path / "out.jsonl"]
    if "--prompts" not in arguments:
        given += ["--prompts", tmp_path / "prompts.jsonl"]
    assert run(monkeypatch, *given, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(("fault", "status"), [(KeyboardInterrupt(), 130), (ValueError("no"), 2)])
def test_what_was_answered_is_written_whatever_stops_it(
    fault: BaseException, status: int, directory: Path, tmp_path: Path, monkeypatch
) -> None:
    lines = [{"prompt": "a", "max_tokens": 1 + 20 * i, "ignore_eos": True} for i in range(2)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def stopped(engine, requests):
        for i, event in stream(engine, requests):
            yield i, event
            if isinstance(event, RequestOutput):
                raise fault

    monkeypatch.setattr("jaxcodec.serve.__main__.stream", stopped)
    given = ["--model", directory / "base", "--prompts", tmp_path / "prompts.jsonl"]
    given += ["--pages", 8, "--out", tmp_path / "out.jsonl", "--trace", tmp_path / "trace.json"]
    assert run(monkeypatch, *given) == status
    [answer] = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (answer["line"], len(answer["tokens"])) == (1, 1)
    assert (tmp_path / "trace.json").exists()
