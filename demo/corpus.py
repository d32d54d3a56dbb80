"""The text of the demo: the Python standard library, mixed with exercises about orders.

`python -m jaxcodec.demo.corpus --out DIR` writes

    pretrain.jsonl                                {"text"}: documents for the base model, shuffled
    heldout.jsonl                                 {"text"}: standard library files never trained on
    {extract,compute,format}.{train,heldout}.jsonl  {"prompt", "completion"}: the agents' turns
    corpus.json                                   Python version, seed, documents and bytes of each

The library is read from the running interpreter, so it differs a little between Python versions
and much where a distribution leaves out `test`; corpus.json records which Python it was.
"""

import hashlib
import importlib
import json
import platform
import pydoc
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from rich.progress import track

from jaxcodec.demo.exercises import exercises
from jaxcodec.demo.records import Split
from jaxcodec.demo.tasks import write_examples

# Tables of codecs; and test data: other encodings, broken syntax, generated or borrowed files.
SKIPPED_FOLDERS = frozenset(
    "site-packages __pycache__ encodings idle_test lib2to3 test_lib2to3 tokenizedata "
    "encoded_modules certdata decimaltestdata data pydoc_data".split()
)

# Above this share of digits and backslashes a file is a table (html/entities.py has 0.151) rather
# than code (test_fractions.py has 0.100).
MAX_DIGIT_SHARE = 0.15

# One document in 64 is held out, by a hash of its name: some 300 KB of text.
HELDOUT_PERIOD = 64


def read_sources(library: Path) -> Iterator[tuple[str, str]]:
    """Yields (relative path, text) of the Python sources below `library`, sorted by path."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        # _sysconfigdata_*.py and config-*/ hold the paths and compiler flags of one build.
        skipped = relative.parts[0].startswith(("_sysconfigdata", "config-"))
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and not skipped:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a test of source encodings
            if len(re.findall(r"[\d\\]", text)) <= MAX_DIGIT_SHARE * len(text):
                yield relative.as_posix(), text


def read_manual() -> Iterator[tuple[str, str]]:
    """Yields (name, text) of pydoc's language topics and its pages on the built-in modules.

    A page ends before its DATA section, whose values (`posix.environ`, `sys.path`) are those of
    one process and no documentation.
    """
    yield from (("topics/" + name, text) for name, text in sorted(topics.items()))
    for name in sys.builtin_module_names:
        page = pydoc.plain(pydoc.text.document(importlib.import_module(name)))
        yield "builtin/" + name, page.partition("\nDATA\n")[0]


def library_documents(library: Path | None = None) -> dict[str, str]:
    """Returns the standard library's documents by name, each text once, none empty.

    `library` is a folder of sources, by default the running interpreter's. Raises ValueError if
    it holds no sources.
    """
    library = Path(sysconfig.get_path("stdlib")) if library is None else library
    sources = dict(read_sources(library))
    if not sources:
        raise ValueError(f"Expected Python sources below {library}, found none: pass a library.")
    # Keyed by text, so that of equal documents the first one stays.
    names: dict[str, str] = {}
    for name, text in (sources | dict(read_manual())).items():
        if text.strip():
            names.setdefault(text.strip() + "\n", name)
    return {name: text for text, name in names.items()}


def split_of(name: str) -> Split:
    """Returns the split of the document `name`, the same for every Python version."""
    digest = hashlib.sha256(name.encode()).digest()
    return "heldout" if int.from_bytes(digest[:4], "big") % HELDOUT_PERIOD == 0 else "train"


def pretraining_exercises(size: int, seed: int) -> Iterator[str]:
    """Yields exercises of `size` characters together, or a little more."""
    written = 0
    for text in exercises(seed):
        if written >= size:
            return
        written += len(text) + 1
        yield text + "\n"


def write_texts(path: Path, texts: list[str]) -> dict[str, int]:
    """Writes JSONL {"text"} with a progress bar; returns the documents and bytes of text."""
    with path.open("w", encoding="utf-8") as file:
        for text in track(texts, description=f"{path.name:20}"):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)}


def write_corpus(
    out: Path,
    seed: int = 0,
    exercise_share: float = 0.2,
    train_examples: int = 40_000,
    heldout_examples: int = 500,
    library: Path | None = None,
) -> dict[str, object]:
    """Writes everything that the demo's models are trained and tested on; returns corpus.json.

    Args:
        out: The folder to write to, made if missing.
        seed: Of the exercises, the stories and the order of the documents.
        exercise_share: Exercises' share of the characters of pretrain.jsonl, in [0, 1).
        train_examples: Stories in each agent's training file.
        heldout_examples: Stories in each agent's held-out file.
        library: A folder of Python sources to read, by default the standard library's.
    """
    if not 0 <= exercise_share < 1:
        raise ValueError(f"Expected an exercise_share in [0, 1), got {exercise_share}.")
    out.mkdir(parents=True, exist_ok=True)
    documents = library_documents(library)
    texts = [text for name, text in documents.items() if split_of(name) == "train"]
    heldout = [text for name, text in documents.items() if split_of(name) == "heldout"]
    size = int(sum(map(len, texts)) * exercise_share / (1 - exercise_share))
    practice = list(pretraining_exercises(size, seed))
    mixed = texts + practice
    random.Random(seed).shuffle(mixed)
    facts: dict[str, object] = {
        "python": platform.python_version(),
        "seed": seed,
        "exercises": {"documents": len(practice), "bytes": sum(map(len, practice))},
        "pretrain": write_texts(out / "pretrain.jsonl", mixed),
        "heldout": write_texts(out / "heldout.jsonl", heldout),
        "examples": {"train": train_examples, "heldout": heldout_examples},
    }
    # Other stories than those of the exercises, which come from `seed` itself.
    write_examples(out, "train", train_examples, seed + 1)
    write_examples(out, "heldout", heldout_examples, seed + 1)
    (out / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def main() -> None:
    """Runs `write_corpus` from the command line."""
    import tyro

    print(json.dumps(tyro.cli(write_corpus), indent=2))


if __name__ == "__main__":
    main()
