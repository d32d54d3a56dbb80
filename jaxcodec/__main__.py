"""The command line of the codec: `python -m jaxcodec COMMAND --help`.

quantize    write a model with codebooks in place of its blocks' linears
inspect     print what a model directory holds
"""

import sys
from pathlib import Path


def inspect(model: Path, /) -> None:
    """Print layers, formats, bits, errors and total bytes of a model directory.

    Args:
      model: the directory, dense or quantized.
    """
    from jaxcodec.train.quantization_report import inspect_model

    print(inspect_model(model))


def main() -> None:
    """Run the command line; bad input ends it with one sentence and status 1."""
    import tyro

    from jaxcodec.train.quantize import quantize

    try:
        commands = {"quantize": quantize, "inspect": inspect}
        tyro.extras.subcommand_cli_from_dict(commands, prog="jaxcodec")
    except (ValueError, OSError) as error:
        sys.exit(f"jaxcodec: {error}")


if __name__ == "__main__":
    main()
