"""Post-training quantization of a model, block after block: its linears become codebooks.

For each block, with the inputs that the quantized blocks before it give:

1. the dense block's outputs, and H = X^T X / tokens of every linear (train/calibration.py);
2. each linear by k-means, Adam and beam search against its H (jaxcodec/quantize/additive.py);
3. the block's floats, tuned on the dense outputs (train/block_tuning.py).

Embeddings, final norm and head stay as they are. Without calibration data H = I, and there is no
third step. The device holds one block and what belongs to it, whatever the depth.

Letters: n sequences, T tokens, K input and N output features.
Source: AQLM (arXiv 2401.06118) section 3; scales by group: CodeGEMM (arXiv 2512.17970).
"""

import dataclasses
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcodec.models.blocks import SHARED_INPUTS, BlockModel, take_block, with_blocks
from jaxcodec.models.config import ModelConfig
from jaxcodec.models.transformer import Model, Specs, linear_shapes
from jaxcodec.quantize.additive import PRESETS as MATRIX_PRESETS
from jaxcodec.quantize.additive import AdditiveOptions, Stage, quantize_additive
from jaxcodec.quantize.kmeans import check_finite, relative_error
from jaxcodec.spec import CodebookSpec
from jaxcodec.tensor import CodebookTensor
from jaxcodec.train.block_tuning import TuningOptions, held_out_from, tune_block
from jaxcodec.train.calibration import (
    Hessians,
    HiddenStates,
    Placement,
    advance,
    calibrate,
    embedded,
)
from jaxcodec.train.checkpoint import claim_directory, digest
from jaxcodec.train.quantization_progress import QuantizationProgress
from jaxcodec.train.quantization_report import BlockReport, LinearReport, QuantizationReport
from jaxcodec.train.quantized_blocks import read_block, write_block

SEEDS = 2**32  # what a key of JAX holds of a seed without 64-bit integers


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """How much work a model is worth, and how it is done.

    Attributes:
      matrix: rounds of Adam and beam search of each linear.
      tuning: of each block; needs calibration data.
      batch_size: calibration sequences on the device at once, and in a step of tuning.
      activations: where hidden states of all calibration sequences lie between blocks: n T D
        numbers, twice.
      seed: of all random choices, in [0, 2**32).

    Raises:
      ValueError: a field out of range.
    """

    matrix: AdditiveOptions = MATRIX_PRESETS["default"]
    tuning: TuningOptions = TuningOptions()
    batch_size: int = 4
    activations: Literal["memory", "disk"] = "memory"
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise ValueError(
                f"batch_size must be a whole number, at least 1, got {self.batch_size!r}."
            )
        if type(self.seed) is not int or not 0 <= self.seed < SEEDS:
            raise ValueError(
                f"seed must be a whole number from 0 to {SEEDS - 1}, got {self.seed!r}."
            )
        if self.activations not in ("memory", "disk"):
            raise ValueError(f"activations must be memory or disk, got {self.activations!r}.")


PRESETS = {
    "kmeans": QuantizeOptions(MATRIX_PRESETS["kmeans"], TuningOptions(epochs=0)),
    "fast": QuantizeOptions(MATRIX_PRESETS["fast"], TuningOptions(epochs=0)),
    "default": QuantizeOptions(),
    "best": QuantizeOptions(MATRIX_PRESETS["best"], TuningOptions(epochs=20)),
}


def select_specs(
    config: ModelConfig,
    spec: CodebookSpec,
    overrides: Sequence[tuple[str, CodebookSpec | None]] = (),
) -> Specs:
    """The format of every linear of a model's blocks.

    Args:
      config: of the model.
      spec: for all that no override names.
      overrides: (regular expression, spec), of which the first that is found in a linear's path
        counts; None leaves the linear dense. `down_proj` means every block's, `layers\\.0\\.` the
        whole first block.

    Raises:
      ValueError: an expression that is none, that no linear answers to, or that others overrule
        in all.
    """
    names = [name for name, _ in linear_shapes(config)]
    chosen: dict[str, CodebookSpec | None] = {}
    for expression, other in overrides:
        try:
            found = [name for name in names if re.search(expression, name)]
        except re.error as error:
            raise ValueError(f"{expression!r} is no regular expression: {error}.") from None
        if not found:
            raise ValueError(
                f"{expression!r} is found in no linear of the model; the first is {names[0]}."
            )
        if all(name in chosen and chosen[name] != other for name in found):
            raise ValueError(
                f"{expression!r} never counts: expressions before it are found in all that it is "
                "found in. Put it before them, or leave it out."
            )
        chosen |= {name: other for name in found if name not in chosen}
    formats = ((name, chosen.get(name, spec)) for name in names)
    return tuple((name, one) for name, one in formats if one is not None)


def quantize_model(
    model: Model,
    spec: str | CodebookSpec | Specs,
    calibration: np.ndarray | None = None,
    options: QuantizeOptions = PRESETS["default"],
    directory: str | os.PathLike | None = None,
    *,
    mesh: Mesh | None = None,
    quiet: bool = False,
) -> tuple[Model, QuantizationReport]:
    """The model with the linears of its blocks as codebooks, and what that cost.

    The same model, data and options give the same bits on the same kind of device, also where a
    run with a directory was stopped: it goes on at its first unfinished block.

    Args:
      model: dense, without a bank of adapters; its arrays may lie in host memory. Biases stay.
      spec: of all linears, such as "m2v8g128", or (path, spec) of those to quantize: see
        `select_specs`.
      calibration: int32 [n, T], sequences such as the model will see; None for none.
      options: such as PRESETS["fast"].
      directory: where finished blocks are kept; None for nowhere.
      mesh: devices whose axis "data" shares batches and columns; None for one device.
      quiet: show no progress.

    Returns:
      (the quantized model, its arrays where those of `model` are, and the report).

    Raises:
      ValueError: a linear that is quantized already, or that its spec cannot hold; tokens outside
        the vocabulary; weights or inputs that are not finite; a directory that holds another run.
      OSError: a full disk; finished blocks are kept.
    """
    specs, place = _specs(model, spec), Placement(mesh)
    directory = None if directory is None else Path(directory)
    if calibration is not None:
        calibration = np.asarray(calibration)
        _check_calibration(model.config, calibration, options, place)
    _check_finite(model, specs)
    if directory is not None:
        claim_run(model, specs, calibration, options, directory, place.name)
    done = {} if directory is None else dict(_finished(model, specs, directory))
    states = None
    if calibration is not None and len(done) < model.config.num_layers:
        states = embedded(model, calibration, directory if options.activations == "disk" else None)
    with QuantizationProgress(model.config.num_layers, quiet) as progress:
        for layer in range(model.config.num_layers):
            progress.begin(layer)
            earlier = layer in done
            if not earlier:
                dense, here = take_block(model, layer), _within(specs, layer)
                done[layer] = _quantize_block(dense, layer, here, states, options, place, progress)
                if directory is not None:
                    write_block(directory, layer, *done[layer])
            elif states is not None:
                advance(place.replicated(done[layer][0]), states.inputs, options.batch_size, place)
            progress.end(done[layer][1], earlier)
    quantized = with_blocks(model, {layer: block for layer, (block, _) in done.items()})
    reports = [report for _, report in done.values()]
    return quantized, QuantizationReport.of(reports, quantized.nbytes)


def claim_run(
    model: Model,
    specs: Specs,
    calibration: np.ndarray | None,
    options: QuantizeOptions,
    directory: Path,
    devices: str,
) -> None:
    """Make `directory` that of a run, or see that it is: by options, and hashes of what goes in.

    `devices`, as `Placement.name`, are among them: sums over those that share a batch or columns
    have last bits of their own. Where hidden states lie between blocks is nothing that the result
    follows from.

    Raises:
      ValueError: it holds another run; says what differs.
    """
    data = None if calibration is None else np.ascontiguousarray(calibration, np.int32)
    manifest = {
        "format": 1,
        "weights": digest(model.weights),
        "config": repr(model.config),
        "devices": devices,
        **{f"specs.{name}": str(spec) for name, spec in specs},
        "calibration": None if data is None else hashlib.sha256(data.data).hexdigest(),
        "calibration_shape": None if data is None else list(data.shape),
        "batch_size": options.batch_size,
        "seed": options.seed,
        **{f"matrix.{name}": x for name, x in dataclasses.asdict(options.matrix).items()},
        **{f"tuning.{name}": x for name, x in dataclasses.asdict(options.tuning).items()},
    }
    claim_directory(directory, manifest)


def _quantize_block(
    dense: BlockModel,
    layer: int,
    specs: Specs,
    states: HiddenStates | None,
    options: QuantizeOptions,
    place: Placement,
    progress: QuantizationProgress,
) -> tuple[BlockModel, BlockReport]:
    """The block quantized and tuned, where `dense` is; `states` hold what the next block reads.

    One that stays dense as a whole is only run.
    """
    clock = _Clock()
    home, dense = _home(dense), place.replicated(dense)
    hessians: Hessians = {}
    if states is not None and specs:
        progress.stage("calibration")
        hessians = calibrate(dense, states, options.batch_size, place)
        clock.lap("calibration")
    key = jax.random.fold_in(jax.random.key(options.seed), layer)
    tensors, linears = {}, []
    for i, (path, spec) in enumerate(specs):
        name = f"layers.{layer}.{path}"
        H, W = hessians.get(SHARED_INPUTS[path]), place.columns(dense.kernels[path])
        progress.stage(name)
        try:
            w, stages = quantize_additive(
                W, H, spec, jax.random.fold_in(key, i), options.matrix, W.dtype
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        tensors[path] = place.replicated(w)
        linears.append(_linear_report(name, W, w, stages))
        clock.add(stages)
    block, tuning = dense.quantized(tensors), None
    del hessians, tensors
    if states is not None and specs:
        progress.stage("tuning")
        block, tuning = tune_block(
            block,
            states.inputs,
            states.targets,
            options.tuning,
            options.batch_size,
            options.seed + layer,
            place,
        )
        clock.lap("tuning")
    if states is not None:
        advance(block, states.inputs, options.batch_size, place)
        clock.lap("next inputs")
    report = BlockReport(layer, tuple(linears), tuning, clock.seconds)
    return jax.device_put(block, home), report


class _Clock:
    """Seconds by stage, summed up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last call for `stage`."""
        before, self._last = self._last, time.perf_counter()
        self._count(stage, self._last - before)

    def add(self, stages: Sequence[Stage]) -> None:
        """Count the stages of a linear, and what is left of the time since the last call."""
        for stage in stages:
            self._count(stage.name, stage.seconds)
        self.lap("rest")
        self.seconds["rest"] -= sum(stage.seconds for stage in stages)

    def _count(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


def _linear_report(
    name: str, W: jax.Array, w: CodebookTensor, stages: Sequence[Stage]
) -> LinearReport:
    return LinearReport(
        name,
        *w.shape,
        str(w.spec),
        w.bits_per_weight,
        relative_error(W, w),
        stages[-1].error,
        sum(stage.seconds for stage in stages),
    )


def _check_finite(model: Model, specs: Specs) -> None:
    """A weight of the last block that is no number is better found before the first one's hour."""
    for layer in range(model.config.num_layers):
        kernels = take_block(model, layer).kernels
        for path, _ in _within(specs, layer):
            check_finite(kernels[path], f"layers.{layer}.{path}")


def _specs(model: Model, spec: str | CodebookSpec | Specs) -> Specs:
    """(path, spec) of the linears to quantize, in the model's order; all of them fit."""
    if model.specs:
        name, before = model.specs[0]
        raise ValueError(f"{name} is already quantized, as {before}; quantize the dense model.")
    shapes = dict(linear_shapes(model.config))
    spec = CodebookSpec.parse(spec) if isinstance(spec, str) else spec
    chosen = dict.fromkeys(shapes, spec) if isinstance(spec, CodebookSpec) else dict(spec)
    if unknown := chosen.keys() - shapes.keys():
        raise ValueError(f"The model has no linear {', '.join(sorted(unknown))}.")
    if not chosen:
        raise ValueError("There is no linear to quantize: every one is to stay dense.")
    for name, one in chosen.items():
        try:
            one.check_shape(*shapes[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return tuple((name, chosen[name]) for name in shapes if name in chosen)


def _within(specs: Specs, layer: int) -> Specs:
    """The specs of one block, by paths within it."""
    prefix = f"layers.{layer}."
    return tuple((p.removeprefix(prefix), spec) for p, spec in specs if p.startswith(prefix))


def _finished(
    model: Model, specs: Specs, directory: Path
) -> Iterator[tuple[int, tuple[BlockModel, BlockReport]]]:
    """(layer, (block, report)) of the blocks that a run has finished."""
    for layer in range(model.config.num_layers):
        dense = take_block(model, layer)
        done = read_block(directory, layer, dense, _within(specs, layer))
        if done is None:
            return
        block = jax.device_put(done[0], _home(dense), may_alias=False)
        yield layer, (block, done[1])


def _home(block: BlockModel) -> Any:
    """Where a block's arrays are."""
    return jax.tree.leaves(block.weights)[0].sharding


def _check_calibration(
    config: ModelConfig, calibration: np.ndarray, options: QuantizeOptions, place: Placement
) -> None:
    if calibration.ndim != 2 or not np.issubdtype(calibration.dtype, np.integer):
        raise ValueError(
            f"calibration must be integers [n, T], got {calibration.dtype} "
            f"{list(calibration.shape)}."
        )
    if not calibration.size:
        raise ValueError("calibration holds no tokens; None stands for no data.")
    if calibration.shape[1] > config.max_positions:
        raise ValueError(
            f"Sequences of {calibration.shape[1]} tokens exceed the model's context of "
            f"{config.max_positions}."
        )
    if calibration.min() < 0 or calibration.max() >= config.vocab_size:
        raise ValueError(
            f"calibration holds tokens from {calibration.min()} to {calibration.max()}, the model "
            f"knows 0 to {config.vocab_size - 1}: they were made with another tokenizer."
        )
    place.check_batch(options.batch_size, len(calibration))
    held_out_from(len(calibration), options.batch_size, options.tuning)
