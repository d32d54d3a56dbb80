"""What a quantized model is worth after each stage of the quantizer: perplexity, KL, agreement.

    python -m benchmarks.larger_base --work build/larger
    python -m benchmarks.quality --base build/larger --name larger --specs m2v8g128 --out a.json
    python -m benchmarks.quality --base demo/weights/base --name shipped --out b.json
    python -m benchmarks.quality_tables a.json b.json --out benchmarks/results/h200/quality.json

Every (base, format) is a matter of its own, so that several processes may share the formats. The
stages, each with all that comes before it but for the last two, which start alike:

    dense     the base itself
    kmeans    codebooks by k-means, without data
    search    Adam and beam search against H, block after block (by default the `default` preset)
    block     and the floats of each block tuned on the dense block's outputs
    kl        from there all floats of the model, end to end, on KL(dense || model)
    pv        from there too, for as many steps of the same data: PV-Tuning, the codes as well

Text to quantize and tune with is calibration.jsonl. Its last windows choose the best of `kl` and
`pv`; heldout.jsonl is only measured on. Measured is a model of the decoded weights in the base's
dtype, so that one program serves all formats.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from benchmarks import base_text
from benchmarks.head import head
from jaxcodec.checkpoints.files import write_json
from jaxcodec.models.load import load_model
from jaxcodec.models.tokenizer import PretrainedTokenizer
from jaxcodec.models.transformer import Model, linear_shapes
from jaxcodec.quantize.additive import PRESETS as MATRIX_PRESETS
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor, dequantize
from jaxcodec.train.block_tuning import TuningOptions
from jaxcodec.train.loop import TrainOptions, train
from jaxcodec.train.perplexity import agreement, text_windows
from jaxcodec.train.ptq import PRESETS, QuantizeOptions, quantize_model
from jaxcodec.train.pv_tuning import PVOptions, pv_tuning

# Two formats of about 2 bits with two scales each, then 3 and 4 bits.
SPECS = ("m1v4g128", "m2v8g128", "m1v4g32", "m2v8g32", "m3v8g128", "m4v8g128")
STAGES = ("dense", "kmeans", "search", "block", "kl", "pv")
# Bits of a value of codebooks and scales, and of a dense weight: bfloat16's.
VALUE_BITS = 16

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a base in some formats, stage after stage.

    Attributes:
      out: JSON file of the results, written after every row.
      base: directory of a dense model.
      name: of the base in the results.
      text: folder with calibration.jsonl and heldout.jsonl; by default the base's own, and where
        it has none, the standard library, which is written to `text` beside `out`.
      specs: formats, one after the other.
      stages: those to measure; kl and pv need block.
      sequences: to quantize with.
      window: tokens of each sequence, and of a window that is measured.
      batch_size: sequences at once.
      epochs: of block tuning, at most.
      steps: of kl, and of pv.
      learning_rate: of the floats in both.
      code_learning_rate: of the codes in pv.
      selection: windows that choose the best of kl and pv.
      heldout_windows: windows measured, at most.
      preset: of the search: how much work a matrix is worth.
      seed: of all random choices.
    """

    out: Path
    base: Path
    name: str
    text: Path | None = None
    specs: tuple[str, ...] = SPECS
    stages: tuple[str, ...] = STAGES
    sequences: int = 256
    window: int = 512
    batch_size: int = 16
    epochs: int = 5
    steps: int = 200
    learning_rate: float = 3e-4
    code_learning_rate: float = PVOptions.code_learning_rate
    selection: int = 64
    heldout_windows: int = 256
    preset: str = "default"
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := set(self.stages) - set(STAGES):
            raise ValueError(f"The stages are {', '.join(STAGES)}; got {', '.join(unknown)}.")
        if {"kl", "pv"} & set(self.stages) and "block" not in self.stages:
            raise ValueError("kl and pv start from block: add it to the stages.")


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows of tokens, int32 [n, T] each, that have no window in common.

    Attributes:
      tuning: to quantize and tune with.
      selection: to tell the best of a run by.
      heldout: to measure on.
    """

    tuning: np.ndarray
    selection: np.ndarray
    heldout: np.ndarray


def read(options: Options) -> Text:
    """The text of a base, which is written first where there is none.

    Raises:
      ValueError: too little of it.
    """
    folder = options.text or options.base
    if not (folder / base_text.HELDOUT).exists():
        folder = options.text or options.out.parent / "text"
        if not (folder / base_text.FACTS).exists():
            base_text.write_text(base_text.Options(out=folder))
    tokenizer = PretrainedTokenizer(options.base)
    calibration, heldout = (
        _windows(base_text.read_tokens(folder / name, tokenizer), options.window)
        for name in (base_text.CALIBRATION, base_text.HELDOUT)
    )
    if len(calibration) < options.selection + options.sequences or not len(heldout):
        raise ValueError(
            f"{folder} holds {len(calibration)} windows of {options.window} tokens to tune with "
            f"and {len(heldout)} to measure on; expected {options.selection} + "
            f"{options.sequences} and 1 at least: give more text, or ask for less."
        )
    return Text(
        calibration[: -options.selection],
        calibration[-options.selection :],
        heldout[: options.heldout_windows],
    )


def measure(options: Options) -> Iterator[Row]:
    """One flat row for each format and stage, as soon as it is there."""
    dense, text = load_model(options.base), read(options)
    if "dense" in options.stages:
        yield _row(options, None, "dense", dense, dense, text, 0.0)
    for spec in map(CodebookSpec.parse, options.specs):
        for stage, model, seconds in stages(dense, spec, text, options):
            if stage in options.stages:
                yield _row(options, spec, stage, model, dense, text, seconds)


def stages(
    dense: Model, spec: CodebookSpec, text: Text, options: Options
) -> Iterator[tuple[str, Model, float]]:
    """(stage, model, seconds from the dense model to it, compilation included)."""
    if "kmeans" in options.stages:
        clock = time.perf_counter()
        model = _quantize(dense, spec, None, PRESETS["kmeans"])
        yield "kmeans", model, time.perf_counter() - clock
    model, seconds = dense, 0.0
    for stage, epochs in (("search", 0), ("block", options.epochs)):
        if stage in options.stages:
            how = QuantizeOptions(
                matrix=MATRIX_PRESETS[options.preset],
                tuning=TuningOptions(epochs=epochs),
                batch_size=options.batch_size,
                seed=options.seed,
            )
            clock = time.perf_counter()
            model = _quantize(dense, spec, text.tuning[: options.sequences], how)
            seconds = time.perf_counter() - clock
            yield stage, model, seconds
    # Without changes of codes PV-Tuning is the end-to-end tuning of floats, step for step.
    pv = PVOptions(code_learning_rate=options.code_learning_rate)
    for stage, how in (("kl", dataclasses.replace(pv, max_code_change=0.0)), ("pv", pv)):
        if stage in options.stages:
            clock = time.perf_counter()
            tuned = _tune(model, dense, text, how, options)
            yield stage, tuned, seconds + time.perf_counter() - clock


def decoded(model: Model) -> Model:
    """The model with dense linears of the values that its codebooks stand for, in its dtype."""
    variables = dict(nnx.to_flat_state(model.weights))
    for name, _ in model.specs:
        path = tuple(int(part) if part.isdigit() else part for part in name.split("."))
        fields = (variables.pop((*path, x)) for x in ("codes", "codebooks", "scales"))
        w = CodebookTensor(*(field.get_value() for field in fields))
        variables[*path, "kernel"] = nnx.Param(dequantize(w, w.dtype))
    return dataclasses.replace(model, weights=nnx.from_flat_state(variables), specs=())


def bits_per_weight(
    shapes: Sequence[tuple[int, int]], spec: CodebookSpec | None
) -> tuple[float, float]:
    """Bits of a weight of the linears, with codebooks and without: the papers' q-bar is without.

    Args:
      shapes: (K, N) of the linears.
      spec: their format; None for dense.
    """
    if spec is None:
        return float(VALUE_BITS), float(VALUE_BITS)
    weights = sum(K * N for K, N in shapes)
    stored = sum(K * N * spec.bits_per_weight(K, N, VALUE_BITS) for K, N in shapes)
    codes = spec.num_codebooks * spec.bits / spec.vector_length
    return stored / weights, codes + VALUE_BITS / spec.group_size


def _row(
    options: Options,
    spec: CodebookSpec | None,
    stage: str,
    model: Model,
    dense: Model,
    text: Text,
    seconds: float,
) -> Row:
    found = agreement(decoded(model), dense, text.heldout.reshape(-1), options.window)
    shapes = [shape for _, shape in linear_shapes(dense.config)]
    bits, nominal = bits_per_weight(shapes, spec)
    return {
        "base": options.name,
        "spec": None if spec is None else str(spec),
        "stage": stage,
        "bits_per_weight": bits,
        "nominal_bits_per_weight": nominal,
        "perplexity": found.model.perplexity,
        "loss": found.model.loss,
        "kl": found.kl,
        "top1": found.top1,
        "heldout_tokens": found.model.tokens,
        "seconds": round(seconds, 2),
    }


def _quantize(
    dense: Model, spec: CodebookSpec, calibration: np.ndarray | None, how: QuantizeOptions
) -> Model:
    model, _ = quantize_model(dense, spec, calibration, how, quiet=True)
    # By way of the host, so that its arrays are bound to no device, as those of `dense` are: a
    # program that gets some of either kind is compiled again for what it returns.
    return jax.tree.map(jnp.asarray, jax.device_get(model))


def _tune(model: Model, dense: Model, text: Text, how: PVOptions, options: Options) -> Model:
    """The best model of a run, by its KL on the windows of selection."""
    tuning, selection = (
        text_windows(windows.reshape(-1), options.window)
        for windows in (text.tuning, text.selection)
    )
    run = TrainOptions(
        steps=options.steps,
        batch_size=min(2 * options.batch_size, len(tuning)),
        learning_rate=options.learning_rate,
        warmup_steps=options.steps // 10,
        seed=options.seed,
        log_every=options.steps,
        evaluate_every=max(options.steps // 4, 1),
        checkpoint_every=options.steps,
        keep_best=True,
    )
    with tempfile.TemporaryDirectory() as directory:
        best = train(pv_tuning(model, dense, how), tuning, run, directory, selection)
    assert isinstance(best, Model)
    return best


def _windows(tokens: np.ndarray, window: int) -> np.ndarray:
    """All whole windows, [n, window]."""
    count = len(tokens) // window
    return tokens[: count * window].reshape(count, window)


def main() -> None:
    """Run the command line; the file is written after every row."""
    options = tyro.cli(Options, prog="python -m benchmarks.quality")
    content: dict[str, Any] = {
        **head("quality"),
        "options": {
            k: str(v) for k, v in dataclasses.asdict(options).items() if k not in ("out", "specs")
        },
        "rows": [],
    }
    for row in measure(options):
        content["rows"].append(row)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        write_json(options.out, content)


if __name__ == "__main__":
    main()
