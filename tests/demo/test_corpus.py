import json
import os
import sys

import pytest

from jaxcodec.demo.corpus import (
    library_documents,
    pretraining_exercises,
    read_manual,
    split_of,
    write_corpus,
)


@pytest.fixture
def library(tmp_path):
    """Sources enough that some are held out, with a table, a copy and a skipped folder."""
    root = tmp_path / "library"
    (root / "encodings").mkdir(parents=True)
    for i in range(200):
        (root / f"module_{i}.py").write_text(f'"""Documentation of the module {i}."""\n')
    (root / "copy.py").write_text('"""Documentation of the module 7."""\n')
    (root / "empty.py").write_text("\n")
    (root / "table.py").write_text("x = [0x1234, 0x5678]\n")
    (root / "latin.py").write_bytes("é = 1\n".encode("latin-1"))
    (root / "encodings" / "cp1.py").write_text("decoding = None\n")
    (root / "_sysconfigdata_x.py").write_text("build = None\n")
    (root / "config-3-x").mkdir()
    (root / "config-3-x" / "python-config.py").write_text("prefix = None\n")
    return root


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_documents_are_distinct_texts_without_tables_and_test_data(library):
    documents = library_documents(library)
    own = {name for name in documents if name.endswith(".py")}
    assert len(set(documents.values())) == len(documents)
    assert own == {f"module_{i}.py" for i in range(200) if i != 7} | {"copy.py"}


def test_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found none"):
        library_documents(tmp_path)


def test_manual_holds_topics_and_built_in_modules_but_nothing_of_this_process():
    manual = dict(read_manual())
    assert "assert_stmt" in manual["topics/assert"]
    assert "functional" in manual["builtin/itertools"].lower()
    text = "\n".join(manual.values())
    assert os.environ["PATH"] not in text
    assert sys.prefix not in text


def test_exercises_fill_the_size_asked_for():
    size = sum(map(len, pretraining_exercises(5000, seed=0)))
    assert 5000 <= size < 7000
    assert list(pretraining_exercises(0, seed=0)) == []


def test_corpus_mixes_library_and_exercises_and_keeps_the_held_out_apart(library, tmp_path):
    out = tmp_path / "corpus"
    facts = write_corpus(out, 0, 0.25, train_examples=6, heldout_examples=3, library=library)
    pretrain = [line["text"] for line in read_lines(out / "pretrain.jsonl")]
    heldout = [line["text"] for line in read_lines(out / "heldout.jsonl")]
    documents = library_documents(library)
    assert set(heldout) == {t for name, t in documents.items() if split_of(name) == "heldout"}
    assert heldout
    assert set(pretrain).isdisjoint(heldout)
    practice = sum(len(text) for text in pretrain if text not in documents.values())
    assert practice / sum(map(len, pretrain)) == pytest.approx(0.25, abs=0.01)
    for agent in ("extract", "compute", "format"):
        assert len(read_lines(out / f"{agent}.train.jsonl")) == 6
        assert len(read_lines(out / f"{agent}.heldout.jsonl")) == 3
    assert json.loads((out / "corpus.json").read_text()) == facts
    assert facts["python"] == sys.version.split()[0]


def test_corpus_depends_on_its_seed_alone(library, tmp_path):
    written = []
    for folder, seed in (("first", 5), ("again", 5), ("other", 6)):
        write_corpus(tmp_path / folder, seed, 0.1, 2, 2, library)
        written.append((tmp_path / folder / "pretrain.jsonl").read_bytes())
    assert written[0] == written[1]
    assert written[0] != written[2]


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_impossible_share_of_exercises_is_refused(share, tmp_path):
    with pytest.raises(ValueError, match="exercise_share"):
        write_corpus(tmp_path, exercise_share=share)
