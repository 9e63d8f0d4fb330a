"""What `kinetiq doctor` says of a machine where all is installed, and where nothing is."""

import importlib.metadata
import itertools
import json
import re
import tomllib
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kinetiq
from kinetiq import backend_choice, doctor
from kinetiq.backend_choice import Choice, choose_backend
from kinetiq.backends import BACKENDS

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.fixture
def bare(monkeypatch):
    """A machine on which only the packages in the returned dict are installed."""
    installed = {}

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return installed


def package(findings, name):
    return next(entry for entry in findings["packages"] if entry["name"] == name)


def test_says_what_is_here():
    findings = doctor.examine()
    assert json.loads(json.dumps(findings)) == findings
    assert set(findings) == {
        "kinetiq",
        "python",
        "system",
        "devices",
        "backends",
        "auto",
        "models",
        "packages",
    }
    assert findings["kinetiq"] == kinetiq.__version__
    assert findings["backends"] == list(BACKENDS)
    assert set(findings["auto"]) == {"float32", "bfloat16"}
    for precision, chosen in findings["auto"].items():
        assert chosen == asdict(choose_backend(precision))
    assert findings["devices"][0]["name"] == "cpu"
    assert findings["models"] == ["sprites"]
    assert package(findings, "torch") == {
        "name": "torch",
        "version": importlib.metadata.version("torch"),
        "for": "everything",
        "install": None,
    }


def test_every_missing_package_has_the_command_that_brings_it(bare):
    findings = doctor.examine()
    needs = {None: PROJECT["dependencies"]} | PROJECT["optional-dependencies"]
    for entry in findings["packages"]:
        assert entry["version"] is None
        install = entry["install"]
        extra = install.partition("[")[2].rstrip(']"') or None
        assert install == ("pip install ." if extra is None else f'pip install ".[{extra}]"')
        brought = [need.split(">")[0].split("[")[0] for need in needs[extra]]
        assert entry["name"] in brought or f"{entry['name']}-cu13" in brought


def test_every_dependency_is_examined():
    examined = {entry["name"] for entry in doctor.examine()["packages"]}
    extras = [
        PROJECT["optional-dependencies"][name] for name in ("export", "serve", "ray", "plots")
    ]
    for need in itertools.chain(PROJECT["dependencies"], *extras):
        assert re.match(r"[\w-]+", need)[0] in examined, need


def test_no_back_end_is_promised_that_there_is_not():
    for entry in doctor.examine()["packages"]:
        assert "back end" not in entry["for"]


def test_a_package_may_go_by_another_name(bare):
    bare |= {"onnxruntime-gpu": "1.24", "tensorrt-cu13": "10.14"}
    findings = doctor.examine()
    assert package(findings, "onnxruntime")["version"] == "1.24"
    assert package(findings, "tensorrt")["version"] == "10.14"
    assert package(findings, "tensorrt-rtx")["version"] is None


def test_renders_a_line_for_each(bare):
    bare |= {"torch": "2.13.0"}
    lines = doctor.render(doctor.examine()).splitlines()
    assert lines[0].startswith(f"kinetiq {kinetiq.__version__}, Python 3.")
    assert "  torch          2.13.0       for everything" in lines
    assert '  onnx           missing    pip install ".[export]" for export' in lines
    assert any(line.startswith("  cpu ") and line.endswith(" threads") for line in lines)
    assert f"back ends  {', '.join(BACKENDS)}" in lines


def test_says_which_back_end_auto_is_and_why(monkeypatch):
    monkeypatch.setattr(
        backend_choice, "choose_backend", lambda precision: Choice("openvino", f"for {precision}")
    )
    lines = doctor.render(doctor.examine()).splitlines()
    place = lines.index("backend auto on the CPU")
    assert lines[place + 1] == "  float32   openvino     for float32"
    assert lines[place + 2] == "  bfloat16  openvino     for bfloat16"


def test_names_each_gpu(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    findings = doctor.examine()
    assert findings["devices"][1:] == [
        {"name": f"cuda:{index}", "description": "NVIDIA H100, 80 GiB, sm_90"} for index in (0, 1)
    ]
    assert "  cuda:1   NVIDIA H100, 80 GiB, sm_90" in doctor.render(findings).splitlines()
