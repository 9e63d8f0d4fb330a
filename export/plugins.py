"""Our kernels as plugins of TensorRT.

A node of the domain `kinetiq` becomes a plugin where one of its name is registered and its
function body otherwise. A plugin is described by five functions: what comes out, which types and
tactics there are, which PTX runs (ahead of time, so that an engine needs no Python), how it is
launched, and how Python itself would run it (for looking for a fault in an engine).

Registration is for the whole process and cannot be undone, so it happens once; for which GPU
kernels are compiled is what `compiling` says while an engine is built.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kinetiq.errors import KinetiqError, RequestError, WorkError
from kinetiq.export.nodes import DOMAIN
from kinetiq.export.plugin_compiler import PluginCompiler, PluginKernel
from kinetiq.export.plugin_launch import TACTICS, launch_operator
from kinetiq.export.plugin_layers import (
    KINDS,
    Axes,
    Layer,
    Length,
    Operand,
    PluginKind,
    integers,
    programs,
    result_axes,
)
from kinetiq.export.plugin_ptx import PLAIN_SHARED

_RANK = 4  # of activations: rows, frames, places, channels
_UNKNOWN = -1  # the length of an axis that may change, as TensorRT says it
_DTYPES = {  # by TensorRT's name of a type
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
}
_NAMES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT64": "i64"}
_TUNED = {"FLOAT": "FP32", "HALF": "FP16", "BF16": "BF16", "INT64": "INT64"}
_registered: set[str] = set()
_compiling: list["Compilation"] = []


@dataclass
class Compilation:
    """The kernels of an engine that is being built.

    Args:
        compiler: for one GPU.
        shared_bytes: the most that a block may have; tactics that take more are left out.
        failures: why a layer is no plugin; TensorRT itself says only that a plugin failed.
    """

    compiler: PluginCompiler
    shared_bytes: int
    failures: list["Failure"] = field(default_factory=list)


@dataclass(frozen=True)
class Failure:
    """Why a layer is no plugin.

    Args:
        operator: whose kernel was to run it.
        error: what went wrong.
    """

    operator: str
    error: KinetiqError


def register_plugins(package: Any) -> None:
    """Register every kind of plugin that is not registered yet.

    Args:
        package: `tensorrt.plugin`.
    """
    for kind in KINDS.values():
        if kind.name in _registered:
            continue
        try:
            _register(package, kind)
        except BaseException:
            _forget(package, kind)
            raise
        _registered.add(kind.name)


def _forget(package: Any, kind: PluginKind) -> None:
    """Take what was registered of a kind out of NVIDIA's tables, so that it can be tried again.

    Only the definition in Python: the creator in TensorRT's own registry finds the next by its
    name.
    """
    package._lib.QDP_REGISTRY.pop(f"{DOMAIN}::{kind.name}", None)  # noqa: SLF001  no public way
    operators = getattr(package.op, DOMAIN, None)
    if hasattr(operators, kind.name):
        delattr(operators, kind.name)


@contextmanager
def compiling(compiler: PluginCompiler, shared_bytes: int = PLAIN_SHARED) -> Iterator[Compilation]:
    """Inside, plugins get their kernels from this compiler.

    Args:
        compiler: for one GPU.
        shared_bytes: see `Compilation`.
    """
    _compiling.append(Compilation(compiler, shared_bytes))
    try:
        yield _compiling[-1]
    finally:
        _compiling.pop()


def describe_layer(kind: PluginKind, descriptions: Sequence[Any], heads: int) -> Layer:
    """The layer that TensorRT describes, with shapes.

    Raises:
        RequestError: an input has a type that kernels do not take, or an unknown width.
    """
    operands = {}
    for name, given in zip(kind.inputs, descriptions, strict=True):
        if given.dtype.name not in _NAMES:
            raise RequestError(
                f"plugins: {name} of {kind.name} must be one of {', '.join(_NAMES)}, "
                f"got {given.dtype.name}"
            )
        lengths = _lengths(kind, name, given.shape)
        if len(lengths) == _RANK and lengths[-1] == _UNKNOWN:
            raise RequestError(
                f"plugins: the width of {name} of {kind.name} must be known, and may change"
            )
        most = _lengths(kind, name, given.shape.max if given.is_dynamic else given.shape)
        # An axis that may change is not taken for one that is always 1.
        pairs = zip(most, lengths, strict=True)
        largest = tuple(max(end, 2) if length == _UNKNOWN else end for end, length in pairs)
        fixed = tuple(length != _UNKNOWN for length in lengths)
        operands[name] = Operand(_NAMES[given.dtype.name], largest, fixed)
    return Layer(kind.operator, operands, heads)


def usable_kernels(layer: Layer) -> dict[int, PluginKernel]:
    """The kernels that may run a layer, by tactic; no two are the same.

    Raises:
        RequestError: no kernel can run it.
        WorkError: a kernel could not be compiled, or no engine is being built.
    """
    if not _compiling:
        raise WorkError(
            "plugins: an engine with plugins must be built by `kinetiq export tensorrt`"
        )
    compilation = _compiling[-1]
    found: dict[int, PluginKernel] = {}
    taken = []
    for tactic in TACTICS:
        kernel = compilation.compiler.compile(layer, tactic)
        taken.append(kernel.shared_bytes)
        known = {other.name for other in found.values()}
        if kernel.shared_bytes <= compilation.shared_bytes and kernel.name not in known:
            found[tactic] = kernel
    if not found:
        raise RequestError(
            f"plugins: a block of {layer.operator} must take at most {compilation.shared_bytes} "
            f"bytes of shared memory, got {min(taken)} at the least; leave it to its function body"
        )
    return found


def _register(package: Any, kind: PluginKind) -> None:
    name = f"{DOMAIN}::{kind.name}"
    inputs = dict.fromkeys(kind.inputs, package.TensorDesc)
    attributes = dict.fromkeys(kind.attributes, int)
    text = str | bytes
    plan = tuple[text, text, package.KernelLaunchParams, package.SymIntExprs]

    def describe(*given: Any, **named: int) -> Any:
        out = given[0].like()
        axes = {name: list(one.shape_expr) for name, one in zip(kind.inputs, given, strict=True)}
        for index, length in enumerate(result_axes(kind.operator, axes)):
            out.shape_expr[index] = length
        return out

    def tune(*given: Any) -> Any:
        layer, every = _read(kind, given[:-1]), [*given[: len(kind.inputs)], *given[-1]]
        types = ", ".join(_TUNED[one.dtype.name] for one in every)
        return [package.AutoTuneCombination(types, "LINEAR", list(usable_kernels(layer)))]

    def compile_ahead(*given: Any) -> Any:
        *tensors, _, tactic = given
        layer = _read(kind, tensors)
        kernel = usable_kernels(layer)[tactic]
        axes = _axes(kind, tensors)
        params = package.KernelLaunchParams()
        params.grid_x = programs(kind.operator, axes, kernel.constants)
        params.block_x, params.shared_mem = kernel.threads, kernel.shared_bytes
        lengths = _passed(kind.operator, axes, kernel)
        extra = package.SymIntExprs(len(lengths))
        for index, length in enumerate(lengths):
            extra[index] = package.SymInt32(length)
        return kernel.name, kernel.ptx, params, extra

    def run(*given: Any, stream: int) -> None:
        *tensors, outputs = given
        count = len(kind.inputs)
        heads = tensors[count] if kind.attributes else 1
        of = {name: _view(one) for name, one in zip(kind.inputs, tensors[:count], strict=True)}
        with _on_stream(stream):
            launch_operator(kind.operator, of, heads, _view(outputs[0]))

    package.register(name)(
        _signed(_noting(kind, describe), inputs | attributes, package.TensorDesc)
    )
    asked = inputs | attributes | {"outputs": tuple[package.TensorDesc]}
    package.autotune(name)(_signed(_noting(kind, tune), asked, list[package.AutoTuneCombination]))
    package.aot_impl(name)(_signed(_noting(kind, compile_ahead), asked | {"tactic": int}, plan))
    tensors = dict.fromkeys(kind.inputs, package.Tensor) | attributes
    asked = tensors | {"outputs": tuple[package.Tensor], "stream": int}
    package.impl(name)(_signed(run, asked, None))


def _noting(kind: PluginKind, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose errors are kept: TensorRT passes none of them on."""

    def noting(*given: Any, **named: Any) -> Any:
        try:
            return function(*given, **named)
        except Exception as error:
            if _compiling:
                known = error if isinstance(error, KinetiqError) else _as_work_error(kind, error)
                _compiling[-1].failures.append(Failure(kind.operator, known))
            raise

    return noting


def _as_work_error(kind: PluginKind, error: Exception) -> WorkError:
    explained = WorkError(
        f"plugins: {kind.name} must be a plugin of TensorRT, and failed: {error!r}; leave "
        f"{kind.operator} to its function body"
    )
    explained.__cause__ = error
    return explained


def _signed(
    function: Callable[..., Any], parameters: Mapping[str, Any], result: Any
) -> Callable[..., Any]:
    """The function with this signature, from which TensorRT learns what to pass."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(name, kind, annotation=of) for name, of in parameters.items()]
    signature = inspect.Signature(named, return_annotation=result)
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def _read(kind: PluginKind, given: Sequence[Any]) -> Layer:
    """The layer of tensors and attributes as they are passed."""
    count = len(kind.inputs)
    return describe_layer(kind, given[:count], given[count] if kind.attributes else 1)


def _axes(kind: PluginKind, given: Sequence[Any]) -> Axes:
    """Lengths that cannot change as integers, the others as TensorRT's expressions."""
    return {
        name: [
            expression if length == _UNKNOWN else length
            for length, expression in zip(
                _lengths(kind, name, one.shape), one.shape_expr, strict=True
            )
        ]
        for name, one in zip(kind.inputs, given, strict=False)
    }


def _lengths(kind: PluginKind, name: str, shape: Iterable[int]) -> tuple[int, ...]:
    """Lengths of an input's axes; a single frame is known whatever TensorRT knows of it."""
    rows, *others = shape
    return (rows, 1, *others[1:]) if name in kind.shared else (rows, *others)


def _passed(operator: str, axes: Axes, kernel: PluginKernel) -> list[Length]:
    """The integers that the kernel is passed, in its order."""
    every = integers(operator, axes, kernel.constants)
    return [every[name] for name in kernel.arguments if name in every]


class _Memory:
    """What TensorRT passes to a plugin in Python, as PyTorch takes it without a copy."""

    def __init__(self, tensor: Any) -> None:
        bytes_each = _DTYPES[tensor.dtype.name].itemsize
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": f"<i{bytes_each}",  # there is no word for bfloat16
            "data": (tensor.data_ptr, False),
            "strides": None,
            "version": 3,
        }


def _view(tensor: Any) -> Tensor:
    raw: Tensor = torch.as_tensor(_Memory(tensor), device="cuda")
    return raw.view(_DTYPES[tensor.dtype.name])


def _on_stream(stream: int) -> AbstractContextManager[Any]:
    return torch.cuda.stream(torch.cuda.ExternalStream(stream))
