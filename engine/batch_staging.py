"""A run's own folder beside the clips of a batch: clips are whole before they have their names.

Moving to a name never replaces what is there. To replace a clip is to take what has its name out
of the way, to look at it again, and to put it back if it is not what was to be replaced: between
a look and a move anything may come to a name.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from kinetiq.batch_log import WHERE, digest_clip
from kinetiq.clip import Clip
from kinetiq.errors import KinetiqError, OutputError, WorkError

_PREFIX = ".kinetiq-batch-"
_LOCK = "run.lock"  # in each such folder, and locked for as long as its run is at work
_FORMER = "former"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Staging:
    """The folder of a run that is at work; of one thread at a time."""

    def __init__(self, path: Path) -> None:
        """For `open_staging`."""
        self._path = path

    def encode(self, clip: Clip, target: Path, scale: int) -> Path:
        """Write a clip, and bring it to the disk, for a name that it may have then.

        Args:
            clip: what is written.
            target: the name, for its suffix and for messages.
            scale: enlarges by a whole number.

        Returns:
            Where it is.

        Raises:
            OutputError: no such clip can be written, or none at all.
        """
        staged = self._path / f"clip{target.suffix.lower()}"
        try:
            _remove(staged)
            clip.write(staged, scale=scale)
            _sync(staged)
        except KinetiqError as error:
            raise type(error)(str(error).replace(str(staged), str(target))) from error
        except OSError as error:
            raise _unwritable(target, error) from error
        return staged

    def place(self, staged: Path, target: Path) -> bool:
        """Move to a name if it is free; whether it was.

        Raises:
            OutputError: the name cannot be written.
        """
        try:
            _move(staged, target)
        except OSError as error:
            if os.path.lexists(target):
                return False
            raise _unwritable(target, error) from error
        return True

    def replace(self, staged: Path, target: Path, may_go: Callable[[Path], bool]) -> bool:
        """Move to a name in place of what has it; whether that was what may go.

        Args:
            staged: what is moved.
            target: the name.
            may_go: of what had the name, which is somewhere else while it is asked.

        Raises:
            OutputError: the name cannot be written; what had it has it again.
            WorkError: what had it cannot have it again, and is where the message says.
        """
        former = self._path / _FORMER
        try:
            target.rename(former)
        except OSError as error:
            raise _unwritable(target, error) from error
        try:
            placed = may_go(former) and self.place(staged, target)
        except BaseException:
            if not os.path.lexists(target):
                self._put_back(former, target)
            raise
        if placed:
            _remove(former)
        else:
            self._put_back(former, target)
        return placed

    def close(self) -> None:
        """Take the folder away, unless it holds what had to make room and could not go back."""
        if not os.path.lexists(self._path / _FORMER):
            shutil.rmtree(self._path, ignore_errors=True)

    def _put_back(self, former: Path, target: Path) -> None:
        try:
            _move(former, target)
        except OSError as error:
            raise WorkError(
                f"out: {target} must take back what was there before, and cannot "
                f"({error.strerror}); it is at {former}: move it from there"
            ) from error


@contextlib.contextmanager
def open_staging(folder: Path, contents: Collection[str]) -> Iterator[Staging]:
    """A new folder in that of the batch; what runs that were killed have left is taken away.

    Args:
        folder: of the batch.
        contents: digests of the clips of the batch, which are not missed.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        for left in folder.glob(f"{_PREFIX}*"):
            _clear(left, contents)
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
        lock = os.open(path / "new.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    except OSError as error:
        raise OutputError(f"{WHERE}: {folder} cannot be written ({error.strerror})") from error
    staging = Staging(path)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (path / "new.lock").rename(path / _LOCK)  # which nobody has seen unlocked
        yield staging
    finally:
        staging.close()
        os.close(lock)


def _clear(left: Path, contents: Collection[str]) -> None:
    """Take away the folder of a run that is at work no more, if there is nothing else in it."""
    try:
        lock = os.open(left / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # it has none, so it is no such folder
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        former = left / _FORMER
        if not os.path.lexists(former) or digest_clip(former) in contents:
            shutil.rmtree(left, ignore_errors=True)  # which no link is
    except BlockingIOError:  # its run is at work
        return
    finally:
        os.close(lock)


def _move(path: Path, target: Path) -> None:
    """Give a file or a folder a name, unless that is taken.

    Raises:
        OSError: it is, or it cannot be given.
    """
    if path.is_dir() and not path.is_symlink():
        path.rename(target)  # takes no name but that of an empty folder
        return
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):  # file systems without links have no better way to ask
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        path.rename(target)
    else:
        path.unlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Bring a file, or a folder with its files, to the disk."""
    for each in (*path.iterdir(), path) if path.is_dir() else (path,):
        descriptor = os.open(each, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _unwritable(target: Path, error: OSError) -> OutputError:
    return OutputError(f"out: {target} cannot be written ({error.strerror or error})")
