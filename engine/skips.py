"""Skip connections as data: where each row's start, and how strong they are.

A skip connection carries what a down block has computed to the up block of the same resolution.
It starts behind a temporal transformer; a row may take it from before that one instead, so that
what the temporal transformer adds reaches the decoder by one way only (the appearance highway of
"Separate Motion from Appearance", arXiv:2501.16714, sec. 3).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kinetiq.attention import Signal
from kinetiq.families import Family, temporal_transformers


@dataclass(frozen=True)
class Skip:
    """One skip connection.

    Args:
        writer: module path of what it starts behind.
        temporal: module path of the temporal transformer that is `writer`, or None.
        reader: module path of the ResNet block that reads it.
        channels: how many it carries, the last of the reader's input.
    """

    writer: str
    temporal: str | None
    reader: str
    channels: int


def list_skips(network: Any, family: Family) -> tuple[Skip, ...]:
    """All skip connections of a network, in the order in which they are written."""
    temporal = set(temporal_transformers(network, family))
    written: list[tuple[str, str | None, int]] = [("conv_in", None, network.conv_in.out_channels)]
    for number, block in enumerate(network.down_blocks):
        for layer, resnet in enumerate(block.resnets):
            own = [
                f"down_blocks.{number}.{folder}.{layer}"
                for folder in family.temporal_folders
                if f"down_blocks.{number}.{folder}.{layer}" in temporal
            ]
            last = own[0] if own else None
            writer = last or f"down_blocks.{number}.resnets.{layer}"
            written.append((writer, last, resnet.out_channels))
        if block.downsamplers is not None:
            name = f"down_blocks.{number}.downsamplers.0"
            written.append((name, None, block.downsamplers[0].out_channels))
    readers = [
        f"up_blocks.{number}.resnets.{layer}"
        for number, block in enumerate(network.up_blocks)
        for layer in range(len(block.resnets))
    ]
    return tuple(
        Skip(writer, last, reader, channels)
        for (writer, last, channels), reader in zip(written, reversed(readers), strict=True)
    )


def attach_skips(network: nn.Module, skips: tuple[Skip, ...], signal: Signal) -> list[Any]:
    """Let each reader see its skip as `SkipControl` says; returns handles that `remove` it."""
    return [
        network.get_submodule(skip.reader).register_forward_pre_hook(_reader(index, skip, signal))
        for index, skip in enumerate(skips)
    ]


def _reader(index: int, skip: Skip, signal: Signal) -> Any:
    def reroute(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        control = signal.controls.skip
        if control is None:
            return None
        joined: Tensor = given[0]
        own = joined[:, joined.shape[1] - skip.channels :].unflatten(0, (-1, signal.frames))
        if skip.temporal is not None:
            source = _per_row(control.source[index], own)
            before = signal.before_temporal[skip.temporal].unflatten(0, (-1, signal.frames))
            own = torch.lerp(own, before, source)
        own = (own * _per_row(control.gain[index], own)).flatten(0, 1)
        hidden = joined[:, : joined.shape[1] - skip.channels]
        return (torch.cat([hidden, own], dim=1), *given[1:])

    return reroute


def _per_row(factor: Tensor, like: Tensor) -> Tensor:
    return factor.to(like.dtype).reshape(-1, *([1] * (like.ndim - 1)))
