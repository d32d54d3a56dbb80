"""The text of the bases: nothing that is held out is trained on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import base_text
from jaxcodec.demo import corpus
from jaxcodec.demo.corpus import split_of
from jaxcodec.demo.tokenizer import read_texts
from jaxcodec.models.tokenizer import PretrainedTokenizer

TABLE = "X = [" + "0x1234, " * 50 + "]\n"


@pytest.fixture(scope="module", autouse=True)
def without_the_manual() -> Iterator[None]:
    """Its pages take a second to write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "read_manual", lambda: iter(()))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A library of one module, and 200 packages: one has the same text, one is a table."""
    library, packages = (tmp_path_factory.mktemp(name) for name in ("library", "packages"))
    (library / "one.py").write_text("def one():\n    return None\n")
    for i in range(200):
        folder = packages / f"package{i}"
        folder.mkdir()
        (folder / "__init__.py").write_text(f"name = 'package {'i' * i}'\n")
    (packages / "package0" / "copy.py").write_text("def one():\n    return None\n")
    (packages / "package0" / "table.py").write_text(TABLE)
    described = packages / "thing-1.2.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Name: thing\nVersion: 1.2\n\nWhat the thing is for.\n")
    return library, packages


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory) -> tuple[Path, dict]:
    library, packages = folders
    out = tmp_path_factory.mktemp("text")
    facts = base_text.write_text(
        base_text.Options(
            out=out,
            packages=True,
            folder=packages,
            library=library,
            calibration_megabytes=0.01,
        )
    )
    return out, facts


def test_held_out_documents_are_in_no_other_file(folders, written):
    library, packages = folders
    out, facts = written
    train, calibration, held_out = (
        list(read_texts(out / name))
        for name in (base_text.TRAIN, base_text.CALIBRATION, base_text.HELDOUT)
    )
    assert held_out
    assert not set(held_out) & set(train)
    assert calibration == train[: len(calibration)]
    names = base_text.documents(
        base_text.Options(out=out, packages=True, folder=packages, library=library)
    )
    assert {names[name] for name in names if split_of(name) == "heldout"} == set(held_out)
    assert facts[base_text.HELDOUT]["documents"] == len(held_out)
    assert facts["packages"] == {"thing": "1.2"}


def test_each_text_is_there_once_and_tables_are_not(written):
    out, _ = written
    texts = [*read_texts(out / base_text.TRAIN), *read_texts(out / base_text.HELDOUT)]
    assert len(texts) == len(set(texts))
    assert "def one():\n    return None\n" in texts
    assert "What the thing is for.\n" in texts
    assert TABLE not in texts


def test_packages_fill_what_the_library_leaves(folders, tmp_path):
    library, packages = folders
    alone = base_text.documents(base_text.Options(out=tmp_path, library=library))
    size = sum(len(text.encode()) for text in alone.values())
    options = base_text.Options(
        out=tmp_path, packages=True, folder=packages, library=library, megabytes=size / 1e6 + 1e-3
    )
    both = base_text.documents(options)
    added = sum(len(text.encode()) for name, text in both.items() if name not in alone)
    assert 0 < added <= 1000


def test_tokens_are_those_of_one_text_after_another(written, request):
    out, _ = written
    tokenizer = PretrainedTokenizer(request.config.rootpath / "tests/fixtures/tokenizer")
    expected = []
    for text in read_texts(out / base_text.HELDOUT):
        expected += [*tokenizer.encode(text), tokenizer.eos_id]
    tokens = base_text.read_tokens(out / base_text.HELDOUT, tokenizer)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, expected)
