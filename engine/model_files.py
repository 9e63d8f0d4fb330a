"""The files that a model is read from: what tells them from others, and whether they changed."""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kinetiq.errors import CheckpointError
from kinetiq.named_files import stamp_file


@dataclass(frozen=True)
class ModelFiles:
    """Files of a model, as they were before it was read from them.

    Args:
        name: of the model, for messages.
        stamps: of each file, what changes when it is written to; None where there is none.
    """

    name: str
    stamps: Mapping[Path, tuple[int, ...] | None]

    @classmethod
    def look_at(cls, name: str, files: Iterable[Path]) -> "ModelFiles":
        """These files as they are now."""
        return cls(name, {file: _stamp(file) for file in files})

    def fingerprint(self) -> str:
        """The hexadecimal digest of `fingerprint_files`.

        Raises:
            CheckpointError: the files have changed.
        """
        try:
            found = fingerprint_files(self.stamps)
        except OSError as error:
            raise self._changed() from error
        self.require_unchanged()
        return found

    def require_unchanged(self) -> None:
        """Raise unless all files are as they were.

        Raises:
            CheckpointError: they have changed.
        """
        if any(_stamp(file) != stamp for file, stamp in self.stamps.items()):
            raise self._changed()

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            f"load: the files of {self.name} must stay as they were when it was loaded, and have "
            "changed; load it again"
        )


def fingerprint_files(files: Iterable[Path]) -> str:
    """SHA-256 over a model's files: in the order of "folder/name", that and each content.

    It reads all bytes, a gigabyte in about a second, since a change of a few weights anywhere makes
    another model.

    Raises:
        OSError: one cannot be read.
    """

    def digest(file: Path) -> str:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    ordered = sorted(files, key=lambda file: (file.parent.name, file.name))
    with ThreadPoolExecutor() as threads:  # of files side by side; a digest lets others run
        digests = list(threads.map(digest, ordered))
    said = [f"{f.parent.name}/{f.name} {one}\n" for f, one in zip(ordered, digests, strict=True)]
    return hashlib.sha256("".join(said).encode()).hexdigest()


def _stamp(file: Path) -> tuple[int, ...] | None:
    try:
        return stamp_file(file)
    except OSError:
        return None
