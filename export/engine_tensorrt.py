"""Engines of full TensorRT, built on the GPU that they are for, with our kernels inside."""

import importlib
import math
import os
import warnings
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from kinetiq.errors import KinetiqWarning, MissingDependencyError, RequestError
from kinetiq.export.engine_builder import build_plan, save_plan
from kinetiq.export.engine_file import EngineFile
from kinetiq.export.engine_profile import TOGETHER, Bounds, Profile, make_profile
from kinetiq.export.engine_source import leave_to_functions, node_names, read_source
from kinetiq.export.gpu import describe_gpu
from kinetiq.export.packages import is_older, load_gpu_runtime
from kinetiq.export.plugin_choice import check_operators, choose_by_record
from kinetiq.export.plugin_compiler import PluginCompiler
from kinetiq.export.plugin_layers import KINDS
from kinetiq.export.plugin_ptx import PLAIN_SHARED, ROUTES, find_route
from kinetiq.export.plugins import Failure, compiling, register_plugins
from kinetiq.files import check_target
from kinetiq.kernels.frame_attention import MAX_FRAMES

RUNTIME = "tensorrt"
_OLDEST = "11.4"  # earlier ones convert arrays in a way that NumPy 2.4 refuses


def build_engine(
    network: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    bounds: Mapping[str, Bounds] | None = None,
    controls: Collection[str] | None = None,
    outputs: Collection[str] | None = None,
    plugins: Collection[str] | None = None,
    route: str | None = None,
    shared_bytes: int = PLAIN_SHARED,
    level: int | None = None,
    vouched: bool = True,
) -> EngineFile:
    """Build an engine for the GPU at hand, which runs without Python.

    Args:
        network: an ONNX file of `export_onnx`.
        path: the engine; what it was built for is written beside it.
        bounds: least, best and most of axes by name; see `engine_profile.make_profile`.
        controls: kinds of control to keep; None: all of the network's but "reduced", whose queries
            are made by several kernels.
        outputs: names of those to keep, since an engine computes all that it has; None: all.
        plugins: the operators whose nodes are to run our kernels, of `plugin_choice.OPERATORS`;
            None: those that the record of this GPU says, of which only those nodes that can at
            these sizes. The others run their function bodies, and so do those of more frames than
            a kernel can hold and those for which none can be made, which is said and recorded; that
            none can be made is an error of operators that are named.
        route: which PTX to embed, of `plugin_ptx.ROUTES`; None: the one that the record of this GPU
            says, or else its first.
        shared_bytes: of a block, the most that our kernels may take.
        level: how long to look for faster kernels, 0 to 5; None: the builder's own.
        vouched: see `engine_file.write_engine`.

    Raises:
        RequestError: an axis, a control, a plugin or a route is not one that there is.
        CheckpointError: the network cannot be used.
        OutputError: the engine cannot be written.
        MissingDependencyError: TensorRT or a GPU is missing.
        WorkError: the build failed.
    """
    package = load_tensorrt()
    target = find_gpu()
    check_target(path, "engine")
    model, metadata = read_source(network, controls, unusual=("reduced",), outputs=outputs)
    profile = make_profile(metadata, bounds or {})
    names = node_names(model)
    # The record is read only where it is asked: a file that is being made need not be there yet.
    operators = choose_by_record(target).operators if plugins is None else check_operators(plugins)
    ours = of_operators(choose_nodes(names, profile, plugins), operators)
    left_out = too_long(names, profile, operators)
    if ours and plugins is None and route is None and target not in ROUTES:
        why = f"no kernel of ours is made for {target}"
        left_out = {name: why for name in operators if of_operators(names, (name,))}
        ours = set()
    for operator, why in left_out.items():
        _say(f"{operator} is left to its function body, in part or as a whole: {why}")
    chosen = None
    if ours or route is not None:
        chosen = find_route(target, choose_by_record(target).route if route is None else route)

    def configure(config: Any) -> None:
        if level is not None:
            config.builder_optimization_level = level

    with ExitStack() as stack:
        compiler = None
        if ours and chosen is not None:
            register_plugins(_plugin_package(package))
            compiler = stack.enter_context(PluginCompiler(chosen))
        while True:
            leave_to_functions(model, node_names(model) - ours)
            flags = 0
            failures: list[Failure] = []
            with ExitStack() as building:
                if ours and compiler is not None:
                    flags = _prefer_ahead_of_time(package)
                    compilation = building.enter_context(compiling(compiler, shared_bytes))
                    failures = compilation.failures
                try:
                    plan = build_plan(
                        package, model, network, metadata, profile, flags=flags, configure=configure
                    )
                    break
                except Exception as error:  # TensorRT says of a plugin only that it failed
                    if not failures:
                        raise
                    if plugins is not None:
                        raise failures[0].error from error
            operator, why = failures[0].operator, str(failures[0].error)
            _say(f"{operator} is left to its function body: {why}")
            left_out[operator] = why
            ours = ours - of_operators(ours, (operator,))
    return save_plan(
        plan,
        path,
        package=package,
        target=target,
        profile=profile,
        metadata=metadata,
        plugins=ours,
        route=chosen.name if ours and chosen is not None else None,
        left_out=left_out,
        gpu=describe_gpu(),
        vouched=vouched,
    )


def _say(what: str) -> None:
    warnings.warn(f"export: {what}", KinetiqWarning, stacklevel=3)


def _plugin_package(package: Any) -> Any:
    """TensorRT's package of plugins in Python.

    Raises:
        MissingDependencyError: this TensorRT is too old for it.
    """
    if is_older(package.__version__, _OLDEST):  # 10.14 has all that is looked for below
        raise _too_old(package)
    try:
        _prefer_ahead_of_time(package)
        return importlib.import_module(f"{RUNTIME}.plugin")
    except (ImportError, AttributeError) as error:
        raise _too_old(package, f" ({error})") from error


def _too_old(package: Any, why: str = "") -> MissingDependencyError:
    return MissingDependencyError(
        f"export: our kernels need TensorRT {_OLDEST} or newer, got {package.__version__}{why}: "
        'pip install ".[tensorrt]", or leave them out with --plugin none'
    )


def _prefer_ahead_of_time(package: Any) -> int:
    """The network's flag that takes a plugin's compiled kernel where it has Python's too."""
    return 1 << int(package.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)


def load_tensorrt() -> Any:
    """The package of full TensorRT.

    Raises:
        MissingDependencyError: it, or a GPU, is missing; the message names all that is.
    """
    return load_gpu_runtime(
        RUNTIME,
        "export",
        "on a machine without one, build for TensorRT for RTX: --rtx --target sm_89",
    )


def find_gpu() -> str:
    """The architecture of the GPU at hand, such as "sm_90"."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def choose_nodes(
    names: Collection[str], profile: Profile, operators: Collection[str] | None = None
) -> set[str]:
    """Names of the nodes that can be plugins.

    Args:
        names: of the nodes that the network has.
        profile: the sizes that the engine takes.
        operators: whose nodes are wanted; None: of all, those that can be one kernel.

    Raises:
        RequestError: an operator is not known, or has nodes of which none can be one kernel.
    """
    frames = profile.bounds["frames"].most
    found = {name for name in names if name in KINDS and frames <= _most_frames(name)}
    if operators is None:
        return found
    wanted = check_operators(operators)
    for operator in wanted:
        if of_operators(names, (operator,)) and not of_operators(found, (operator,)):
            raise RequestError(
                f"export: {operator} must be one kernel to be a plugin, and at {frames} frames it "
                "is not; make the profile's frames fewer, or leave it to its function body"
            )
    return of_operators(found, wanted)


def too_long(
    names: Collection[str], profile: Profile, operators: Collection[str]
) -> dict[str, str]:
    """By operator, why nodes of it cannot be plugins at the sizes that an engine takes.

    Args:
        names: of the nodes that the network has.
        profile: the sizes.
        operators: whose nodes are wanted.
    """
    frames = profile.bounds["frames"].most
    found = {}
    for operator in operators:
        own = of_operators(names, (operator,)) - choose_nodes(names, profile)
        if own:
            found[operator] = (
                f"{', '.join(sorted(own))} must be one kernel of at most "
                f"{min(map(_most_frames, own))} frames, and the profile has {frames}; make it fewer"
            )
    return found


def _most_frames(name: str) -> float:
    """How many frames a node may have whose kernel holds all of them."""
    if KINDS[name].operator == "query_attention":  # which goes frame by frame
        return math.inf
    return TOGETHER if "deviation_row" in KINDS[name].inputs else MAX_FRAMES


def of_operators(names: Collection[str], operators: Collection[str]) -> set[str]:
    """The nodes among these whose kernels are of these operators."""
    return {name for name in names if name in KINDS and KINDS[name].operator in operators}
