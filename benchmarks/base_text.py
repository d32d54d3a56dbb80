"""The text of the benchmarks' bases: Python of the running interpreter, with or without packages.

    python -m benchmarks.base_text --out build/text                # the standard library
    python -m benchmarks.base_text --out build/text --packages     # and all installed packages

writes

    OUT/train.jsonl         {"text"}: documents for training, shuffled
    OUT/calibration.jsonl   {"text"}: the first of them, for quantizing and tuning
    OUT/heldout.jsonl       {"text"}: one document in 64, by a hash of its name: the demo's choice,
                            which no base was trained on
    OUT/text.json           documents and bytes of each, packages and their versions

A document is a file of sources, a topic of the manual, or what a package says of itself.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxcodec.checkpoints.files import replacement, write_json
from jaxcodec.demo.corpus import library_documents, read_sources, split_of
from jaxcodec.demo.tokenizer import read_texts
from jaxcodec.models.tokenizer import PretrainedTokenizer

TRAIN, CALIBRATION, HELDOUT, FACTS = (
    "train.jsonl",
    "calibration.jsonl",
    "heldout.jsonl",
    "text.json",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Write the text of a base.

    Attributes:
      out: the folder, made if missing.
      packages: read the installed packages too.
      megabytes: of all text, at most; which documents of packages it holds, a hash says.
      calibration_megabytes: of calibration.jsonl, at most.
      folder: of the packages, by default the running interpreter's.
      library: of the standard library's sources, by default the running interpreter's.
      seed: of the order.
    """

    out: Path
    packages: bool = False
    megabytes: float = 100.0
    calibration_megabytes: float = 16.0
    folder: Path | None = None
    library: Path | None = None
    seed: int = 0


def package_documents(folder: Path) -> dict[str, str]:
    """Sources and descriptions of the packages in `folder` by name, filtered as the demo's are."""
    documents = {f"packages/{name}": text for name, text in read_sources(folder)}
    for package in importlib.metadata.distributions(path=[str(folder)]):
        description = package.metadata.json.get("description")
        if isinstance(description, str):
            documents[f"descriptions/{package.name}"] = description
    return documents


def documents(options: Options) -> dict[str, str]:
    """All documents by name, each text once, none empty; the standard library comes first."""
    found = library_documents(options.library)
    if not options.packages:
        return found
    folder = options.folder or Path(sysconfig.get_path("purelib"))
    others = package_documents(folder)
    texts = set(found.values())
    left = 1e6 * options.megabytes - sum(len(text.encode()) for text in texts)
    for name in sorted(others, key=_digest):
        text = others[name].strip() + "\n"
        size = len(text.encode())
        if len(text) > 1 and text not in texts and size <= left:
            found[name] = text
            texts.add(text)
            left -= size
    return found


def write_text(options: Options) -> dict[str, Any]:
    """Write all files; returns what text.json says."""
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = documents(options)
    train = [text for name, text in chosen.items() if split_of(name) == "train"]
    held_out = [text for name, text in chosen.items() if split_of(name) == "heldout"]
    for texts in (train, held_out):
        random.Random(options.seed).shuffle(texts)
    calibration = list(_up_to(train, 1e6 * options.calibration_megabytes))
    facts: dict[str, Any] = {"python": platform.python_version(), "seed": options.seed}
    for name, texts in ((TRAIN, train), (CALIBRATION, calibration), (HELDOUT, held_out)):
        _write(options.out / name, texts)
        size = sum(len(text.encode()) for text in texts)
        facts[name] = {"documents": len(texts), "bytes": size}
    if options.packages:
        folder = options.folder or Path(sysconfig.get_path("purelib"))
        found = importlib.metadata.distributions(path=[str(folder)])
        facts["packages"] = {package.name: package.version for package in found}
    write_json(options.out / FACTS, facts)
    return facts


def read_tokens(path: Path, tokenizer: PretrainedTokenizer) -> np.ndarray:
    """int32 [n]: the texts of a JSONL file, each ended by eos; all processors tokenize."""
    texts = list(read_texts(path))
    encoded = tokenizer.pretrained.backend_tokenizer.encode_batch(texts)
    eos = np.array([tokenizer.eos_id], np.int32)
    parts = [part for text in encoded for part in (np.array(text.ids, np.int32), eos)]
    return np.concatenate(parts)


def _digest(name: str) -> bytes:
    # Not the digest that splits: of what it held out, all came first or last.
    return hashlib.sha256(f"order/{name}".encode()).digest()


def _up_to(texts: Iterable[str], size: float) -> Iterator[str]:
    """The first texts, of `size` bytes together at most, but one at least."""
    total = 0
    for i, text in enumerate(texts):
        total += len(text.encode())
        if i and total > size:
            return
        yield text


def _write(path: Path, texts: list[str]) -> None:
    # Whole or not at all: several processes may write the same text.
    with replacement(path) as [temporary], temporary.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def main() -> None:
    """Run the command line."""
    import tyro

    facts = write_text(tyro.cli(Options, prog="python -m benchmarks.base_text"))
    facts.pop("packages", None)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
