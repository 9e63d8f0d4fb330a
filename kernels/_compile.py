"""Compiling kernels for GPUs that are not here, and an account of what came out.

An operator's file exposes `COMPILED`, its launches at production shapes:

    def _launch_4096(dtype: torch.dtype) -> None:
        x = torch.empty(32, 4096, 320, dtype=dtype, device="meta")
        _launch_forward(x, ..., out=torch.empty_like(x))

    COMPILED = (CompileCase("query_attention", "animatediff_64x64", True, _launch_4096, 48 / 40),)

The launch itself is run, on tensors without memory. What would reach the GPU is caught and
compiled for a target: the same block sizes, strides and alignments as in production, and whatever
number of kernels the launch consists of.

Compiling happens in a process of its own, since a process with `TRITON_INTERPRET=1` in its
environment has no kernels that could be compiled. What was compiled before, for another shape or
in a run that was killed, comes out of Triton's cache on disk: a kernel is the same if its source,
types, constants, alignments and target are.
"""

import functools
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kinetiq.errors import RequestError, WorkError
from kinetiq.kernels._launch import pretend

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx942",)
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SHARED_LIMITS = {  # bytes that one block may have: CUDA C++ Programming Guide, table of features
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
_RESIDENT = {  # of one multiprocessor: warps, blocks, bytes of shared memory; the same table
    "sm_80": (64, 32, 164 * 1024),
    "sm_86": (48, 16, 100 * 1024),
    "sm_89": (48, 24, 100 * 1024),
    "sm_90": (64, 32, 228 * 1024),
    "sm_100": (64, 32, 228 * 1024),
    "sm_120": (48, 24, 100 * 1024),
}
_REGISTERS = 65536  # of one multiprocessor, on every target here
_RESERVED_SHARED = 1024  # that the system takes of each block
_MATRIX = re.compile(r"\b(HGMMA|QGMMA|HMMA|QMMA|IMMA|DMMA|UTC[A-Z]*MMA)\b")
_MFMA = re.compile(r"\bv_s?mfma\w*")
# A product in the layout of ordinary loads has been given to no matrix unit.
_ORDINARY_DOT = re.compile(r"\btt\.dot\b.*-> tensor<[^>]*#blocked\d*>")
_PROGRAM = "from kinetiq.kernels import _compile; _compile.main()"
_GRID_LIMITS = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class CompileCase:
    """One launch of an operator at one production shape.

    Args:
        operator: name of the operator's file.
        shape: name of the shape, such as "animatediff_64x64".
        forward: whether this is the forward direction.
        launch: launches on "meta" tensors of the given type; may launch several kernels.
        count_padded: counts `padded_work`, from the launch settings, which are not read before.
        padded_head_dim: columns of a head that the kernel multiplies for each one that there is,
            which is one factor of `padded_work`; 1 where there are no heads.
    """

    operator: str
    shape: str
    forward: bool
    launch: Callable[[torch.dtype], None]
    count_padded: Callable[[], float] = lambda: 1.0
    padded_head_dim: float = 1.0

    @property
    def padded_work(self) -> float:
        """Multiplications that the kernel does for each one that the formula asks for.

        It is 1 where nothing is padded.
        """
        return self.count_padded()


@dataclass(frozen=True)
class Request:
    """One case, for one type and one target; `element` is a key of `TYPES`."""

    operator: str
    shape: str
    forward: bool
    element: str
    target: str


@dataclass(frozen=True)
class Account:
    """What became of one kernel of a request.

    Args:
        request: what was asked for.
        kernel: name of the kernel; empty if the launch failed before it reached one.
        error: why it could not be compiled or launched; empty if it could.
        registers: of each thread.
        spill_bytes: of local memory that each thread uses.
        shared_bytes: of each block.
        warps: of each block.
        grid: number of programs along each axis.
        occupancy: share of the warps that a multiprocessor can hold, by registers, shared memory
            and block count; None where not known.
        dots: matrix products that the kernel's source asks for.
        ordinary_dots: matrix products that the compiler left to the ordinary units; one in a loop
            may count several times.
        matrix_instructions: name → how many there are in the machine code.
        padded_work: as the case says.
        padded_head_dim: likewise.
        seconds: that compiling took.
    """

    request: Request
    kernel: str = ""
    error: str = ""
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    warps: int = 0
    grid: tuple[int, ...] = ()
    occupancy: float | None = None
    dots: int = 0
    ordinary_dots: int = 0
    matrix_instructions: dict[str, int] | None = None
    padded_work: float = 1.0
    padded_head_dim: float = 1.0
    seconds: float = 0.0

    @property
    def misses_matrix_units(self) -> bool:
        """Whether any matrix product was left to the ordinary units.

        Products of float32 belong there: no matrix unit has its precision.
        """
        if self.error or self.request.element == "fp32":
            return False
        return self.ordinary_dots > 0 or (self.dots > 0 and not self.matrix_instructions)


def find_cases() -> tuple[CompileCase, ...]:
    """The cases of all operators, in the order of their files."""
    package = importlib.import_module("kinetiq.kernels")  # whose files import this one
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    found: list[CompileCase] = []
    for name in names:
        if not name.startswith("_"):
            module = importlib.import_module(f"kinetiq.kernels.{name}")
            found.extend(getattr(module, "COMPILED", ()))
    return tuple(found)


def compile_apart(requests: Sequence[Request]) -> Iterator[Account]:
    """Compile in another process, and yield the accounts as they come.

    Raises:
        RequestError: a target or type is not known.
        WorkError: that process died; the message has the end of what it said.
    """
    for request in requests:
        if request.target not in SHARED_LIMITS or request.element not in TYPES:
            raise RequestError(
                f"compile: target must be one of {', '.join(SHARED_LIMITS)} and type one of "
                f"{', '.join(TYPES)}, got {request.target} and {request.element}"
            )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as asked,
        tempfile.TemporaryFile("w+", encoding="utf-8") as said,
    ):
        asked.writelines(json.dumps(asdict(request)) + "\n" for request in requests)
        asked.seek(0)
        command = [sys.executable, "-P", "-c", _PROGRAM]
        with subprocess.Popen(  # noqa: S603  our own interpreter, in fixed words
            command, env=environment, stdin=asked, stdout=subprocess.PIPE, stderr=said, text=True
        ) as process:
            assert process.stdout is not None  # noqa: S101  a pipe was asked for
            for line in process.stdout:
                yield _parse(json.loads(line))
        if process.returncode:
            said.seek(0)
            raise WorkError(
                f"compile: the compiling process must end with 0, got {process.returncode}: "
                f"{said.read()[-2000:].strip()}"
            )


def main() -> None:
    """Read requests from standard input, a JSON object a line; write accounts likewise."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # compilers print to standard output, which belongs to the answers
    cases = {(case.operator, case.shape, case.forward): case for case in find_cases()}
    for line in sys.stdin:
        request = Request(**json.loads(line))
        case = cases.get((request.operator, request.shape, request.forward))
        unknown = [Account(request, error="an operator must have this case, got none that has")]
        for account in unknown if case is None else compile_case(case, request):
            answers.write(json.dumps(asdict(account)) + "\n")
            answers.flush()


def compile_case(case: CompileCase, request: Request) -> list[Account]:
    """Run the case's launch with kernels that are compiled instead of run; one account each."""
    from triton.runtime.jit import JITFunction

    accounts: list[Account] = []
    empty = Account(request, padded_work=case.padded_work, padded_head_dim=case.padded_head_dim)

    def catch(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        started = time.perf_counter()
        account = replace(empty, kernel=kernel.__name__, grid=tuple(grid))
        try:
            account = _describe(account, *_compile(kernel, arguments, options, request.target))
        except Exception as error:  # the compiler raises what it likes
            account = replace(account, error=_first_line(error))
        seconds = round(time.perf_counter() - started, 3)
        accounts.append(replace(account, seconds=seconds))

    launched = JITFunction.run
    JITFunction.run = catch
    try:
        with pretend(request.target):
            case.launch(TYPES[request.element])
    except Exception as error:  # an account of failures must not stop at the first
        accounts.append(replace(empty, error=_first_line(error)))
    finally:
        JITFunction.run = launched
    return accounts or [replace(empty, error="the launch must reach a kernel, got none")]


def _compile(
    kernel: Any, arguments: Iterable[Any], options: dict[str, Any], target: str
) -> tuple[Any, str]:
    """The compiled kernel and its machine code as text."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    else:
        gpu = GPUTarget("hip", target, 64)
    backend = make_backend(gpu)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = binder(*arguments, **options)
    parsed, signature, constants, attributes = kernel._pack_args(  # noqa: SLF001
        backend, options, bound, specialization, {}
    )
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=parsed.__dict__)
    if gpu.backend == "hip":
        return compiled, compiled.asm["amdgcn"]
    return compiled, _disassemble(compiled.asm["cubin"])


@functools.lru_cache(maxsize=64)  # shapes that differ in sizes alone are one binary
def _disassemble(cubin: bytes) -> str:
    """The machine code, and the resources that it says it needs."""
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run(  # noqa: S603  a tool of the compiler's own package
            [tool, "-sass", "-res-usage", str(path)], check=True, capture_output=True, text=True
        )
    return done.stdout + done.stderr


def _describe(account: Account, compiled: Any, text: str) -> Account:
    target = account.request.target
    if target.startswith("sm_"):
        registers = _number(r"\bREG:(\d+)", text)
        spilled = _number(r"\bSTACK:(\d+)", text) + _number(r"\bLOCAL:(\d+)", text)
        names = _MATRIX.findall(text)
    else:
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        spilled = 4 * _number(r"\.vgpr_spill_count:\s*(\d+)", text)
        names = _MFMA.findall(text)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    too_much = []
    if shared > SHARED_LIMITS[target]:
        limit = SHARED_LIMITS[target]
        too_much.append(f"shared memory must be at most {limit} bytes, got {shared}")
    too_much += [
        f"grid axis {axis} must be at most {limit}, got {size}"
        for axis, (size, limit) in enumerate(zip(account.grid, _GRID_LIMITS, strict=False))
        if size > limit
    ]
    return replace(
        account,
        error="; ".join(too_much),
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=shared,
        warps=warps,
        occupancy=theoretical_occupancy(target, registers, shared, warps),
        dots=len(re.findall(r"\btt\.dot\b", compiled.asm["ttir"])),
        ordinary_dots=count_ordinary_dots(compiled.asm["ttgir"]),
        matrix_instructions={name: names.count(name) for name in sorted(set(names))},
    )


def count_ordinary_dots(intermediate: str) -> int:
    """Matrix products that no matrix unit does, in Triton's intermediate code for a GPU."""
    return len(_ORDINARY_DOT.findall(intermediate))


def theoretical_occupancy(target: str, registers: int, shared: int, warps: int) -> float | None:
    """Share of the warps of a multiprocessor that blocks of this kind can fill.

    None for a target whose multiprocessor is not described here.
    """
    if target not in _RESIDENT:
        return None
    most_warps, most_blocks, most_shared = _RESIDENT[target]
    of_a_warp = -(-max(registers, 1) * 32 // 256) * 256  # registers are handed out 256 at a time
    blocks = min(
        most_blocks,
        most_warps // warps,
        _REGISTERS // (of_a_warp * warps),
        most_shared // (shared + _RESERVED_SHARED),
    )
    return blocks * warps / most_warps


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise WorkError(f"compile: the disassembly must have {pattern}, got none")
    return int(found[1])


def _parse(entries: dict[str, Any]) -> Account:
    request = Request(**entries.pop("request"))
    return Account(request=request, **entries | {"grid": tuple(entries["grid"])})


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
