"""Compiling the kernels of TensorRT's layers ahead of time, for GPUs that need not be here.

This happens in a process of its own: one with `TRITON_INTERPRET=1` in its environment has no
kernels that could be compiled. Integers that may change are left open.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from kinetiq.errors import RequestError, WorkError
from kinetiq.export.plugin_launch import catch_launch, find_alignments, split_arguments
from kinetiq.export.plugin_layers import Layer, Operand
from kinetiq.export.plugin_ptx import LANGUAGE, Route, embed

_PROGRAM = "from kinetiq.export import plugin_compiler; plugin_compiler.main()"


@dataclass(frozen=True)
class PluginKernel:
    """A kernel as TensorRT embeds it.

    Args:
        name: of its entry; no two kernels share one.
        ptx: its text.
        threads: of each block.
        shared_bytes: of each block.
        function: name of the Triton function in the operator's file.
        constants: what is fixed in the kernel, by name of the function's argument.
        arguments: names of the function's other arguments, in the order that they are passed.
    """

    name: str
    ptx: str
    threads: int
    shared_bytes: int
    function: str
    constants: Mapping[str, Any]
    arguments: tuple[str, ...]


class PluginCompiler:
    """A process that compiles kernels; use it in a `with` block.

    Args:
        route: which PTX to make.
    """

    def __init__(self, route: Route) -> None:
        self.route = route
        self._known: dict[str, PluginKernel] = {}

    def __enter__(self) -> Self:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._process = subprocess.Popen(  # noqa: S603  our own interpreter, in fixed words
            [sys.executable, "-P", "-c", _PROGRAM],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A process that ended early leaves what it was not told in the pipe, which cannot close.
        with self._said, suppress(BrokenPipeError), self._process as process:
            process.kill()

    def compile(self, layer: Layer, tactic: int = 1) -> PluginKernel:
        """The kernel of a layer.

        Args:
            layer: what it runs.
            tactic: a key of `plugin_launch.TACTICS`.

        Raises:
            RequestError: the layer cannot be one kernel, or an integer that it is passed may
                be beyond 32 bits.
            WorkError: the kernel could not be compiled.
        """
        asked = json.dumps([asdict(layer), tactic, asdict(self.route)])
        if asked not in self._known:
            self._known[asked] = self._ask(asked)
        return self._known[asked]

    def _ask(self, asked: str) -> PluginKernel:
        assert self._process.stdin is not None  # noqa: S101  pipes were asked for
        assert self._process.stdout is not None  # noqa: S101
        try:
            self._process.stdin.write(asked + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._said.seek(0)
            raise WorkError(
                "plugins: the compiling process must answer, and ended: "
                f"{self._said.read()[-2000:].strip()}"
            )
        found = json.loads(answer)
        if "refused" in found:
            raise RequestError(found["refused"])
        if "failed" in found:
            raise WorkError(found["failed"])
        return PluginKernel(**found | {"arguments": tuple(found["arguments"])})


def main() -> None:
    """Read layers from standard input, one a line; write their kernels likewise."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # compilers print to standard output, which belongs to the answers
    for line in sys.stdin:
        layer, tactic, route = json.loads(line)
        operands = {
            name: Operand(given["type"], tuple(given["largest"]), tuple(given["fixed"]))
            for name, given in layer["operands"].items()
        }
        answer: dict[str, Any]
        try:
            asked = Layer(layer["operator"], operands, layer["heads"])
            answer = asdict(compile_layer(asked, tactic, Route(**route)))
        except RequestError as error:
            answer = {"refused": str(error)}
        except WorkError as error:
            answer = {"failed": str(error)}
        except Exception as error:  # the compiler raises what it likes
            words = str(error).strip() or type(error).__name__
            answer = {"failed": f"plugins: {layer['operator']} must compile: {words[-2000:]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def compile_layer(layer: Layer, tactic: int, route: Route) -> PluginKernel:
    """The kernel of a layer; see `PluginCompiler.compile`. Needs Triton that is not interpreted."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = catch_launch(layer, route.architecture, tactic)
    constants, passed = split_arguments(layer, launch)
    signature = {name: passed.get(name, "constexpr") for name in launch.function.arg_names}
    source = ASTSource(
        launch.function, signature, constants, find_alignments(layer, launch, passed)
    )
    number = int(route.architecture.removeprefix("sm_"))
    options: dict[str, Any] = dict(launch.options)
    if number >= 100:
        options["ptx_version"] = LANGUAGE
    compiled = triton.compile(source, target=GPUTarget("cuda", number, 32), options=options)
    if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
        raise WorkError(f"plugins: {launch.function.__name__} must need no scratch memory")
    name, ptx = embed(compiled.asm["ptx"], len(passed), route)
    return PluginKernel(
        name,
        ptx,
        32 * compiled.metadata.num_warps,
        compiled.metadata.shared,
        launch.function.__name__,
        constants,
        tuple(passed),
    )
