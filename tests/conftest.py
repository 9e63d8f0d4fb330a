"""Shared fixtures. Also keeps the checkout itself off the import path.

`python -m pytest` puts the working directory on the path, where our folder `kernels` would
answer for the PyPI package `kernels` that transformers and diffusers probe for.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# A thread that spins while it waits holds the core that the other threads need, if there is other
# work: a test of a second then took minutes. It is read when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, which share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before importing ours

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say of each test that needs a GPU that there is none, where it was asked for by its mark."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def rng(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


@pytest.fixture
def cpu_rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def kernel_device() -> str:
    """Where a kernel itself runs: on a GPU if there is one, else interpreted on the CPU.

    With a GPU nothing is interpreted, so a test that launches a kernel must not ask for `device`.
    """
    return DEVICES[-1]


@pytest.fixture
def kernel_rng(kernel_device: str) -> torch.Generator:
    return torch.Generator(kernel_device).manual_seed(0)


MEMORY_CHECK = 80.0  # seconds; all five files are done in those of a part of `bench gpu`


@pytest.fixture
def memory_check():
    """Runs some tests of a file once more, with an eye on each access to the GPU's memory.

    Few of them: each access takes many times as long, and each kernel is to be met, not each type.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")

    def check(path: str, expression: str) -> None:
        # Errors that PyTorch's own calls of the driver return, and look for, are none of ours.
        words = [tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        words += [sys.executable, "-P", "-m", "pytest", "-q", "--import-mode=importlib"]
        # The project's own options ask for plugins, and what packages warn of is no fault of ours.
        words += ["-o", "addopts=", "-o", "filterwarnings=", "-m", "not slow and not gpu"]
        done = subprocess.run(
            [*words, "-p", "no:cacheprovider", "-k", expression, path],
            check=False,
            cwd=ROOT,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # else it sees one big block
            capture_output=True,
            text=True,
            timeout=MEMORY_CHECK,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return check


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory):
    """A builder of tiny diffusers folders, each written once a test run."""
    import tiny  # after the environment is set, since it imports diffusers

    written: dict[tuple[str, str], Path] = {}

    def build(family: str = "animatediff", scheduler: str = "DDIMScheduler") -> Path:
        if (family, scheduler) not in written:
            path = tmp_path_factory.mktemp(f"{family}-{scheduler}") / "model"
            written[family, scheduler] = tiny.write_tiny_folder(path, family, scheduler)
        return written[family, scheduler]

    return build


@pytest.fixture
def traced_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` runs functions as they are; see `untraced`."""
    import untraced

    untraced.install(monkeypatch)
