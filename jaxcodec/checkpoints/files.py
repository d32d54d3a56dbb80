"""Files that are replaced whole or not at all, and JSON read strictly."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacement(*paths: Path) -> Iterator[list[Path]]:
    """Temporary paths, one beside each of `paths`, that take their places in the order given.

    They do so when the block ends without an error, and only once all of them are on the disk
    (fsync). After an error, a full disk say, `paths` are as they were and the temporary files gone.
    """
    temporaries = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    try:
        for temporary in temporaries:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
        yield temporaries
        for temporary in temporaries:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not UTF-8 JSON, or holds something else than an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented JSON in place of `path`, whole or not at all."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with replacement(Path(path)) as [temporary]:
        temporary.write_text(text, encoding="utf-8")
