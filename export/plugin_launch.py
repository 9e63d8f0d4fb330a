"""What an operator's launch passes to its kernel, and what of it changes with the shapes.

The operator's own launch is run on tensors without memory, as large as a profile allows, and the
one kernel that would reach the GPU is caught, with the block sizes that production uses.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kinetiq.errors import RequestError, WorkError
from kinetiq.export.plugin_layers import Axes, Layer, Length, integers, programs
from kinetiq.kernels._compile import TYPES
from kinetiq.kernels._launch import choosing, pretend

_ELEMENTS = TYPES | {"i64": torch.int64}
_LONGEST = 2**31 - 1  # TensorRT passes integers of 32 bits
_ALIGNED = 16  # bytes that addresses of activations are taken to be multiples of
_RANK = 4  # of activations: rows, frames, places, channels
_ALL = 2**20  # bytes of a sequence, above all that there are

# tactic → how it changes the settings of the operator's launch
TACTICS: Mapping[int, Mapping[str, int]] = {
    1: {},  # what production uses
    2: {"num_stages": 1},  # less shared memory, without loads ahead
    3: {"num_stages": 1, "BLOCK_N": 16},  # the least
}


class Launch(NamedTuple):
    """What an operator's launch passes to its kernel.

    Attributes:
        function: the Triton function.
        arguments: by name, tensors among them.
        options: number of warps and stages.
        programs: the size of the grid.
    """

    function: Any
    arguments: dict[str, Any]
    options: dict[str, int]
    programs: int


def catch_launch(layer: Layer, architecture: str, tactic: int) -> Launch:
    """Run the operator's launch at the layer's largest shapes, up to where the GPU would begin.

    Args:
        layer: what is launched.
        architecture: whose settings it takes, such as "sm_80".
        tactic: a key of `TACTICS`, which changes them.

    Raises:
        RequestError: it is not one kernel that reads the layer's inputs as they are and writes its
            output, which is all that a plugin can have.
    """
    operands = layer.operands
    given = {
        name: torch.empty(operand.largest, dtype=_ELEMENTS[operand.type], device="meta")
        for name, operand in operands.items()
    }
    importlib.import_module(f"kinetiq.kernels.{layer.operator}")
    caught: list[Launch] = []
    with pretend(architecture), choosing(_chooser(layer, tactic)), _catching(caught):
        arguments = _operator_arguments(layer.operator, given, layer.heads)
        out = getattr(torch.ops.kinetiq, layer.operator)(*arguments)  # its fake
        launch_operator(layer.operator, given, layer.heads, out)
    tensors = [
        id(tensor)
        for launch in caught
        for tensor in launch.arguments.values()
        if isinstance(tensor, Tensor)
    ]
    if len(caught) != 1 or tensors != [*map(id, given.values()), id(out)]:
        shapes = ", ".join(f"{name} {list(operand.largest)}" for name, operand in operands.items())
        raise RequestError(
            f"plugins: {layer.operator} must be one kernel that reads its inputs in place, and at "
            f"{shapes} it is not; leave it to its function body"
        )
    launch = caught[0]
    if "EVEN_KEYS" in launch.arguments and not operands["key"].fixed[2]:
        launch.arguments["EVEN_KEYS"] = False  # at the largest shapes they may fill all blocks
    return launch


def split_arguments(layer: Layer, launch: Launch) -> tuple[dict[str, Any], dict[str, str]]:
    """Constants of a kernel by name, and the type of each other argument.

    Raises:
        RequestError: an integer may be beyond 32 bits.
        WorkError: an integer, or the size of the grid, is not what the launch passes.
    """
    known = launch.arguments
    changing = integers(layer.operator, _axes(layer, _Changing), known)
    expected = integers(layer.operator, _axes(layer, int), known)
    expected["programs"] = programs(layer.operator, _axes(layer, int), known)
    for name, value in (known | {"programs": launch.programs}).items():
        if name in expected and expected[name] != value:
            raise WorkError(
                f"plugins: {name} of {layer.operator} must be {value} as in its launch, got "
                f"{expected[name]}"
            )
        if name in expected and value > _LONGEST:
            raise RequestError(
                f"plugins: {name} of {layer.operator} must be at most {_LONGEST}, got {value}; "
                "make the profile smaller"
            )
    types = {torch_type: name for name, torch_type in _ELEMENTS.items()}
    passed = {}
    for name, value in known.items():
        if isinstance(value, Tensor):
            passed[name] = f"*{types[value.dtype]}"
        elif not isinstance(changing.get(name, 0), int):
            passed[name] = "i32"
    return {name: value for name, value in known.items() if name not in passed}, passed


class _Changing:
    """A length that may change, and what it is a multiple of."""

    def __init__(self, value: int, factor: int = 1) -> None:
        self.value, self.factor = value, factor

    def __add__(self, other: int) -> "_Changing":
        return _Changing(self.value + other)

    def __mul__(self, other: "int | _Changing") -> "_Changing":
        if isinstance(other, int):
            return _Changing(self.value * other, self.factor * other)
        return _Changing(self.value * other.value, self.factor * other.factor)

    def __floordiv__(self, other: int) -> "_Changing":
        return _Changing(self.value // other)


def _axes(layer: Layer, kind: Callable[[int], Length]) -> Axes:
    """Lengths of all axes, those that may change as `kind`."""
    return {
        name: [
            length if fixed else kind(length)
            for length, fixed in zip(operand.largest, operand.fixed, strict=True)
        ]
        for name, operand in layer.operands.items()
    }


def find_alignments(
    layer: Layer, launch: Launch, passed: Mapping[str, str]
) -> dict[tuple[int], list[list[Any]]]:
    """Which arguments are multiples of 16: addresses of activations, and lengths of whole lines.

    A control's address may be that of one line of a larger tensor.
    """
    changing = integers(layer.operator, _axes(layer, _Changing), launch.arguments)
    found = {}
    for index, name in enumerate(launch.function.arg_names):
        length, value = changing.get(name), launch.arguments[name]
        whole = isinstance(length, _Changing) and length.factor % _ALIGNED == 0
        if (isinstance(value, Tensor) and value.ndim == _RANK) or (name in passed and whole):
            found[index,] = [["tt.divisibility", _ALIGNED]]
    return found


def launch_operator(operator: str, given: Mapping[str, Tensor], heads: int, out: Tensor) -> None:
    """Fill `out` as the operator does on a GPU.

    Args:
        operator: of `kinetiq.kernels`.
        given: its tensors by argument; others are absent.
        heads: as in `Layer`.
        out: contiguous.
    """
    module = importlib.import_module(f"kinetiq.kernels.{operator}")
    every = _operator_arguments(operator, given, heads)
    if operator == "query_attention":
        module._launch_forward(module.Inputs(*every), out, None)  # noqa: SLF001  what production
    elif operator == "frame_attention":  # launches, where checks and autograd are only overhead
        query, key, value, *controls, _ = every
        module._launch_forward(query, key, value, tuple(controls), heads, out)  # noqa: SLF001
    else:
        module._launch_forward(*every, out)  # noqa: SLF001


def _operator_arguments(operator: str, given: Mapping[str, Tensor], heads: int) -> list[Any]:
    """All arguments in the order of the operator's schema; those that are absent are None."""
    schema = getattr(torch.ops.kinetiq, operator).default._schema  # noqa: SLF001  no public way
    return [heads if one.name == "heads" else given.get(one.name) for one in schema.arguments]


@contextmanager
def _catching(caught: list[Launch]) -> Iterator[None]:
    """Inside, launches of compiled kernels are noted instead of made."""
    from triton.runtime.jit import JITFunction

    def catch(function: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options: dict[str, int] = {
            name: named.pop(name) for name in ("num_warps", "num_stages") if name in named
        }
        positional = dict(zip(function.arg_names, arguments, strict=False))
        caught.append(Launch(function, positional | named, options, *grid))

    launched = JITFunction.run
    JITFunction.run = catch
    try:
        yield
    finally:
        JITFunction.run = launched


def _chooser(layer: Layer, tactic: int) -> Callable[[str, str, dict[str, int]], dict[str, int]]:
    """How this tactic changes the settings of a launch."""

    def choose(operator: str, key: str, chosen: dict[str, int]) -> dict[str, int]:
        changed = {name: value for name, value in TACTICS[tactic].items() if name in chosen}
        if "deviation_row" in layer.operands:
            # Means are at hand only where a program holds all frames of a sequence. Where it would
            # take them in parts, a launch moves deviations before, by other kernels; a plugin is
            # one kernel.
            changed["ONE_TILE"] = _ALL
        return {**chosen, **changed}

    return choose
