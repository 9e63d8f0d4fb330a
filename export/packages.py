"""What export needs beyond the core packages."""

import importlib.util

from kinetiq.errors import MissingDependencyError


def require_packages(*names: str) -> None:
    """Raise a `MissingDependencyError` unless all packages are there."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f'export: needs {", ".join(missing)}, and it is not installed: pip install ".[export]"'
        )
