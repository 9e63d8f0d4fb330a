"""Files and folders that other files name: whether they are there, and what they hold."""

import hashlib
import stat
from collections.abc import Iterable
from pathlib import Path

from kinetiq.clip import IMAGE_SUFFIXES, natural_key
from kinetiq.errors import ClipError


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder, which of a name that none can have there is not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def stamp_file(path: Path) -> tuple[int, ...]:
    """What changes whenever another file takes a name, or the file there is written to.

    Raises:
        OSError: it cannot be looked at.
    """
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def natural_order(paths: Iterable[Path]) -> list[Path]:
    """Paths by name, 2 before 10, as the frames of a folder are read."""
    return sorted(paths, key=natural_key)


def list_inside(folder: Path) -> list[Path]:
    """What a folder holds, in natural order, but for what is hidden.

    Raises:
        ClipError: it cannot be read.
    """
    try:
        return natural_order(each for each in folder.iterdir() if not each.name.startswith("."))
    except OSError as error:
        raise ClipError(f"{folder} must be a folder that can be read: {error.strerror}") from error


def content_digest(path: Path) -> str:
    """Of a file's contents, or of the pictures in a folder, which are what is read of it.

    Raises:
        ClipError: it cannot be read.
    """
    if path.is_dir():
        pictures = [
            each
            for each in list_inside(path)
            if each.suffix.lower() in IMAGE_SUFFIXES and each.is_file()
        ]
        return hashlib.sha256("\n".join(map(content_digest, pictures)).encode()).hexdigest()
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device may never end
            raise ClipError(f"{path} must be a file or a folder, and is neither")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ClipError(f"{path} must be a file that can be read: {error.strerror}") from error
