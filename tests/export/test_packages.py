import importlib.util

import pytest

from kinetiq.errors import MissingDependencyError
from kinetiq.export.metadata import read_metadata
from kinetiq.export.packages import require_packages


def test_what_is_missing_is_named_with_the_command_that_brings_it():
    require_packages("json", "torch")
    with pytest.raises(MissingDependencyError, match=r"needs no_such, nor_this, .*\.\[export\]"):
        require_packages("json", "no_such", "nor_this")


def test_a_network_is_not_read_without_onnx(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="needs onnx, "):
        read_metadata(tmp_path / "net.onnx")
