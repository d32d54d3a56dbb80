"""The command `jaxcodec quantize`: a dense model in, a quantized one out, in one run or several.

<out>/run.json, blocks/, compiled/   what a stopped run goes on from; the latter two go at the end
<out>/config.json, model.safetensors, tokenizer, quantization.json, quantization.svg   the result
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from jaxcodec.checkpoints.files import read_json
from jaxcodec.command_line import when_stopped
from jaxcodec.models.load import (
    CONFIG_FILE,
    REPORT_FILE,
    copy_companions,
    load_model,
    other_config,
    save_model,
)
from jaxcodec.models.sharding import make_mesh
from jaxcodec.models.tokenizer import PretrainedTokenizer, Tokenizer
from jaxcodec.models.transformer import Model, Specs, linear_shapes
from jaxcodec.spec import CodebookSpec
from jaxcodec.train.calibration import read_calibration
from jaxcodec.train.checkpoint import MANIFEST, check_claim
from jaxcodec.train.ptq import PRESETS, claim_run, quantize_model, select_specs
from jaxcodec.train.quantization_figure import write_figure
from jaxcodec.train.quantization_report import QuantizationReport, inspect_model
from jaxcodec.train.quantized_blocks import FOLDER

COMPILED = "compiled"


def quantize(
    model: Path,
    /,
    *,
    spec: str,
    out: Path,
    data: Path | None = None,
    preset: Literal["kmeans", "fast", "default", "best"] = "default",
    layers: tuple[str, ...] = (),
    sequences: int = 128,
    length: int = 2048,
    batch_size: int | None = None,
    activations: Literal["memory", "disk"] = "memory",
    seed: int = 0,
) -> None:
    """Quantize the linears of a model's blocks, each for the inputs that the data gives it.

    A run that was stopped goes on at its first unfinished block when the same command is given
    again. All devices share the work.

    Args:
      model: directory of a dense model in Hugging Face's format.
      spec: how to store them, such as m2v8g128 or m1v4g128.
      out: directory of the result: config.json, weights, tokenizer and quantization.json.
      data: calibration text, JSONL of {"text"} or {"prompt", "completion"}; without it all inputs
        of a linear count alike.
      preset: how much work: k-means alone, a quick pass, the usual, or all that helps.
      layers: exceptions, EXPRESSION=SPEC or EXPRESSION=dense, such as down_proj=m2v8g32: a regular
        expression that is looked for in a linear's path (layers.0.mlp.down_proj); the first that is
        found counts.
      sequences: most calibration sequences.
      length: tokens of each; less where the model's context is shorter.
      batch_size: sequences on the devices at once; None for 4, or one for each device.
      activations: where hidden states of all sequences lie between blocks.
      seed: of the random choices.
    """
    mesh = make_mesh() if jax.device_count() > 1 else None
    if batch_size is None:
        batch_size = max(PRESETS[preset].batch_size, jax.device_count())
    options = dataclasses.replace(
        PRESETS[preset], batch_size=batch_size, activations=activations, seed=seed
    )
    check_claim(out)
    dense = load_on_host(model)
    specs = select_specs(dense.config, CodebookSpec.parse(spec), _overrides(layers))
    kept = other_config(model)
    _warn_of_growth(dense, specs)
    calibration = None
    if data is not None:
        longest = min(length, dense.config.max_positions)
        calibration = _read(data, PretrainedTokenizer(model), sequences, longest, batch_size)
    if (out / CONFIG_FILE).exists():  # the last file that a run writes, on whatever devices
        devices = read_json(out / MANIFEST).get("devices", "")
        claim_run(dense, specs, calibration, options, out, devices)
    else:
        how_to_go_on = f"The same command goes on at the first block that {out} does not hold."
        with when_stopped(how_to_go_on), compiled_programs_in(out / COMPILED):
            quantized, report = quantize_model(dense, specs, calibration, options, out, mesh=mesh)
            _write(out, quantized, report, model, kept)
    print(_finish(out))


def load_on_host(directory: Path) -> Model:
    """The model of a directory in host memory, where JAX has a CPU beside its accelerators."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        return load_model(directory)
    with jax.default_device(host):
        return load_model(directory)


def _write(
    out: Path, model: Model, report: QuantizationReport, source: Path, kept: Mapping[str, Any]
) -> None:
    """The result; config.json is the last file of all."""
    report.write(out)
    write_figure(out, report)
    copy_companions(source, out)
    save_model(out, model, kept)


def _finish(out: Path) -> QuantizationReport:
    """What a finished run left; what it would have gone on from is removed.

    Raises:
      ValueError: weights, config.json or report are damaged or gone; nothing is removed.
    """
    try:
        report = inspect_model(out)
        if not report.blocks:
            raise ValueError(f"There is no {REPORT_FILE}.")
    except (OSError, ValueError) as error:
        again = "makes them again" if (out / FOLDER).exists() else "quantizes anew"
        raise ValueError(
            f"{out} holds a finished run whose files are damaged: {error} Remove its "
            f"{CONFIG_FILE}, and the same command {again}."
        ) from None
    for folder in (FOLDER, COMPILED):
        shutil.rmtree(out / folder, ignore_errors=True)
    return report


def _warn_of_growth(model: Model, specs: Specs) -> None:
    """Codebooks that are large beside a small matrix can make it larger than it was."""
    shapes, before = dict(linear_shapes(model.config)), 8 * jnp.dtype(model.dtype).itemsize
    bits = {name: spec.bits_per_weight(*shapes[name], before) for name, spec in specs}
    grown = [f"{name} {now:.1f}" for name, now in bits.items() if now >= before]
    if grown:
        print(
            f"As codes no smaller than dense, {before} bits per weight, codebooks counted: "
            f"{len(grown)} of the linears, the first {grown[0]}. Leave them dense, or give them "
            "fewer bits.",
            flush=True,
        )


def _read(
    data: Path, tokenizer: Tokenizer, sequences: int, length: int, batch_size: int
) -> np.ndarray:
    """Sequences int32 [n, T]: whole batches, for devices to share, where there is one at all."""
    if sequences < 1 or length < 2:
        raise ValueError(
            f"Expected at least 1 sequence of at least 2 tokens, got {sequences} of {length}."
        )
    calibration = read_calibration(data, tokenizer, sequences, length)
    if len(calibration) > batch_size:
        calibration = calibration[: len(calibration) // batch_size * batch_size]
    print(f"{len(calibration)} calibration sequences of {length} tokens", flush=True)
    return calibration


def _overrides(layers: Sequence[str]) -> list[tuple[str, CodebookSpec | None]]:
    overrides = []
    for text in layers:
        expression, separator, chosen = text.rpartition("=")
        if not separator or not expression:
            raise ValueError(
                f"Expected EXPRESSION=SPEC or EXPRESSION=dense, such as down_proj=m2v8g32, "
                f"got {text!r}."
            )
        spec = None if chosen == "dense" else CodebookSpec.parse(chosen)
        overrides.append((expression, spec))
    return overrides


@contextlib.contextmanager
def compiled_programs_in(folder: Path) -> Iterator[None]:
    """On a GPU, so that a run that goes on computes with the kernels that autotuning chose.

    A cache that the process has already stays. Afterwards JAX's settings are as they were.
    """
    if jax.default_backend() != "gpu" or jax.config.jax_compilation_cache_dir:
        yield
        return
    chosen = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in chosen}
    try:
        _configure(chosen)
        yield
    finally:
        _configure(before)


def _configure(options: Mapping[str, Any]) -> None:
    """JAX opens its cache once, and would go on with the first directory."""
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
