"""The command line of the codec: `python -m jaxcodec COMMAND --help`.

quantize    write a model with codebooks in place of its blocks' linears
inspect     print what a model directory holds
convert     write a quantized model in another layout
"""

import sys
from pathlib import Path
from typing import Literal


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
    from jaxcodec.command_line import when_stopped
    from jaxcodec.models.convert import convert_model
    from jaxcodec.train.progress import progress

    with when_stopped("Nothing was written; convert anew."):
        convert_model(model, out, to, progress)


def main() -> None:
    """Run the command line; what ends it early is one sentence: see `ended_by_a_sentence`."""
    from jaxcodec.command_line import ended_by_a_sentence, refuse_repeated_options

    full_device = (
        "Fewer sequences at once (--batch-size), or shorter ones (--length), need less, and make "
        "it another run: give another --out."
    )
    with ended_by_a_sentence("jaxcodec", full_device):
        import tyro

        from jaxcodec.train.quantize import quantize

        refuse_repeated_options(sys.argv[1:])
        commands = {"quantize": quantize, "inspect": inspect, "convert": convert}
        tyro.extras.subcommand_cli_from_dict(commands, prog="jaxcodec")


if __name__ == "__main__":
    main()
