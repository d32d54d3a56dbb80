"""The command line of training: `python -m jaxcodec.train COMMAND --help`.

    pretrain       a model from random weights, or on from others, on text
    icarus         an adapter that reads the cache of its frozen base (ICaRus)
    prefill-share  a decode module that reads prompts written by a frozen base (PrefillShare)
    conventional   the whole model, or an ordinary LoRA, which share nothing
    distill        the floats of a quantized model, towards its dense teacher (KL)
    pv-tune        its floats and its codes (PV-Tuning)
    evaluate       perplexity, agreement with a dense model, share of right answers

Every command runs the function of its name here, which scripts can import.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcodec.checkpoints.files import read_json, write_json
from jaxcodec.command_line import (
    ended_by_a_sentence,
    refuse_repeated_options,
    when_stopped,
)
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.layers import AdapterBank
from jaxcodec.models.load import (
    DTYPES,
    copy_companions,
    load_model,
    open_model,
    other_config,
    save_model,
)
from jaxcodec.models.lora import (
    ALL_TARGETS,
    ICARUS_TARGETS,
    Adapter,
    init_adapter,
    load_adapter,
    save_adapter,
    set_adapter,
    with_bank,
)
from jaxcodec.models.scheme import CONVENTIONAL, ICARUS, PREFILL_SHARE, Scheme
from jaxcodec.models.tokenizer import PretrainedTokenizer
from jaxcodec.models.transformer import Model, init_model
from jaxcodec.train import evaluate as evaluation
from jaxcodec.train.data import read_examples
from jaxcodec.train.loop import LOG, TrainOptions, check_held_out, held_out_losses, train
from jaxcodec.train.perplexity import BATCH_TOKENS, WINDOW, agreement, perplexity, read_text
from jaxcodec.train.pv_tuning import PVOptions, changed_share, pv_tuning
from jaxcodec.train.step import (
    Objective,
    adapter_training,
    decode_module_training,
    distillation,
    full_training,
)

SCHEMES = {"conventional": CONVENTIONAL, "prefill-share": PREFILL_SHARE, "icarus": ICARUS}
Dtype = Literal["bfloat16", "float16", "float32"]
REPORT = "report.json"
# A quantized model is not far from its teacher: some hundred steps, looked at often.
TUNING = TrainOptions(
    steps=300,
    batch_size=32,
    warmup_steps=20,
    evaluate_every=20,
    checkpoint_every=100,
    keep_best=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What every training command takes.

    Attributes:
      data: JSONL of {"prompt", "completion"} or {"text"}.
      out: directory of the run; the result goes to `model` or `adapter` in it. Where it holds a
        checkpoint of the same run, the run goes on from there.
      eval_data: held-out JSONL for `eval_loss`; its examples obey the same max_length.
      max_length: most tokens of an example.
      dtype: of the computation and of the result (masters are float32); None for that on disk.
      options: steps, batch, learning rate and the rest.
    """

    data: Path
    out: Path
    eval_data: Path | None = None
    max_length: int = 256
    dtype: Dtype | None = None
    options: TrainOptions = TrainOptions()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain(Run):
    """Train a whole model on text; prompt and completion count as text too.

    Attributes:
      config: a Hugging Face config.json, to start from random weights.
      model: a directory to go on from instead, dense or quantized (whose codes stay).
      tokenizer: directory of the tokenizer; None for the model's.
    """

    config: Path | None = None
    model: Path | None = None
    tokenizer: Path | None = None
    options: TrainOptions = TrainOptions(weight_decay=0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Icarus(Run):
    """Train a LoRA whose model reads only keys and values that the frozen base wrote.

    Attributes:
      model: directory of the base, dense or quantized.
      rank: of the adapter.
      alpha: the adapter's output is scaled by alpha / rank.
      targets: linears that it changes; k_proj and v_proj are not possible.
    """

    model: Path
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ICARUS_TARGETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillShare(Run):
    """Train a decode module on prompts that the frozen base wrote.

    Attributes:
      base: directory of the base, which writes the prompts.
      model: directory of the weights that the decode module starts from; None for the base's.
    """

    base: Path
    model: Path | None = None
    options: TrainOptions = TrainOptions(learning_rate=2e-4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conventional(Run):
    """Train a model that writes its own cache: all of it, or a LoRA.

    Attributes:
      model: directory of the model to start from.
      lora: train a LoRA on the frozen model instead of the model.
      rank: of the LoRA.
      alpha: its output is scaled by alpha / rank.
      targets: linears that it changes.
    """

    model: Path
    lora: bool = False
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ALL_TARGETS
    options: TrainOptions = TrainOptions(learning_rate=2e-4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(Run):
    """Train the floats of a quantized model so that it predicts as its dense teacher does.

    The loss is KL(teacher || model) in nats a token, on all tokens of the data. The weights that
    did best on eval_data are kept, and those at the start are among them.

    Attributes:
      model: directory of the quantized model.
      teacher: directory of the dense model.
    """

    model: Path
    teacher: Path
    options: TrainOptions = TUNING


@dataclasses.dataclass(frozen=True, kw_only=True)
class PVTune(Distill):
    """Train the codes of a quantized model too, by PV-Tuning; the rest is as `distill` does it.

    Attributes:
      codes: how codes are trained.
    """

    codes: PVOptions = PVOptions()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure perplexity, agreement with a dense model, and answers: each where it is asked for.

    Attributes:
      model: directory of the model, the base of the adapter, or the decode module.
      text: a text to measure the perplexity of.
      window: tokens of a window of it; None for 2048, or the model's context if that is less.
      stride: tokens from window to window; None for `window`.
      tail: score what follows the last full window too, or a text of less than one.
      batch_tokens: tokens of the text at once.
      dense: directory of a dense model, to measure agreement with it on the text.
      data: JSONL of {"prompt", "completion"}, to measure the loss of completions and the share of
        right greedy answers.
      max_new_tokens: most tokens of an answer.
      batch_size: prompts at once.
      adapter: directory of a PEFT adapter.
      base: directory of the writer of prompts under prefill-share.
      scheme: who writes the cache.
      out: where to write the result as JSON, besides printing it.
      dtype: of the computation; None for that on disk.
    """

    model: Path
    text: Path | None = None
    window: int | None = None
    stride: int | None = None
    tail: bool = False
    batch_tokens: int = BATCH_TOKENS
    dense: Path | None = None
    data: Path | None = None
    max_new_tokens: int = 64
    batch_size: int = 256
    adapter: Path | None = None
    base: Path | None = None
    scheme: Literal["conventional", "prefill-share", "icarus"] = "conventional"
    out: Path | None = None
    dtype: Dtype | None = None


def pretrain(run: Pretrain) -> Model:
    """Train a model on text and save it to `run.out / "model"`.

    Raises:
      ValueError: not exactly one of config and model is given, or no tokenizer.
    """
    if run.config is not None and run.model is not None:
        raise ValueError("pretrain takes --config (random weights) or --model, not both.")
    tokenizer = run.tokenizer or run.model
    if tokenizer is None:
        raise ValueError("pretrain from a config needs --tokenizer, a directory that holds one.")
    if run.model is not None:
        model = _load(run.model, run.dtype)
    elif run.config is not None:
        config = ModelConfig.from_hf(read_json(run.config))
        dtype = jnp.float32 if run.dtype is None else DTYPES[run.dtype]
        model = init_model(config, jax.random.key(run.options.seed), dtype)
    else:
        raise ValueError("pretrain takes --config (random weights) or --model (to go on).")
    return _train_model(full_training(model), run, tokenizer, pack=True)


def icarus(run: Icarus) -> Adapter:
    """Train an adapter and write it to `run.out / "adapter"` in PEFT's format."""
    base = _load(run.model, run.dtype)
    return _train_adapter(base, run, ICARUS)


def prefill_share(run: PrefillShare) -> Model:
    """Train a decode module and save it to `run.out / "model"`."""
    base = _load(run.base, run.dtype)
    model = base if run.model is None else _load(run.model, run.dtype)
    return _train_model(decode_module_training(model, base), run, run.base)


def conventional(run: Conventional) -> Model | Adapter:
    """Train a model, or a LoRA, and save it to `run.out / "model"` or `"adapter"`."""
    model = _load(run.model, run.dtype)
    if run.lora:
        return _train_adapter(model, run, CONVENTIONAL)
    return _train_model(full_training(model), run, run.model)


def distill(run: Distill) -> Model:
    """Train floats towards a teacher; save to `run.out / "model"`, report to "report.json".

    Raises:
      ValueError: the teacher is quantized, or the model is not; nothing to tell the best by.
    """
    _check_tuning(run)
    model, teacher = _load(run.model, run.dtype), _load(run.teacher, run.dtype)
    return _tune(distillation(model, teacher), run, model)


def pv_tune(run: PVTune) -> Model:
    """Train floats and codes towards a teacher; save, report and refuse as `distill` does."""
    _check_tuning(run)
    model, teacher = _load(run.model, run.dtype), _load(run.teacher, run.dtype)
    return _tune(pv_tuning(model, teacher, run.codes), run, model)


def evaluate(run: Evaluate) -> None:
    """Measure a model, print the result as JSON, and write it to `run.out`; progress is on stderr.

    Raises:
      ValueError: nothing is asked for, a dense model without a text, one that is quantized, or one
        whose tokenizer makes other tokens of the text; windows of no text; an `out` that cannot be
        written; and as `perplexity`, `agreement` and `evaluate.evaluate`.
    """
    _check_evaluation(run)
    model = _load(run.model, run.dtype)
    if run.adapter is not None:
        adapter = load_adapter(run.adapter, model)
        bank = AdapterBank(1, adapter.rank, adapter.targets)
        model = set_adapter(with_bank(model, bank), adapter, 0)
    base = None if run.base is None else _load(run.base, run.dtype)
    tokenizer = PretrainedTokenizer(run.model if run.base is None else run.base)
    result: dict[str, Any] = {"model": run.model.name, "scheme": run.scheme}
    if run.adapter is not None:
        result["adapter"] = run.adapter.name
    answering = {"max_new_tokens": run.max_new_tokens, "batch_size": run.batch_size}
    questions = None
    if run.data is not None:  # refused now, not once the text is measured
        context = model.config.max_positions
        questions = evaluation.read_questions(run.data, tokenizer, context, **answering)
    if run.text is not None:
        result |= _evaluate_text(run, run.text, tokenizer, model, base)
    if questions is not None:
        result["answers"] = evaluation.evaluate(
            questions,
            tokenizer,
            model,
            SCHEMES[run.scheme],
            base,
            **answering,
            quiet=False,
        )
    print(json.dumps(result, indent=2))
    if run.out is not None:
        write_json(run.out, result)


def _check_tuning(run: Distill) -> None:
    """Refuse what can be refused before models are loaded."""
    check_held_out(run.options, run.eval_data)
    _check_dense("teacher", run.teacher)


def _check_evaluation(run: Evaluate) -> None:
    """Refuse what can be refused before a model is loaded."""
    if run.text is None and (run.data is None or run.dense is not None):
        raise ValueError(
            "evaluate measures perplexity on --text, with --dense also agreement there, and "
            "answers on --data: give at least one of --text and --data, and --dense with --text."
        )
    if run.text is None and (run.window is not None or run.stride is not None or run.tail):
        raise ValueError("--window, --stride and --tail cut a text into windows: give --text too.")
    if run.dense is not None:
        _check_dense("dense", run.dense)
    if run.out is not None:
        _check_file(run.out)


def _check_dense(option: str, directory: Path) -> None:
    if specs := open_model(directory).specs:
        raise ValueError(
            f"--{option} {directory} is a quantized model ({len(specs)} linears with codebooks): "
            "give the directory of the dense model that it was made from."
        )


def _check_file(path: Path) -> None:
    """Refuse an --out that could not be written, which would be found out after all the work."""
    if path.is_dir():
        raise ValueError(f"--out {path} is a directory: give a file to write the result to.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"--out {path} cannot be written ({error.strerror}): give another file."
        ) from error


def _evaluate_text(
    run: Evaluate, path: Path, tokenizer: PretrainedTokenizer, model: Model, base: Model | None
) -> dict[str, Any]:
    """The sections "perplexity" and, with a dense model, "agreement"."""
    start, text = time.perf_counter(), read_text(path)
    tokens = tokenizer.encode(text)
    window = min(WINDOW, model.config.max_positions) if run.window is None else run.window
    options: dict[str, Any] = {"stride": run.stride, "tail": run.tail}
    options |= {
        "batch_tokens": run.batch_tokens,
        "scheme": SCHEMES[run.scheme],
        "base": base,
        "quiet": False,
    }
    if run.dense is None:
        found = perplexity(model, tokens, window, **options)
        result = {"perplexity": {"file": path.name, **dataclasses.asdict(found)}}
    else:
        if PretrainedTokenizer(run.dense).encode(text) != tokens:
            raise ValueError(
                f"The tokenizers of {run.dense} and of the model make other tokens of {path}: what "
                "the models predict can only be compared over the same."
            )
        both = agreement(model, _load(run.dense, run.dtype), tokens, window, **options)
        result = {
            "perplexity": {"file": path.name, **dataclasses.asdict(both.model)},
            "agreement": {
                "dense": run.dense.name,
                "kl": both.kl,
                "top1": both.top1,
                "dense_perplexity": both.dense.perplexity,
                "dense_loss": both.dense.loss,
            },
        }
    result["perplexity"]["seconds"] = time.perf_counter() - start
    return result


def _load(directory: Path, dtype: Dtype | None) -> Model:
    return load_model(directory, None if dtype is None else DTYPES[dtype])


def _train_model(
    objective: Objective,
    run: Run,
    tokenizer: Path,
    pack: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> Model:
    model = _train(objective, run, tokenizer, pack)
    save_model(run.out / "model", model, extra)
    copy_companions(tokenizer, run.out / "model")
    return model


def _tune(objective: Objective, run: Distill, model: Model) -> Model:
    kept = other_config(run.model)
    tuned = _train_model(objective, run, run.model, pack=True, extra=kept)
    report = held_out_losses(run.out) | {"codes_changed": changed_share(model, tuned)}
    write_json(run.out / REPORT, report)
    print(json.dumps(report, indent=2))
    return tuned


def _train_adapter(base: Model, run: Icarus | Conventional, scheme: Scheme) -> Adapter:
    key = jax.random.key(run.options.seed)
    adapter = init_adapter(base, key, run.rank, run.alpha, run.targets)
    adapter = _train(adapter_training(base, adapter, scheme), run, run.model)
    save_adapter(run.out / "adapter", adapter, base_name=run.model.name)
    return adapter


def _train(objective: Objective, run: Run, tokenizer_from: Path, pack: bool = False) -> Any:
    tokenizer = PretrainedTokenizer(tokenizer_from)
    examples = read_examples(run.data, tokenizer, run.max_length, pack=pack)
    held_out = None
    if run.eval_data is not None:
        held_out = read_examples(run.eval_data, tokenizer, run.max_length, pack=pack)
    each = run.options.checkpoint_every
    with when_stopped(
        f"The same command goes on from the last checkpoint in {run.out}, if there is one yet: one "
        f"is written every {each} steps."
    ):
        trained = train(objective, examples, run.options, run.out, held_out)
    print(f"All {run.options.steps} steps are made; {run.out / LOG} tells of them.")
    return trained


def main() -> None:
    """Run the command line; what ends it early is one sentence: see `ended_by_a_sentence`."""
    import tyro

    commands = {
        "pretrain": pretrain,
        "icarus": icarus,
        "prefill-share": prefill_share,
        "conventional": conventional,
        "distill": distill,
        "pv-tune": pv_tune,
        "evaluate": evaluate,
    }
    full_device = (
        "Fewer rows at once (--accumulate of a training command, --batch-size or --batch-tokens of "
        "evaluate), or shorter ones (--max-length, --window), need less; other options make it "
        "another run: give another --out."
    )
    config = (tyro.conf.OmitArgPrefixes,)
    with ended_by_a_sentence("jaxcodec.train", full_device):
        refuse_repeated_options(sys.argv[1:])
        prog = "python -m jaxcodec.train"
        tyro.extras.subcommand_cli_from_dict(commands, prog=prog, config=config)


if __name__ == "__main__":
    main()
