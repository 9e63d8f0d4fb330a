"""Preparing to draw: what would keep pictures from being made is said before the work."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from kinetiq.errors import MissingDependencyError
from kinetiq.files import check_target, make_folder


def prepare_folder(folder: Path, names: Iterable[str]) -> None:
    """Make the folder of an analysis, and say what would keep these files from being written.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OutputError: the folder, or a file in it, cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise MissingDependencyError(
            'analyze: --out draws with matplotlib; install it with pip install ".[plots]"'
        )
    make_folder(folder, "analyze")
    for name in names:
        check_target(folder / name, "analyze")
