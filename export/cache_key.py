"""What the names of cached networks and engines say of what made them, so that none is stale."""

import functools
import hashlib
import importlib.metadata
from pathlib import Path

import kinetiq.kernels
from kinetiq.export.network import PACKAGES
from kinetiq.kernels._launch import launch_file

_DIGITS = 12


@functools.cache
def code_key() -> str:
    """A digest of all that decides what an export of a model is: code, settings and versions."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(kinetiq.kernels.__file__).parent):
        for path in sorted(folder.glob("*.py")):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update(hashlib.sha256(launch_file().read_bytes()).digest())
    for package in PACKAGES:
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def options_key(*options: object) -> str:
    """A digest of options that print alike where they are equal."""
    return hashlib.sha256(repr(options).encode()).hexdigest()[:_DIGITS]
