"""What the tests of several kernels share."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def mutate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_device: str
) -> Callable[[ModuleType, str, str, str], None]:
    """Puts `instead` for the one `line` of an operator's interpreted kernel function."""
    if kernel_device == "cuda":
        pytest.skip("a compiled kernel keeps the functions that it was compiled from")

    def put(operator: ModuleType, function: str, line: str, instead: str) -> None:
        source = inspect.getsource(getattr(operator, function).fn)
        assert source.count(line) == 1
        path = tmp_path / "mutant.py"  # where the interpreter reads it
        path.write_text(source.replace(line, instead))
        scope = dict(vars(operator))
        exec(compile(path.read_text(), path, "exec"), scope)  # noqa: S102
        monkeypatch.setattr(operator, function, scope[function])

    return put
