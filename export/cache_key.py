"""What the names of cached networks and engines say of what made them, so that none is stale."""

import functools
import hashlib
import importlib.metadata
from pathlib import Path

import kinetiq
import kinetiq.kernels
from kinetiq.errors import InputError
from kinetiq.export.network import PACKAGES
from kinetiq.kernels._launch import VARIABLE, launch_file

ENGINE_MODULES = ("convolution", "families", "skips", "taps")
"""Those of `kinetiq` that decide what is in the graph: its sites and skips, and their order."""

_DIGITS = 12


@functools.cache
def code_key() -> str:
    """A digest of all that decides what an export of a model is: code, settings and versions.

    Raises:
        InputError: the launch file that the environment names cannot be read.
    """
    digest = hashlib.sha256()
    for path in deciding_files():
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"cache: {path} must be readable, since what is kept depends on it, and is not: "
                f"{error.strerror}; where {VARIABLE} names it, name another or unset that"
            ) from error
        digest.update(hashlib.sha256(data).digest())
    for package in PACKAGES:
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def deciding_files() -> list[Path]:
    """Our files that decide what an export is: its code, the kernels and how they are launched."""
    kernels, engine = Path(kinetiq.kernels.__file__).parent, Path(kinetiq.__file__).parent
    return [
        *sorted(Path(__file__).parent.glob("*.py")),
        *sorted(kernels.glob("*.py")),
        launch_file(),  # sizes of blocks, which are constants of the compiled kernels
        *(engine / f"{name}.py" for name in ENGINE_MODULES),
    ]


def options_key(*options: object) -> str:
    """A digest of options that print alike where they are equal."""
    return hashlib.sha256(repr(options).encode()).hexdigest()[:_DIGITS]
