"""What may import what, and what `import kinetiq` costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "engine": "kinetiq",
    "kernels": "kinetiq.kernels",
    "export": "kinetiq.export",
    "bench": "kinetiq.bench",
}
HEAVY = {
    "PIL",
    "av",
    "click",
    "diffusers",
    "fastapi",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "openvino",
    "ray",
    "tensorrt",
    "transformers",
}
SECONDS = 0.3  # of `import kinetiq`, beyond torch


def imports(source, package):
    """(module, whether it is imported inside a function) of every import of ours."""
    found = []

    def visit(node, lazy):
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level])
            home = node.module or "" if not node.level else f"{base}.{node.module or ''}".strip(".")
            # `from kinetiq import bench` imports a module, `from kinetiq import Clip` a name
            names = [f"{home}.{alias.name}" if home == "kinetiq" else home for alias in node.names]
        found.extend((name, lazy) for name in names if name.split(".")[0] == "kinetiq")
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(source), lazy=False)
    return found


def folder_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "engine"


def wrong_imports(folder, file, source):
    """What a file imports against the arrow kernels <- engine <- export, bench."""
    wrong = []
    for module, lazy in imports(source, FOLDERS[folder]):
        target = folder_of(module)
        allowed = {
            "kernels": target == "kernels" or module == "kinetiq.errors",
            "engine": target in ("engine", "kernels") or (file == "__main__.py" and lazy),
            "export": target in ("engine", "kernels", "export"),
            # One bench measures the export; the others need none of its packages.
            "bench": target in ("engine", "kernels", "bench")
            or (file == "export.py" and target == "export"),
        }
        if not allowed[folder]:
            wrong.append(module)
    return wrong


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_arrow_of_dependency(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in wrong_imports(folder, path.name, path.read_text())
    }
    assert not wrong


@pytest.mark.parametrize(
    ("folder", "file", "source", "wrong"),
    [
        ("kernels", "x.py", "from kinetiq.errors import ShapeError", []),
        ("kernels", "x.py", "from kinetiq.kernels.y import f", []),
        ("kernels", "x.py", "import kinetiq.rows", ["kinetiq.rows"]),
        ("kernels", "x.py", "from kinetiq import Clip", ["kinetiq.Clip"]),
        ("kernels", "x.py", "from ..rows import f", ["kinetiq.rows"]),
        ("kernels", "x.py", "def f():\n    from kinetiq.rows import g", ["kinetiq.rows"]),
        ("engine", "x.py", "from kinetiq.kernels import f\nfrom kinetiq.rows import g", []),
        ("engine", "x.py", "from kinetiq import bench", ["kinetiq.bench"]),
        ("engine", "x.py", "def f():\n    import kinetiq.export.onnx", ["kinetiq.export.onnx"]),
        ("engine", "__main__.py", "from kinetiq.bench import f", ["kinetiq.bench"]),
        ("engine", "__main__.py", "def f():\n    from kinetiq.bench import g", []),
        ("export", "x.py", "import kinetiq as kq\nfrom kinetiq.bench import f", ["kinetiq.bench"]),
        ("bench", "x.py", "import kinetiq\nfrom kinetiq.kernels import f", []),
        ("bench", "x.py", "from kinetiq.export.check import f", ["kinetiq.export.check"]),
        ("bench", "export.py", "from kinetiq.export.check import f", []),
    ],
)
def test_the_check_sees_what_it_forbids(folder, file, source, wrong):
    assert wrong_imports(folder, file, source) == wrong


def test_importing_kinetiq_is_quick_and_loads_no_heavy_package(tmp_path):
    program = (
        "import json, sys, time, torch\n"
        "before, start = set(sys.modules), time.process_time()\n"
        "import kinetiq\n"
        "spent = time.process_time() - start\n"
        "for name in kinetiq.__all__: getattr(kinetiq, name)\n"  # they are imported when used
        "print(json.dumps([spent, sorted(set(sys.modules) - before)]))\n"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        spent, loaded = json.loads(done.stdout)
        heavy = {name for name in loaded if name.split(".")[0] in HEAVY}
        assert not heavy
        seconds.append(spent)
        if spent < SECONDS:
            break
    assert min(seconds) < SECONDS
