"""Writing files and folders so that no half-written one ever carries its final name."""

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from kinetiq.errors import OutputError


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], where: str = "write", *, folder: bool = False
) -> Iterator[Path]:
    """Yield a temporary path beside `path`; at the end of the block it takes that name.

    The block creates the temporary file, or folder. If it fails, what it wrote is removed and
    `path` is as it was. Errors of the operating system become an `OutputError`.

    Args:
        path: the final name.
        where: what the messages of errors begin with.
        folder: whether a folder is written. It must be new or empty: a file is replaced, a
            folder with something in it never is.

    Raises:
        OutputError: the name cannot be written.
    """
    target = as_target(path, where)
    try:
        _require_free(target, where, folder=folder)
        temporary = _temporary_beside(target)
        try:
            yield temporary
            temporary.replace(target)
        except BaseException:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _unwritable(target, where, error.strerror or error) from error


def write_text(path: str | os.PathLike[str], text: str, where: str = "write") -> None:
    """Write `text` as UTF-8, its line ends as they are; an existing file is replaced when whole.

    Args:
        path: the file.
        text: all that it will hold.
        where: what the messages of errors begin with.

    Raises:
        OutputError: the file cannot be written.
    """
    with replacing(path, where) as temporary:
        temporary.write_bytes(text.encode())


def make_folder(folder: Path, where: str, use: str = "", advice: str = "") -> None:
    """Make a folder, and those above it, unless it is there.

    Args:
        folder: the folder.
        where: what the error's message begins with.
        use: what it is for, such as " to keep motion channels in".
        advice: what to do, such as "; set XDG_CACHE_HOME".

    Raises:
        OutputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{where}: {folder} must be a folder{use}: {error.strerror}{advice}"
        ) from error


def make_cache(folder: Path, where: str, use: str) -> None:
    """Make a folder of the user's cache; see `make_folder`."""
    make_folder(folder, where, use, "; set XDG_CACHE_HOME to one that can be written")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, with the permissions of any other new file.

    Tensors go to the disk from where they are, so it takes no memory of their size. It is for the
    block of `replacing`: what is at `path` is not whole at every moment.

    Args:
        path: the file.
        tensors: by name, contiguous; no two share memory.
        metadata: what the file says beside them.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:  # how it says that the operating system refused
        raise OSError(str(error)) from error
    follow_umask(path)


def follow_umask(path: Path) -> None:
    """Give a file the permissions that any new file has there.

    For files of libraries such as safetensors, which makes them for their owner alone.

    Raises:
        OSError: they cannot be changed.
    """
    plain = _temporary_beside(path)
    plain.touch()  # a process cannot look at its umask without changing it for all threads
    try:
        wanted = stat.S_IMODE(plain.stat().st_mode)
    finally:
        plain.unlink()
    if stat.S_IMODE(path.stat().st_mode) != wanted:  # file systems without permissions refuse
        path.chmod(wanted)


def check_target(
    path: str | os.PathLike[str], where: str = "write", *, folder: bool = False
) -> None:
    """Raise what `replacing` would raise for this path, and leave what is there alone.

    For the start of long work, whose result would be lost if it could not be written.

    Args:
        path: the final name.
        where: what the messages of errors begin with.
        folder: whether a folder is written.

    Raises:
        OutputError: the folder that it is in is missing or cannot be written, or the name is
            taken by what is never replaced.
    """
    target = as_target(path, where)
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            target.stat()  # says of a name that it is too long
        _require_free(target, where, folder=folder)
    except OSError as error:
        raise _unwritable(target, where, error.strerror) from error
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise _unwritable(target, where, os.strerror(errno.EACCES))


def as_target(path: str | os.PathLike[str], where: str) -> Path:
    """The path to write to, or an `OutputError` that begins with `where` if it is none."""
    try:
        target = Path(path)
        os.fsencode(target)
    except (TypeError, ValueError) as error:
        raise OutputError(f"{where}: {path!r} must be a path ({error})") from error
    if "\0" in str(target) or not target.name:
        raise OutputError(f"{where}: {str(path)!r} must name a file or a folder")
    return target


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f".kinetiq-{secrets.token_hex(8)}.tmp")


def _require_free(target: Path, where: str, *, folder: bool) -> None:
    """Raise unless a file, or a folder, may take this name."""
    if not target.parent.is_dir():
        raise OutputError(
            f"{where}: the folder {target.parent} must exist to hold {target.name!r}; create it"
        )
    if folder and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OutputError(
            f"{where}: {target} must be a new name or an empty folder, and exists; remove it, or "
            "choose another name"
        )
    if not folder and target.is_dir():
        raise OutputError(f"{where}: {target} must be a file, and is a folder; rename it")


def _unwritable(target: Path, where: str, reason: object) -> OutputError:
    return OutputError(
        f"{where}: {target} cannot be written ({reason}); check the permission, the name and "
        "the free space"
    )
