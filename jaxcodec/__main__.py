"""The command line of the codec: `python -m jaxcodec COMMAND --help`.

quantize    write a model with codebooks in place of its blocks' linears
inspect     print what a model directory holds
convert     write a quantized model in another layout
"""

import sys
from pathlib import Path
from typing import Literal


def quantize(model: Path, /, *, spec: str, out: Path, seed: int = 0) -> None:
    """Quantize the linears of a model's blocks by k-means, without data.

    Args:
      model: directory of a dense model in Hugging Face's format.
      spec: how to store them, such as m2v8g128 or m1v4g128.
      out: directory of the result: config.json, weights, tokenizer and quantization.json.
      seed: of the random choices.
    """
    import jax

    from jaxcodec.models.load import copy_tokenizer, load_model, save_model
    from jaxcodec.spec import CodebookSpec
    from jaxcodec.train.ptq import quantize_model

    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give --out a new directory.")
    parsed = CodebookSpec.parse(spec)
    quantized, report = quantize_model(load_model(model), parsed, jax.random.key(seed))
    save_model(out, quantized)
    copy_tokenizer(model, out)
    report.write(out)
    print(report)


def inspect(model: Path, /) -> None:
    """Print layers, formats, bits, errors and total bytes of a model directory.

    Args:
      model: the directory, dense or quantized.
    """
    from jaxcodec.train.quantization_report import inspect_model

    print(inspect_model(model))


def convert(model: Path, out: Path, /, *, to: Literal["jaxcodec", "codegemm", "aqlm"]) -> None:
    """Write a quantized model in another layout, with the same numbers.

    Args:
      model: directory of a quantized model in any of the layouts.
      out: directory of the result: config.json, weights, tokenizer and report; new or empty.
      to: our layout, that of CodeGEMM's own code, or AQLM's for transformers.
    """
    from jaxcodec.models.convert import convert_model
    from jaxcodec.train.progress import progress

    convert_model(model, out, to, progress)


def main() -> None:
    """Run the command line; bad input ends it with one sentence and status 1."""
    import tyro

    try:
        commands = {"quantize": quantize, "inspect": inspect, "convert": convert}
        tyro.extras.subcommand_cli_from_dict(commands, prog="jaxcodec")
    except (ValueError, OSError) as error:
        sys.exit(f"jaxcodec: {error}")


if __name__ == "__main__":
    main()
