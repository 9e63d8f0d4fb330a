"""Building an engine from an exported network, by TensorRT or TensorRT for RTX."""

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kinetiq import __version__
from kinetiq.errors import WorkError
from kinetiq.export.engine_file import FORMAT, EngineFile, EngineRecord, write_engine
from kinetiq.export.engine_log import make_log
from kinetiq.export.engine_profile import Profile
from kinetiq.export.gpu import Gpu
from kinetiq.export.metadata import NetworkMetadata

FUSED = "_gemm_mha_v2"  # in the name of a kernel that does a whole attention
_LEAST_FUSED = 16  # columns of a head; fewer, and float32, have no kernel that does it all
_FUSED_LAYER = re.compile(rf"^Name: \S*{FUSED}", re.MULTILINE)


@dataclass(frozen=True)
class Plan:
    """What a build made.

    Args:
        data: the engine.
        attentions: how many attentions must be one kernel each.
        fused: how many kernels of the engine do a whole attention; None if the build did not say.
    """

    data: bytes
    attentions: int
    fused: int | None


def build_plan(
    package: Any,
    model: Any,
    path: str | os.PathLike[str],
    metadata: NetworkMetadata,
    profile: Profile,
    *,
    flags: int = 0,
    configure: Callable[[Any], None] | None = None,
) -> Plan:
    """Parse a network and build it, strongly typed: every tensor keeps the type that it has there.

    Args:
        package: `tensorrt` or `tensorrt_rtx`.
        model: the `onnx.ModelProto`.
        path: where it came from; weights outside it lie there.
        metadata: of the network.
        profile: the sizes that the engine takes.
        flags: of the network, beside being strongly typed.
        configure: is given the builder's configuration before the build; None: it is as it is.

    Raises:
        WorkError: the network cannot be parsed or built; the message has the reasons given.
    """
    log = make_log(package)
    builder = package.Builder(log)
    if hasattr(package.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):  # 11 knows no other
        flags |= 1 << int(package.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = package.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString(), str(path)):
        reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise WorkError(f"engine: {path} must be parsed by {package.__name__}: {reasons}")
    attentions = allow_parts(package, network)
    config = builder.create_builder_config()
    config.profiling_verbosity = package.ProfilingVerbosity.DETAILED  # so that layers are listed
    if metadata.precision == "float32":  # which TensorRT multiplies in ten bits unless it is told
        config.clear_flag(package.BuilderFlag.TF32)
    add_profile(builder, config, profile, metadata, f"engine: {path}")
    if configure is not None:
        configure(config)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise WorkError(
            f"engine: {package.__name__} must build {path}: {'; '.join(log.errors[-3:])}"
        )
    return Plan(bytes(plan), attentions, count_fused(log.layers))


def add_profile(
    builder: Any, config: Any, profile: Profile, metadata: NetworkMetadata, where: str
) -> None:
    """Tell the builder the sizes that the engine is to take.

    Raises:
        WorkError: the builder refuses them.
    """
    bounds = builder.create_optimization_profile()
    for tensor in metadata.inputs:
        try:
            bounds.set_shape(tensor.name, *profile.shapes(tensor))
        except (ValueError, TypeError, RuntimeError) as error:  # as its bindings like
            raise WorkError(
                f"{where}: the builder must take the bounds of {tensor.name}, "
                f"{profile.shapes(tensor)}, and refuses them: {error}; ask for others"
            ) from error
    if config.add_optimization_profile(bounds) < 0:
        raise WorkError(
            f"{where}: the builder must take the bounds of the profile, and refuses them; ask for "
            "others"
        )


def save_plan(
    plan: Plan,
    path: str | os.PathLike[str],
    *,
    package: Any,
    target: str,
    profile: Profile,
    metadata: NetworkMetadata,
    plugins: Collection[str] = (),
    route: str | None = None,
    left_out: Mapping[str, str] = MappingProxyType({}),
    gpu: Gpu | None = None,
    vouched: bool = True,
) -> EngineFile:
    """Write what was built, and for what; see `EngineRecord` and `write_engine`."""
    record = EngineRecord(
        format=FORMAT,
        kinetiq=__version__,
        runtime=package.__name__.replace("_", "-"),
        version=package.__version__,
        target=target,
        profile=profile,
        network=metadata,
        plugins=tuple(sorted(plugins)),
        route=route,
        attentions=plan.attentions,
        fused=plan.fused,
        left_out=dict(left_out),
        gpu=gpu,
    )
    return write_engine(path, plan.data, record, vouched=vouched)


def allow_parts(package: Any, network: Any) -> int:
    """Let attentions that no kernel does alone be several; returns how many others there are.

    Those must be one kernel each, or the build fails: nothing becomes slow in silence.
    """
    count = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type != package.LayerType.ATTENTION_INPUT:
            continue
        layer.__class__ = package.IAttentionInputLayer  # the binding returns the base class
        query = layer.attention.get_input(0)
        d = query.shape[-1]
        if query.dtype == package.float32 or 0 <= d < _LEAST_FUSED:
            layer.attention.decomposable = True
        else:
            count += 1
    return count


def count_fused(layers: str) -> int | None:
    """Kernels that do a whole attention, in a build's list of layers; None where it has none."""
    return len(_FUSED_LAYER.findall(layers)) if layers else None
