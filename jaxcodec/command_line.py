"""How a command ends that cannot go on: with a sentence, never with a traceback."""

import collections
import contextlib
import sys
from collections.abc import Iterator, Sequence

import jax

INTERRUPTED = 130  # what shells report for SIGINT, 128 + 2


@contextlib.contextmanager
def ended_by_a_sentence(program: str, full_device: str) -> Iterator[None]:
    """Bad input, a full disk or device and Ctrl-C end the process within, and are said on stderr.

    Status 1, and 130 for Ctrl-C; what a KeyboardInterrupt carries tells how to go on.

    Args:
      program: what the sentence begins with.
      full_device: what to do where the device's memory does not suffice.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"{program}: {error}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"{program}: The device's memory is full. {full_device}")
    except KeyboardInterrupt as interrupt:
        print(f"{program}: Stopped. {interrupt}".rstrip(), file=sys.stderr)
        sys.exit(INTERRUPTED)


def refuse_repeated_options(arguments: Sequence[str]) -> None:
    """Of an option that is given twice, or denied by --no-, the last would count without a word.

    Raises:
      ValueError: names the option.
    """
    given = [text[2:].partition("=")[0] for text in arguments if text.startswith("--")]
    names = [name.replace("_", "-").removeprefix("no-") for name in given if name]
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise ValueError(
                f"--{name} is given {count} times: give it once, several values after one name."
            )


@contextlib.contextmanager
def when_stopped(how_to_go_on: str) -> Iterator[None]:
    """A KeyboardInterrupt from within carries this sentence."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_go_on) from None
