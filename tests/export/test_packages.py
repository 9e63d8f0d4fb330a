import importlib.util
import sys
import types

import pytest
import torch

from kinetiq.errors import MissingDependencyError
from kinetiq.export.metadata import read_metadata
from kinetiq.export.packages import is_older, load_gpu_runtime, require_packages


def test_what_is_missing_is_named_with_the_command_that_brings_it():
    require_packages("json", "torch")
    with pytest.raises(MissingDependencyError, match=r"needs no_such, nor_this, .*\.\[export\]"):
        require_packages("json", "no_such", "nor_this")


def test_a_network_is_not_read_without_onnx(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="needs onnx, "):
        read_metadata(tmp_path / "net.onnx")


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ("tensorrt", r'needs TensorRT, and tensorrt cannot .*: pip install "\.\[tensorrt\]"'),
        ("tensorrt-rtx", r'needs TensorRT for RTX, and tensorrt_rtx .*: pip install "\.\[rtx\]"'),
    ],
)
def test_all_that_a_gpus_runtime_lacks_is_named(monkeypatch, runtime, words):
    module = runtime.replace("-", "_")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"^here: {words}$"):
        load_gpu_runtime(runtime, "here")
    with pytest.raises(
        MissingDependencyError, match=rf"^here: {words}; and an NVIDIA .*; do that$"
    ):
        load_gpu_runtime(runtime, "here", "do that")
    package = types.ModuleType(module)
    monkeypatch.setitem(sys.modules, module, package)
    assert load_gpu_runtime(runtime, "here") is package
    with pytest.raises(MissingDependencyError, match=r"^here: needs an NVIDIA GPU .*; do that$"):
        load_gpu_runtime(runtime, "here", "do that")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_gpu_runtime(runtime, "here", "do that") is package


def test_versions_are_compared_by_number():
    assert is_older("10.14.1.48", "11.4") and is_older("11.3.9", "11.4") and is_older("9.0", "11.4")
    assert not any(is_older(new, "11.4") for new in ("11.4", "11.4.0.1", "11.10", "12.0.0rc1"))
