import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kinetiq.errors import OutputError
from kinetiq.files import as_target, check_target, replacing, write_tensors, write_text


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), RuntimeError("x"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("folder", [False, True])
def test_a_failure_leaves_nothing_behind(tmp_path, failure, folder):
    target = tmp_path / "out"
    if not folder:
        target.write_text("old")
    expected = OutputError if isinstance(failure, OSError) else type(failure)

    def fail() -> None:
        with replacing(target, "here", folder=folder) as temporary:
            if folder:
                temporary.mkdir()
            half = temporary / "half" if folder else temporary
            half.write_text("half")
            raise failure

    with pytest.raises(expected) as caught:
        fail()
    assert names(tmp_path) == ([] if folder else ["out"])
    assert folder or target.read_text() == "old"
    if isinstance(failure, OSError):
        assert "here: " in str(caught.value) and "No space left" in str(caught.value)


def test_text_is_written_as_it_is(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    write_text(target, "\u00e4\n\r\nb", "here")
    assert target.read_bytes() == b"\xc3\xa4\n\r\nb"
    assert names(tmp_path) == ["a.json"]
    with pytest.raises(
        OutputError, match=r"here: the folder .*absent must exist to hold 'a\.json'"
    ):
        write_text(tmp_path / "absent" / "a.json", "", "here")


def test_tensors_are_written_with_the_permissions_of_any_new_file(tmp_path, file_mode):
    target = tmp_path / "a.safetensors"
    write_tensors(target, {"w": torch.arange(3.0)}, {"format": "pt"})
    assert stat.S_IMODE(target.stat().st_mode) == file_mode
    with safe_open(target, framework="pt") as opened:
        assert opened.get_tensor("w").tolist() == [0, 1, 2]
        assert opened.metadata() == {"format": "pt"}
    assert names(tmp_path) == ["a.safetensors"]


def test_tensors_that_cannot_be_written_are_an_output_error(tmp_path):
    def write() -> None:
        with replacing(tmp_path / "a", "here") as temporary:
            write_tensors(temporary / "absent", {"w": torch.ones(1)})

    with pytest.raises(OutputError, match=r"here: .*a cannot be written \(.*No such file or dir"):
        write()
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "folder", "words"),
    [
        ("absent/a", False, "absent must exist to hold 'a'; create it"),
        ("taken", True, "taken must be a new name or an empty folder, and exists; remove it, or"),
        ("file", True, "file must be a new name or an empty folder"),
        ("taken", False, "taken must be a file, and is a folder; rename it"),
        ("n" * 300, False, r"cannot be written \(File name too long\); check the permission"),
    ],
)
def test_a_check_says_what_writing_would(tmp_path, name, folder, words):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").touch()
    (tmp_path / "file").touch()

    def write() -> None:
        with replacing(tmp_path / name, "here", folder=folder) as temporary:
            temporary.mkdir() if folder else temporary.touch()

    with pytest.raises(OutputError, match=f"here: .*{words}") as early:
        check_target(tmp_path / name, "here", folder=folder)
    with pytest.raises(OutputError) as late:
        write()
    assert str(early.value) == str(late.value)
    assert names(tmp_path) == ["file", "taken"] and names(tmp_path / "taken") == ["precious"]


def test_what_will_do_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "old").write_text("old")
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "old")
    check_target(tmp_path / "new")
    check_target(tmp_path / "empty", folder=True)
    assert names(tmp_path) == ["empty", "old"] and (tmp_path / "old").read_text() == "old"
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everything, so act it
    with pytest.raises(OutputError, match=r"write: .*old cannot be written \(Permission denied\)"):
        check_target(tmp_path / "old")


@pytest.mark.parametrize("path", ["", "/", "a\0b", None, 3])
def test_what_is_no_target(path):
    with pytest.raises(OutputError, match=r"here: .* must (be a path|name a file or a folder)"):
        as_target(path, "here")
