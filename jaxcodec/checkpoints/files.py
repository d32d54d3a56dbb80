"""Files that are replaced whole or not at all, and JSON read strictly."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MOST_NAMED = 8  # things that are wrong, of which a sentence names no more


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


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends without an error.

    By then its files are on the disk (fsync). After an error it is gone; after a kill it is left
    beside `path`, under a name that begins with a dot. `path` is never there in part.

    Raises:
      ValueError: `path` is there, and is not an empty directory.
    """
    path = Path(os.path.realpath(path))  # what a link points to is made, on its own file system
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        what = "not empty" if path.is_dir() else "a file"
        raise ValueError(f"{path} is {what}; give a new directory.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def first_few(items: Sequence[str]) -> list[str]:
    """The first items, and how many more there are: for a sentence, not a page."""
    more = [f"and {len(items) - MOST_NAMED} more"] if len(items) > MOST_NAMED else []
    return [*items[:MOST_NAMED], *more]


def whole_number(content: Any, key: str, where: str) -> int:
    """`content[key]`, refused unless `content` is an object and the value a whole number above 0.

    Raises:
      ValueError: names the key, and `where` it was looked for.
    """
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"{where} lacks {key!r}.")
    if type(content[key]) is not int or content[key] < 1:
        raise ValueError(f"{where}: {key} must be a whole number above 0, got {content[key]!r}.")
    return content[key]
