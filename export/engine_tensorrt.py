"""Engines of full TensorRT, built on the GPU that they are for, with our kernels inside."""

import importlib
import os
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from kinetiq.errors import MissingDependencyError, RequestError
from kinetiq.export.engine_builder import build_plan, save_plan
from kinetiq.export.engine_file import EngineFile
from kinetiq.export.engine_profile import Bounds, Profile, make_profile
from kinetiq.export.engine_source import leave_to_functions, node_names, read_source
from kinetiq.export.plugin_compiler import PluginCompiler
from kinetiq.export.plugin_layers import KINDS
from kinetiq.export.plugin_ptx import PLAIN_SHARED, find_route
from kinetiq.export.plugins import compiling, register_plugins
from kinetiq.files import check_target
from kinetiq.kernels.frame_attention import MAX_FRAMES

PACKAGE = "tensorrt"
_TOGETHER = 32  # frames that one program can hold, which moving deviations takes


def build_engine(
    network: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    bounds: Mapping[str, Bounds] | None = None,
    controls: Collection[str] | None = None,
    plugins: Collection[str] | None = None,
    route: str | None = None,
    shared_bytes: int = PLAIN_SHARED,
    level: int | None = None,
) -> EngineFile:
    """Build an engine for the GPU at hand, which runs without Python.

    Args:
        network: an ONNX file of `export_onnx`.
        path: the engine; what it was built for is written beside it.
        bounds: least, best and most of axes by name; see `engine_profile.make_profile`.
        controls: kinds of control to keep; None: all of the network's but "reduced", whose queries
            are made by several kernels.
        plugins: names of the nodes that are to run our kernels, of `plugin_layers.KINDS`; None: all
            that can at these sizes. The others run their function bodies.
        route: which PTX to embed, of `plugin_ptx.ROUTES`; None: the first for this GPU.
        shared_bytes: of a block, the most that our kernels may take.
        level: how long to look for faster kernels, 0 to 5; None: the builder's own.

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
    model, metadata = read_source(network, controls, unusual=("reduced",))
    profile = make_profile(metadata, bounds or {})
    ours = choose_plugins(node_names(model), profile, plugins)
    leave_to_functions(model, node_names(model) - ours)

    def configure(config: Any) -> None:
        if level is not None:
            config.builder_optimization_level = level

    with ExitStack() as stack:
        flags, compilation = 0, None
        if ours:
            register_plugins(importlib.import_module(f"{PACKAGE}.plugin"))
            flags = 1 << int(package.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
            compiler = stack.enter_context(PluginCompiler(find_route(target, route)))
            compilation = stack.enter_context(compiling(compiler, shared_bytes))
        try:
            plan = build_plan(
                package, model, network, metadata, profile, flags=flags, configure=configure
            )
        except Exception as error:  # TensorRT says of a plugin only that it failed
            if compilation is not None and compilation.errors:
                raise compilation.errors[0] from error
            raise
    return save_plan(
        plan,
        path,
        package=package,
        target=target,
        profile=profile,
        metadata=metadata,
        plugins=ours,
    )


def load_tensorrt() -> Any:
    """The package of full TensorRT.

    Raises:
        MissingDependencyError: it, or a GPU, is missing; the message names all that is.
    """
    missing = []
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError as error:
        missing.append(f'TensorRT, which cannot be imported ({error}): pip install ".[tensorrt]"')
    if not torch.cuda.is_available():
        missing.append(
            "an NVIDIA GPU that PyTorch can use; on a machine without one, build for TensorRT for "
            "RTX: --rtx --target sm_89"
        )
    if missing:
        raise MissingDependencyError(f"export: needs {', and '.join(missing)}")
    return package


def find_gpu() -> str:
    """The architecture of the GPU at hand, such as "sm_90"."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def choose_plugins(
    names: Collection[str], profile: Profile, asked: Collection[str] | None = None
) -> set[str]:
    """Names of the nodes that become plugins.

    Args:
        names: of the nodes that the network has.
        profile: the sizes that the engine takes.
        asked: which are wanted; None: all that can be one kernel at these sizes.

    Raises:
        RequestError: one that is asked for is not known, or cannot be one kernel.
    """
    frames = profile.bounds["frames"].most
    able = {
        kind.name
        for kind in KINDS.values()
        if kind.operator == "query_attention"  # which goes frame by frame
        or frames <= (_TOGETHER if "deviation_row" in kind.inputs else MAX_FRAMES)
    }
    if asked is None:
        return able.intersection(names)
    unable = sorted(set(asked) - able)
    if isinstance(asked, str) or unable:
        raise RequestError(
            f"export: at {frames} frames plugins must be among {', '.join(sorted(able))}, "
            f"got {asked if isinstance(asked, str) else ', '.join(unable)}"
        )
    return set(asked).intersection(names)
