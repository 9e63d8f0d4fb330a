"""What this machine has, what is missing, and the command that installs it in a checkout."""

import importlib.metadata
import platform
import sys
from dataclasses import asdict
from typing import Any

import torch

# package → (the extra that brings it, what it is for); None is a core package
_PACKAGES: dict[str, tuple[str | None, str]] = {
    "torch": (None, "everything"),
    "triton": (None, "the GPU kernels"),
    "diffusers": (None, "the networks"),
    "transformers": (None, "the text encoders"),
    "safetensors": (None, "weights"),
    "huggingface_hub": (None, "models of the hub"),
    "filelock": (None, "exports that are made by one process at a time"),
    "numpy": (None, "frames"),
    "av": (None, "video files"),
    "pillow": (None, "pictures"),
    "click": (None, "the command line"),
    "attrs": (None, "requests and controls"),
    "pyyaml": (None, "storyboards"),
    "nvtx": (None, "ranges in NVIDIA's profilers"),
    "onnx": ("export", "export"),
    "onnx-ir": ("export", "export"),
    "onnxscript": ("export", "export"),
    "onnxruntime": ("export", "export"),
    "openvino": ("export", "export"),
    "tensorrt": ("tensorrt", "export"),
    "tensorrt-rtx": ("rtx", "export"),
    "matplotlib": ("plots", "plots of the benches"),
    "ray": ("ray", "many machines"),
    "fastapi": ("serve", "serving"),
    "uvicorn": ("serve", "serving"),
}


def examine() -> dict[str, Any]:
    """Versions, devices and back ends, as plain data."""
    from kinetiq import __version__
    from kinetiq.backend_choice import PRECISIONS, choose_backend
    from kinetiq.backends import BACKENDS

    packages = []
    for name, (extra, purpose) in _PACKAGES.items():
        found = _version(name)
        install = None
        if found is None:
            install = "pip install ." if extra is None else f'pip install ".[{extra}]"'
        packages.append({"name": name, "version": found, "for": purpose, "install": install})
    return {
        "kinetiq": __version__,
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "devices": _devices(),
        "backends": list(BACKENDS),
        "auto": {precision: asdict(choose_backend(precision)) for precision in PRECISIONS},
        "models": ["sprites"],
        "packages": packages,
    }


def render(findings: dict[str, Any]) -> str:
    """The findings as lines for a person."""
    lines = [
        f"kinetiq {findings['kinetiq']}, Python {findings['python']}, {findings['system']}",
        "",
        "devices",
        *(f"  {device['name']:<8} {device['description']}" for device in findings["devices"]),
        "",
        f"back ends  {', '.join(findings['backends'])}",
        "",
        "backend auto on the CPU",
        *(
            f"  {precision:<9} {chosen['backend']:<12} {chosen['why']}"
            for precision, chosen in findings["auto"].items()
        ),
        "",
        "packages",
    ]
    for package in findings["packages"]:
        state = package["version"] or f"missing    {package['install']}"
        lines.append(f"  {package['name']:<14} {state:<12} for {package['for']}")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    names = [package, f"{package}-cu13", f"{package}-gpu"]
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _devices() -> list[dict[str, Any]]:
    devices = [
        {
            "name": "cpu",
            "description": f"{platform.processor() or platform.machine()}, "
            f"{torch.get_num_threads()} threads",
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": f"cuda:{index}",
                "description": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
                f"sm_{properties.major}{properties.minor}",
            }
        )
    return devices
