"""Every command on a tiny model, from files to files."""

import dataclasses
import json
import shutil
import sys

import chex
import jax
import pytest

from jaxcodec.checkpoints.files import read_json
from jaxcodec.models.load import copy_companions, load_model, save_model
from jaxcodec.models.tokenizer import PretrainedTokenizer
from jaxcodec.models.transformer import init_model
from jaxcodec.spec import CodebookSpec
from jaxcodec.train.__main__ import (
    Conventional,
    Distill,
    Evaluate,
    Icarus,
    PrefillShare,
    Pretrain,
    PVTune,
    conventional,
    distill,
    evaluate,
    icarus,
    main,
    prefill_share,
    pretrain,
    pv_tune,
)
from jaxcodec.train.loop import TrainOptions
from jaxcodec.train.perplexity import agreement

OPTIONS = TrainOptions(steps=2, batch_size=4, warmup_steps=0)


def run_options(pairs_file, out, **more):
    return {"data": pairs_file, "out": out, "max_length": 16, "options": OPTIONS, **more}


def test_pretraining_starts_from_a_config_and_goes_on_from_weights(base, pairs_file, tmp_path):
    config = base / "config.json"
    first = pretrain(
        Pretrain(**run_options(pairs_file, tmp_path / "a", config=config, tokenizer=base))
    )
    chex.assert_trees_all_equal(load_model(tmp_path / "a/model"), first)
    second = pretrain(Pretrain(**run_options(pairs_file, tmp_path / "b", model=base)))
    assert second.config == first.config
    with pytest.raises(ValueError, match="not both"):
        pretrain(Pretrain(**run_options(pairs_file, tmp_path, config=config, model=base)))
    with pytest.raises(ValueError, match="needs --tokenizer"):
        pretrain(Pretrain(**run_options(pairs_file, tmp_path, config=config)))


def test_an_icarus_adapter_goes_from_file_to_evaluation(
    base, pairs_file, tmp_path, monkeypatch, capsys
):
    icarus(Icarus(**run_options(pairs_file, tmp_path / "run", model=base, rank=2)))
    result = tmp_path / "result.json"
    arguments = f"evaluate --data {pairs_file} --model {base} --adapter {tmp_path}/run/adapter"
    arguments += f" --scheme icarus --max-new-tokens 2 --out {result}"
    monkeypatch.setattr(sys, "argv", ["jaxcodec.train", *arguments.split()])
    capsys.readouterr()
    main()
    assert json.loads(capsys.readouterr().out) == json.loads(result.read_text())
    found = json.loads(result.read_text())
    assert found["answers"]["examples"] == 16
    assert (found["scheme"], found["adapter"]) == ("icarus", "adapter")
    assert "perplexity" not in found


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Emma ordered 3 cups and 3 coats. " * 8)
    return path


def test_a_text_is_measured_against_a_dense_model(base, text, tmp_path, capsys):
    dense = tmp_path / "dense"
    shutil.copytree(base, dense)
    model = load_model(base)
    save_model(dense, jax.tree.map(lambda x: 2 * x, model))
    run = Evaluate(model=base, text=text, dense=dense, window=16, stride=5, tail=True)
    evaluate(run)
    found = json.loads(capsys.readouterr().out)
    tokens = PretrainedTokenizer(base).encode(text.read_text())
    expected = agreement(model, load_model(dense), tokens, 16, stride=5, tail=True)
    assert found["agreement"]["kl"] == pytest.approx(expected.kl)
    assert found["agreement"]["dense_perplexity"] == pytest.approx(expected.dense.perplexity)
    assert found["perplexity"]["file"] == "text.txt"
    assert found["perplexity"]["tokens"] == expected.model.tokens == len(tokens) - 1
    evaluate(dataclasses.replace(run, dense=None, stride=None, tail=False))
    alone = json.loads(capsys.readouterr().out)
    assert "agreement" not in alone
    assert alone["perplexity"]["tokens"] == len(tokens) // 16 * 15


def test_evaluation_says_what_it_needs(base, text, pairs_file, tmp_path):
    for options in ({}, {"dense": base}, {"dense": base, "data": pairs_file}):
        with pytest.raises(ValueError, match="at least one of --text and --data"):
            evaluate(Evaluate(model=base, **options))
    for options in ({"window": 8}, {"stride": 4}, {"tail": True}):
        with pytest.raises(ValueError, match="give --text too"):
            evaluate(Evaluate(model=base, data=pairs_file, **options))
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="make other tokens"):
        evaluate(Evaluate(model=base, text=text, dense=other, window=16))


def test_what_would_fail_after_the_measuring_is_refused_before(
    base, text, pairs_file, write_lines, tmp_path, monkeypatch
):
    def measured(*_, **__):
        raise AssertionError("measured")

    monkeypatch.setattr("jaxcodec.train.__main__.perplexity", measured)
    monkeypatch.setattr("jaxcodec.train.evaluate.complete", measured)
    run = Evaluate(model=base, text=text, data=pairs_file, window=16, max_new_tokens=2)
    long = write_lines({"prompt": "1+1=", "completion": "2" * 200})
    for changes, message in (
        ({"out": tmp_path}, "is a directory: give a file"),
        ({"out": text / "result.json"}, "cannot be written .*: give another file"),
        ({"data": long}, "line 1: .* completion tokens with eos are more than"),
        ({"data": long, "text": None, "window": None}, "line 1: .* completion tokens with eos"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(dataclasses.replace(run, **changes))


def test_a_quantized_model_is_no_teacher(base, text, pairs_file, tmp_path):
    quantized = tmp_path / "quantized"
    specs = (("layers.0.self_attn.q_proj", CodebookSpec.parse("m1v4b4g32")),)
    save_model(quantized, init_model(load_model(base).config, jax.random.key(1), specs=specs))
    copy_companions(base, quantized)
    arguments = run_options(pairs_file, tmp_path / "run", model=quantized, teacher=quantized)
    what = "quantized is a quantized model .*: give the directory of the dense model"
    for command, options in ((distill, Distill), (pv_tune, PVTune)):
        with pytest.raises(ValueError, match=f"--teacher .*{what}"):
            command(options(**arguments))
    with pytest.raises(ValueError, match=f"--dense .*{what}"):
        evaluate(Evaluate(model=quantized, text=text, dense=quantized, window=16))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [Distill, PVTune])
def test_the_best_is_not_kept_without_held_out_data(base, pairs_file, tmp_path, options):
    run = options(data=pairs_file, out=tmp_path / "run", model=tmp_path, teacher=base)
    with pytest.raises(ValueError, match="keep_best needs held-out examples"):
        (distill if options is Distill else pv_tune)(run)  # before a model is looked for


def test_bad_input_ends_the_command_with_one_sentence(base, tmp_path, monkeypatch):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a"}\n')
    arguments = f"icarus --model {base} --data {data} --out {tmp_path}/run --max-length 16"
    monkeypatch.setattr(sys, "argv", ["jaxcodec.train", *arguments.split()])
    with pytest.raises(SystemExit, match=r"jaxcodec\.train: .*bad\.jsonl, line 1 has the keys"):
        main()
    assert not (tmp_path / "run").exists()


def interrupted(*_, **__):
    raise KeyboardInterrupt


def exhausted(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")


@pytest.mark.parametrize(
    ("inner", "status", "sentence"),
    [
        (interrupted, 130, "Stopped. The same command goes on from the last checkpoint in "),
        (exhausted, 1, "The device's memory is full. Fewer rows at once (--accumulate"),
    ],
)
def test_what_ends_training_early_is_a_sentence(
    base, pairs_file, tmp_path, monkeypatch, capsys, inner, status, sentence
):
    monkeypatch.setattr("jaxcodec.train.__main__.train", inner)
    arguments = f"icarus --model {base} --data {pairs_file} --out {tmp_path}/run --max-length 16"
    monkeypatch.setattr(sys, "argv", ["jaxcodec.train", *arguments.split()])
    with pytest.raises((SystemExit, KeyboardInterrupt, jax.errors.JaxRuntimeError)) as end:
        main()
    code = end.value.code
    said, code = (capsys.readouterr().err, code) if isinstance(code, int) else (code, 1)
    assert code == status
    assert said.startswith(f"jaxcodec.train: {sentence}")


def test_prefill_share_leaves_a_model(base, pairs_file, tmp_path, capsys):
    prefill_share(PrefillShare(**run_options(pairs_file, tmp_path / "run", base=base)))
    model = tmp_path / "run/model"
    evaluate(
        Evaluate(data=pairs_file, model=model, base=base, scheme="prefill-share", max_new_tokens=2)
    )
    assert '"loss"' in capsys.readouterr().out


@pytest.mark.parametrize("lora", [False, True])
def test_conventional_training_leaves_a_model_or_an_adapter(base, pairs_file, tmp_path, lora):
    run = Conventional(**run_options(pairs_file, tmp_path / "run", model=base, lora=lora, rank=2))
    conventional(run)
    assert (tmp_path / "run" / ("adapter" if lora else "model")).is_dir()
    assert not (tmp_path / "run" / ("model" if lora else "adapter")).exists()


@pytest.mark.parametrize(("command", "options"), [(distill, Distill), (pv_tune, PVTune)])
def test_a_quantized_model_is_tuned_towards_its_teacher(
    base, pairs_file, tmp_path, command, options, capsys
):
    dense = load_model(base)
    spec = CodebookSpec.parse("m1v4b4g32")
    path = "layers.0.self_attn.q_proj"
    quantized = tmp_path / "quantized"
    model = init_model(dense.config, jax.random.key(1), specs=((path, spec),))
    save_model(quantized, model, {"their_own": 1})
    copy_companions(base, quantized)
    (quantized / "generation_config.json").write_text('{"top_k": 1}')
    tuning = dataclasses.replace(OPTIONS, keep_best=True)
    arguments = run_options(pairs_file, tmp_path / "run", teacher=base, eval_data=pairs_file)
    arguments |= {"options": tuning}
    tuned = command(options(**arguments, model=quantized))
    assert tuned.specs == ((path, spec),)
    chex.assert_trees_all_equal(load_model(tmp_path / "run/model"), tuned)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["best"] <= report["start"]
    assert report["codes_changed"] == 0 or command is pv_tune
    assert read_json(tmp_path / "run/model/config.json")["their_own"] == 1
    assert read_json(tmp_path / "run/model/generation_config.json") == {"top_k": 1}
    assert '"codes_changed"' in capsys.readouterr().out
    with pytest.raises(ValueError, match="The model is dense"):
        command(options(**arguments, model=base))
