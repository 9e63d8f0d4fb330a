"""Fixtures of the tests of export."""

from collections.abc import Callable
from pathlib import Path

import pytest
from exported import export_small


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The path of a small network's export, by family and precision; each is made once."""
    folder = tmp_path_factory.mktemp("exported")
    return lambda family="animatediff", precision="float32": export_small(folder, family, precision)
