"""Whether records that were read from a file hold what their classes say."""

import reprlib
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

_UNIONS = (Union, types.UnionType)


def check_types(record: object) -> None:
    """Require every field of a record, and of those in it, to be of the type that it is noted with.

    Raises:
        TypeError: one is not; the message has its name and what came.
    """
    _check(record, type(record), type(record).__name__)


def _check(value: object, hint: Any, name: str) -> None:
    """Require a value to be of a type, of which tuples are of any number of one type."""
    inner = get_args(hint)
    if not any(_is(value, kind) for kind in (inner if get_origin(hint) in _UNIONS else (hint,))):
        words = hint.__name__ if isinstance(hint, type) else hint
        raise TypeError(f"{name} must be {words}, got {reprlib.repr(value)}")
    if is_dataclass(value) or hasattr(value, "_fields"):
        for field, wanted in get_type_hints(type(value)).items():
            _check(getattr(value, field), wanted, field)
    elif isinstance(value, tuple):
        for part in value:
            _check(part, inner[0], name)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            _check(key, inner[0], name)
            _check(part, inner[1], f"{name}.{key}")


def _is(value: object, kind: Any) -> bool:
    plain = get_origin(kind) or kind
    return type(value) is int if plain is int else isinstance(value, plain)  # no bool is a number
