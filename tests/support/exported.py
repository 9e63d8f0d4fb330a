"""Exports of tiny networks, made once for each run of the tests."""

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from tiny import NETWORKS

from kinetiq.checkpoint import Checkpoint

if TYPE_CHECKING:
    from kinetiq.export.metadata import NetworkMetadata

TAP = "up_blocks.0"
_SMALL = {  # two levels, attention at the first alone: all kinds of site, quickly exported
    "animatediff": {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    },
    "unet3d": {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    },
}
FAMILIES = tuple(_SMALL)


def small_overrides(family: str) -> dict[str, object]:
    """What the configuration of such a network says in place of that of `tiny`."""
    return dict(_SMALL[family])


def small_checkpoint(family: str, dtype: str = "float32") -> Checkpoint:
    """A model of a family whose network is very small; it has no other parts."""
    import torch

    network = NETWORKS[family](**_SMALL[family]).to(getattr(torch, dtype))
    return Checkpoint(
        name=f"small-{family}",
        path=None,
        family=family,
        unet=network,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        scheduler="DDIMScheduler",
        scheduler_config=MappingProxyType({}),
        identify=lambda: f"{len(family):064x}",
    )


def export_small(folder: Path, family: str, precision: str) -> Path:
    """The export of `small_checkpoint` with all controls and `TAP`, made unless it is there."""
    from kinetiq.export.network import export_onnx

    path = folder / f"{family}-{precision}.onnx"
    if not path.exists():
        export_onnx(small_checkpoint(family), path, dtype=precision, tap=TAP)
    return path


def small_metadata(checkpoint: Checkpoint) -> "NetworkMetadata":
    """What an export of it with all controls and `TAP` would say; nothing is exported."""
    from one_node import make_metadata

    from kinetiq.export.graph import NetworkGraph
    from kinetiq.export.nodes import KINDS
    from kinetiq.taps import find_tap

    with NetworkGraph(checkpoint.unet, KINDS, find_tap(checkpoint.unet, TAP)) as graph:
        inputs, outputs = graph.list_inputs("float32"), graph.list_outputs("float32")
        made = make_metadata(inputs, outputs, "float32", KINDS)
        return replace(made, tap=TAP, levels=graph.levels, sites=graph.sites)
