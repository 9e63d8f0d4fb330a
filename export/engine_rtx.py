"""Engines of TensorRT for RTX, whose builder needs no GPU.

It has no plugins of ours (its builder ends the process where one is added), so every node runs its
function body; the attention in it becomes one fused kernel.
"""

import os
from collections.abc import Collection, Mapping
from typing import Any

from kinetiq.errors import RequestError
from kinetiq.export.engine_builder import build_plan, save_plan
from kinetiq.export.engine_file import EngineFile
from kinetiq.export.engine_profile import Bounds, make_profile
from kinetiq.export.engine_source import read_source
from kinetiq.export.packages import load_gpu_runtime
from kinetiq.files import check_target

RUNTIME = "tensorrt-rtx"
PACKAGE = "tensorrt_rtx"
_OLDEST_BF16 = 80


def build_rtx_engine(
    network: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    target: str,
    bounds: Mapping[str, Bounds] | None = None,
    controls: Collection[str] | None = None,
    outputs: Collection[str] | None = None,
    level: int | None = None,
) -> EngineFile:
    """Build an engine for one kind of GPU, on any machine.

    Args:
        network: an ONNX file of `export_onnx`.
        path: the engine; what it was built for is written beside it.
        target: the GPU's architecture, such as "sm_89".
        bounds: least, best and most of axes by name; see `engine_profile.make_profile`.
        controls: kinds of control to keep; None: all of the network's.
        outputs: names of those to keep, since an engine computes all that it has; None: all.
        level: how long to look for faster kernels, 0 to 5; None: the builder's own.

    Raises:
        RequestError: the target, an axis or a control is not one that there is.
        CheckpointError: the network cannot be used.
        OutputError: the engine cannot be written.
        MissingDependencyError: TensorRT for RTX is not installed.
        WorkError: the build failed.
    """
    package = load_gpu_runtime(RUNTIME, "export")
    known = require_target(package, target)
    check_target(path, "engine")
    model, metadata = read_source(network, controls, outputs=outputs)
    if metadata.precision == "bfloat16" and int(target.removeprefix("sm_")) < _OLDEST_BF16:
        raise RequestError(
            f"export: {target} has no bfloat16 and the network is in it; export the network with "
            "dtype float16"
        )
    profile = make_profile(metadata, bounds or {})

    def configure(config: Any) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(known[target], 0)
        if level is not None:
            config.builder_optimization_level = level

    plan = build_plan(package, model, network, metadata, profile, configure=configure)
    return save_plan(
        plan,
        path,
        package=package,
        target=target,
        profile=profile,
        metadata=metadata,
    )


def require_target(package: Any, target: str) -> dict[str, Any]:
    """All targets, of which this must be one.

    Raises:
        RequestError: it is not.
    """
    known = targets(package)
    if target not in known:
        raise RequestError(
            f"export: TensorRT for RTX builds for {', '.join(known)}, got {target!r}"
            + ("; full TensorRT runs on it: leave --rtx out, on that GPU" * (target == "sm_90"))
        )
    return known


def targets(package: Any) -> dict[str, Any]:
    """The architectures that the builder can target, by name."""
    members = package.ComputeCapability.__members__
    return {
        f"sm_{name.removeprefix('SM')}": value
        for name, value in members.items()
        if name.startswith("SM")
    }
