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
from kinetiq.errors import RequestError
from kinetiq.families import Family, temporal_transformers

HIGHWAYS = ("all", "released")


@dataclass(frozen=True)
class Skip:
    """One skip connection.

    Args:
        writer: module path of what it starts behind.
        temporal: module path of the temporal transformer of a down block that is `writer`, or None.
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
    # A temporal transformer before all blocks belongs to none, so that no highway goes round it.
    first = "transformer_in" if "transformer_in" in temporal else "conv_in"
    written: list[tuple[str, str | None, int]] = [(first, None, network.conv_in.out_channels)]
    for number, block in enumerate(network.down_blocks):
        for layer, resnet in enumerate(block.resnets):
            own = [
                f"down_blocks.{number}.{folder}.{layer}"
                for folder in family.temporal_folders
                if f"down_blocks.{number}.{folder}.{layer}" in temporal
            ]
            last = own[0] if own else None
            convolved = "temp_convs" if hasattr(block, "temp_convs") else "resnets"
            writer = last or f"down_blocks.{number}.{convolved}.{layer}"
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


def choose_highway(
    network: Any, skips: tuple[Skip, ...], which: str
) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """Which skip connections an appearance highway moves, and which it makes stronger.

    "all" is the paper: every skip connection that starts behind a temporal transformer of a down
    block, and no other, starts before it and is made stronger. "released" is its authors' code,
    which names blocks of `UNet3DConditionModel`: of what `up_blocks.1` reads, the two that start
    behind temporal transformers start before them; all three, and the first that `up_blocks.2`
    reads, are made stronger. That is read as: the first up block with spatial attention, and the
    first skip connection of the up block behind it; so it has a meaning for other layouts too.

    Args:
        network: whose skip connections they are.
        skips: from `list_skips`.
        which: "all" or "released".

    Returns:
        For each skip connection, whether it is moved, and whether it is made stronger.

    Raises:
        RequestError: the network has no such skip connection.
    """
    if which == "all":
        moved = tuple(skip.temporal is not None for skip in skips)
        stronger = moved
    else:
        attentive = [
            number for number, block in enumerate(network.up_blocks) if _has_attention(block)
        ]
        first = f"up_blocks.{attentive[0]}." if attentive else None
        after = f"up_blocks.{attentive[0] + 1}.resnets.0" if attentive else None
        read = tuple(first is not None and skip.reader.startswith(first) for skip in skips)
        moved = tuple(
            own and skip.temporal is not None for own, skip in zip(read, skips, strict=True)
        )
        stronger = tuple(own or skip.reader == after for own, skip in zip(read, skips, strict=True))
    if not any(moved):
        where = (
            "a skip connection behind a temporal transformer"
            if which == "all"
            else "an up block with spatial attention that reads from behind a temporal transformer"
        )
        raise RequestError(
            f"highway: {which!r} needs {where}, and this {type(network).__name__} has none; "
            "leave highway out"
        )
    return moved, stronger


def attach_skips(network: nn.Module, skips: tuple[Skip, ...], signal: Signal) -> list[Any]:
    """Let each reader see its skip as `SkipControl` says; returns handles that `remove` it."""
    return [
        network.get_submodule(skip.reader).register_forward_pre_hook(
            _reader(index, skip, signal), with_kwargs=True
        )
        for index, skip in enumerate(skips)
    ]


def _reader(index: int, skip: Skip, signal: Signal) -> Any:
    def reroute(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        control = signal.controls.skip
        if control is None:
            return None
        # Some up blocks of diffusers hand it over by position, others by name.
        joined: Tensor = given[0] if given else named["input_tensor"]
        own = joined[:, joined.shape[1] - skip.channels :].unflatten(0, (-1, signal.frames))
        if skip.temporal is not None:
            source = _per_row(control.source[index], own)
            before = signal.before_temporal[skip.temporal].unflatten(0, (-1, signal.frames))
            own = torch.lerp(own, before, source)
        own = (own * _per_row(control.gain[index], own)).flatten(0, 1)
        hidden = joined[:, : joined.shape[1] - skip.channels]
        rerouted = torch.cat([hidden, own], dim=1)
        if given:
            return (rerouted, *given[1:]), named
        return given, {**named, "input_tensor": rerouted}

    return reroute


def _has_attention(block: nn.Module) -> bool:
    return len(getattr(block, "attentions", ())) > 0


def _per_row(factor: Tensor, like: Tensor) -> Tensor:
    return factor.to(like.dtype).reshape(-1, *([1] * (like.ndim - 1)))
