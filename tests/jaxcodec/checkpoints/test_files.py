"""Files are replaced together or not at all."""

import os
from pathlib import Path

import pytest

from jaxcodec.checkpoints.files import (
    new_directory,
    read_json,
    replacement,
    whole_number,
    write_json,
)


def test_files_take_their_places_when_the_block_ends(tmp_path: Path) -> None:
    paths = tmp_path / "deep" / "a", tmp_path / "b"
    with replacement(*paths) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
        assert not any(path.exists() for path in paths)
    assert [path.read_text() for path in paths] == ["new", "new"]


def interrupted(*paths: Path) -> None:
    with replacement(*paths) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
        raise KeyboardInterrupt


def test_after_an_error_all_is_as_before(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_disk_that_fails_late_leaves_all_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems report a full disk only when the bytes are forced onto it."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    write_json(tmp_path / "config.json", {"a": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "config.json", {"a": 2})
    assert read_json(tmp_path / "config.json") == {"a": 1}
    assert os.listdir(tmp_path) == ["config.json"]


def test_numbers_that_json_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "config.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "deep" / "new", tmp_path / "empty"):
        with new_directory(path) as directory:
            (directory / "file").write_text("new")
            assert not (path / "file").exists()
        assert os.listdir(path) == ["file"]
    assert sorted(os.listdir(tmp_path)) == ["deep", "empty"]


def test_a_link_to_a_directory_stays_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there", "not yet"):
        link = tmp_path / f"link to {name}"
        link.symlink_to(tmp_path / name)
        with new_directory(link) as directory:
            (directory / "file").write_text("new")
        assert link.is_symlink()
        assert os.listdir(tmp_path / name) == ["file"]


def interrupted_directory(path: Path) -> None:
    with new_directory(path) as directory:
        (directory / "file").write_text("new")
        raise KeyboardInterrupt


def test_after_an_error_there_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_directory(tmp_path / "new")
    assert os.listdir(tmp_path) == []


def test_a_directory_with_files_or_a_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    for path, what in ((tmp_path, "not empty"), (tmp_path / "file", "a file")):
        with pytest.raises(ValueError, match=f"is {what}"):
            interrupted_directory(path)
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("content", "message"),
    [({}, "here lacks 'g'"), (None, "here lacks 'g'"), ({"g": True}, "here: g must be .* True")],
)
def test_what_is_no_whole_number_is_refused(content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whole_number(content, "g", "here")
    assert whole_number({"g": 8}, "g", "here") == 8
