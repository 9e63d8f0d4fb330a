"""Measuring, on the GPU at hand, which operators our kernels make faster in an engine."""

import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinetiq.export.engine_profile import Bounds, Profile
from kinetiq.export.engine_runtime import open_engine
from kinetiq.export.engine_source import node_names, read_source
from kinetiq.export.engine_tensorrt import build_engine, find_gpu, load_tensorrt, of_operators
from kinetiq.export.metadata import NetworkMetadata
from kinetiq.export.plugin_choice import OPERATORS, PluginChoice, PluginRecord, measure_choices
from kinetiq.export.plugin_ptx import PLAIN_SHARED, find_route, route_names

_WARMUP, _REPEATS = 5, 20


def tune_plugins(
    network: str | os.PathLike[str],
    *,
    bounds: Mapping[str, Bounds] | None = None,
    controls: Collection[str] | None = None,
    shared_bytes: int = PLAIN_SHARED,
) -> tuple[str, PluginRecord]:
    """Build and time engines of a network, with and without each operator's plugin.

    Args:
        network: an ONNX file of `export_onnx`.
        bounds: of axes by name; engines are timed at the best of each.
        controls: kinds to keep; None: see `engine_tensorrt.build_engine`.
        shared_bytes: of a block, the most that our kernels may take.

    Returns:
        The GPU's architecture, and what was measured on it.

    Raises:
        CheckpointError: the network cannot be used.
        MissingDependencyError: TensorRT or a GPU is missing.
        RequestError: an axis or a control is not one that there is, or no kernel can be compiled
            for this GPU.
        WorkError: an engine without our kernels cannot be built or run.
    """
    package, target = load_tensorrt(), find_gpu()
    find_route(target)
    model, metadata = read_source(network, controls, unusual=("reduced",))
    names = node_names(model)
    options = {"bounds": bounds, "controls": metadata.controls, "shared_bytes": shared_bytes}
    record = measure_choices(
        [operator for operator in OPERATORS if of_operators(names, (operator,))],
        route_names(target),
        functools.partial(_seconds_of, network, options),
        {
            "gpu": torch.cuda.get_device_name(),
            "tensorrt": str(package.__version__),
            "network": metadata.checkpoint,
            "precision": metadata.precision,
        },
    )
    return target, record


def _seconds_of(
    network: str | os.PathLike[str], options: Mapping[str, Any], choice: PluginChoice
) -> float:
    """Seconds of one prediction of an engine that is built for it alone."""
    with tempfile.TemporaryDirectory(prefix="kinetiq-") as folder:
        path = Path(folder) / "tuned.engine"
        made = build_engine(
            network, path, plugins=choice.operators, route=choice.route, vouched=False, **options
        )
        denoiser = open_engine(path, trust=made.checksum)
        given = best_inputs(made.record.network, made.record.profile, denoiser.device)
        return median_seconds(lambda: denoiser.predict(*given))


def best_inputs(
    metadata: NetworkMetadata, profile: Profile, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and text of the sizes that a profile is best at."""
    generator = torch.Generator().manual_seed(0)
    infos = {tensor.name: tensor for tensor in metadata.inputs}

    def draw(name: str) -> Tensor:
        drawn = torch.randn(profile.shapes(infos[name])[1], generator=generator)
        return drawn.to(device, getattr(torch, infos[name].dtype))

    return draw("latents"), draw("timesteps").abs(), draw("text")


def median_seconds(call: Callable[[], object]) -> float:
    """The median of some calls, each waited for, after some that are not timed."""
    seconds = []
    for number in range(_WARMUP + _REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if number >= _WARMUP:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
