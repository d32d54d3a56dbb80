"""From one layout of codebook linears to another, without a change of any number.

Source: jaxcodec/checkpoints/layouts.py, for what the layouts are.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxcodec.checkpoints.files import new_directory, write_json
from jaxcodec.checkpoints.layouts import config_in, layout_named
from jaxcodec.checkpoints.safetensors import write_tensors
from jaxcodec.models.load import (
    CONFIG_FILE,
    REPORT_FILE,
    Checkpoint,
    copy_companions,
    open_model,
    stored_linears,
)
from jaxcodec.models.transformer import linear_shapes
from jaxcodec.tensor import CodebookTensor

Report = Callable[[int, str, float], None]


@contextlib.contextmanager
def silent(total: int, start: int) -> Iterator[Report]:
    """A display that shows nothing."""
    yield lambda step, text, left: None


def convert_model(
    source: str | Path,
    target: str | Path,
    layout: str,
    progress: Callable[[int, int], contextlib.AbstractContextManager[Report]] = silent,
) -> None:
    """Write the model in `source`, quantized in any layout, to `target` in another.

    Every tensor keeps its values and its dtype, config.json its other keys; tokenizer and
    quantization report come along. `target` appears whole or not at all. Host memory holds the
    codes of the model once, and one file of the result.

    Args:
      source: a model directory, see `load_model`.
      target: a new or empty directory.
      layout: "jaxcodec", "codegemm" or "aqlm".
      progress: display(linears, 0), a context that gives report(linears done, name, seconds left).

    Raises:
      FileNotFoundError: `source` or a file of it is missing.
      OSError: a file cannot be written.
      ValueError: what `load_model` refuses, a dense model, a `target` that is not empty, or what
        the layout cannot hold; by name.
    """
    source, checkpoint = Path(source), open_model(source)
    shapes, specs = dict(linear_shapes(checkpoint.config)), dict(checkpoint.specs)
    if not specs:
        raise ValueError(f"{source} is dense: there is nothing to convert. Quantize it first.")
    written, dense = layout_named(layout), checkpoint.dense
    hf = config_in(written, checkpoint.hf, specs, shapes, dense.keys())
    with new_directory(Path(target)) as directory:
        with progress(len(specs), 0) as report:
            linears = stored_linears(written, _reported(checkpoint, report))
        write_tensors(directory, dense | linears)
        write_json(directory / CONFIG_FILE, hf)
        # All of it says the same in every layout.
        copy_companions(source, directory)
        if (source / REPORT_FILE).is_file():
            shutil.copyfile(source / REPORT_FILE, directory / REPORT_FILE)


def _reported(checkpoint: Checkpoint, report: Report) -> Iterator[tuple[str, CodebookTensor]]:
    start, total = time.perf_counter(), len(checkpoint.specs)
    for done, (path, spec) in enumerate(checkpoint.specs):
        yield path, checkpoint.linear(path)
        left = (time.perf_counter() - start) / (done + 1) * (total - done - 1)
        report(done + 1, f"{path}  {spec}", left)
