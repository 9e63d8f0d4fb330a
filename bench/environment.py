"""Where a figure was measured: commit, machine, versions."""

import importlib.metadata
import os
import platform
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import torch

from kinetiq.backend_choice import cpu_kind

PACKAGES = (
    "kinetiq",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "onnxruntime",
    "openvino",
    "tensorrt-rtx-cu13",
)
COMMIT = "KINETIQ_COMMIT"
PAGES = ("README.md", "bench/RESULTS.md")  # whose tables are drawn from records
_DRAWN = ("bench/results", *PAGES)  # made from measurements, so no cause of them


def describe_environment(device: str) -> dict[str, Any]:
    """What a record says of its run, ready for JSON: commit, dirty, device, machine, versions.

    `commit` and `dirty` are those of the checkout that the running code lies in; they are None
    for an installed package, whose code no commit of the working directory describes.
    """
    commit, dirty = describe_commit(package_checkout())
    return {
        "commit": commit,
        "dirty": dirty,
        "device": device,
        "machine": describe_machine(),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
    }


def describe_machine() -> dict[str, Any]:
    """CPU model and kind, cores, threads in use, RAM in bytes, GPU and driver (None without one).

    The kind is the one by which back ends are chosen.
    """
    has_gpu = torch.cuda.is_available()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_kind": cpu_kind(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram": _ram(),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "driver": _driver() if has_gpu else None,
    }


def describe_commit(root: Path | None) -> tuple[str | None, bool | None]:
    """Commit of the git work tree whose top is `root`, and whether files differ from it.

    Without such a tree, or without git, the commit is what KINETIQ_COMMIT says, for a copy of the
    files on a machine of its own; else both are None, as they are where there is no commit yet.
    Records and the pages drawn from them do not count as differences, since each run would make the
    next one dirty.
    """
    # A folder inside somebody else's repository would report that repository's commit.
    top = None if root is None else _git(root, "rev-parse", "--show-toplevel")
    if root is None or top is None or Path(top) != root.resolve():
        return os.environ.get(COMMIT) or None, None
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", ".", *(f":(exclude){p}" for p in _DRAWN))
    if commit is None or changes is None:
        return None, None
    return commit, bool(changes)


def package_checkout() -> Path | None:
    """The checkout that the running package lies in, None when it is installed elsewhere."""
    root = Path(__file__).resolve().parent.parent
    return root if _is_checkout(root) else None


def find_checkout() -> Path | None:
    """The package's checkout, else the one around the working directory, else None."""
    here = Path.cwd()
    around = next((folder for folder in (here, *here.parents) if _is_checkout(folder)), None)
    return package_checkout() or around


def _is_checkout(folder: Path) -> bool:
    if not (folder / "bench" / "results").is_dir():
        return False
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except (OSError, ValueError, KeyError):
        return False
    return isinstance(project, dict) and project.get("name") == "kinetiq"


def _git(root: Path, *arguments: str) -> str | None:
    return _output(["git", "-C", str(root), *arguments])


def _driver() -> str | None:
    versions = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return versions.splitlines()[0] if versions else None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _ram() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system can say
        return None
