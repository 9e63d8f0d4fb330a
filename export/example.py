"""Inputs that put an exported network to the test: every control acts, each row in its own way.

They are drawn from a seed alone, so that two runs, or two back ends, are given the same.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from kinetiq.control_tensors import (
    ControlTensors,
    DeviationControl,
    LoraBank,
    LoraControl,
    MotionBank,
    MotionControl,
    QueryControl,
    SkipControl,
)
from kinetiq.export.metadata import NetworkMetadata, level_tokens
from kinetiq.families import SiteKind

_Bank = TypeVar("_Bank", MotionBank, LoraBank)
_GAIN = 0.3  # of what learned motions add, beside activations of order one


@dataclass(frozen=True)
class ExampleShape:
    """Sizes of a batch.

    Args:
        rows: of the batch.
        frames: of each row.
        height: of latents.
        width: likewise.
        text_tokens: of each prompt.
    """

    rows: int
    frames: int
    height: int
    width: int
    text_tokens: int


@dataclass(frozen=True)
class BankSizes:
    """Sizes of the banks of motions and LoRAs.

    Args:
        motion_slots: motions, of which the first is none.
        lora_slots: LoRAs, likewise.
        lora_rank: of each of them.
    """

    motion_slots: int = 3
    lora_slots: int = 3
    lora_rank: int = 2


@dataclass(frozen=True)
class Example:
    """What a denoiser is given for one prediction."""

    latents: Tensor
    timesteps: Tensor
    text: Tensor
    controls: ControlTensors


def cast_example(example: Example, dtype: torch.dtype) -> Example:
    """The same with what the network computes with in another type."""
    motion, lora = example.controls.motion, example.controls.lora
    if motion is not None:
        banks = {site: _cast(bank, dtype) for site, bank in motion.banks.items()}
        motion = replace(motion, banks=banks)
    if lora is not None:
        lora = replace(lora, banks={path: _cast(bank, dtype) for path, bank in lora.banks.items()})
    return Example(
        latents=example.latents.to(dtype),
        timesteps=example.timesteps,
        text=example.text.to(dtype),
        controls=replace(example.controls, motion=motion, lora=lora),
    )


def _cast(bank: _Bank, dtype: torch.dtype) -> _Bank:
    return replace(bank, **{part.name: getattr(bank, part.name).to(dtype) for part in fields(bank)})


def example_shapes(metadata: NetworkMetadata) -> tuple[ExampleShape, ...]:
    """Three shapes of a network: one row, several unlike ones, and one that is not square."""
    side = metadata.multiple
    return (
        ExampleShape(1, 2, 2 * side, 2 * side, 4),
        ExampleShape(3, 5, 2 * side, 3 * side, 7),
        ExampleShape(2, 8, 4 * side, side, 11),
    )


def make_example(
    network: Any,
    metadata: NetworkMetadata,
    shape: ExampleShape,
    kinds: Collection[str] = (),
    *,
    regions: bool = True,
    seed: int = 0,
    banks: BankSizes = BankSizes(),
) -> Example:
    """Draw latents, text and controls.

    Args:
        network: whose projections give a motion's banks their form.
        metadata: of its export.
        shape: sizes of the batch.
        kinds: of control, as in `kinetiq.export.nodes.KINDS`.
        regions: whether injections act on parts of the picture, by masks.
        seed: of the random numbers.
        banks: sizes of the banks.
    """
    draw = _Draw(network, metadata, shape, seed, banks)
    sizes = {tensor.name: tensor.axes for tensor in metadata.inputs}
    return Example(
        latents=draw.normal(
            shape.rows, int(sizes["latents"][1]), shape.frames, shape.height, shape.width
        ),
        timesteps=torch.linspace(17.0, 961.0, shape.rows, device=network.device),
        text=draw.normal(shape.rows, shape.text_tokens, int(sizes["text"][2])),
        controls=ControlTensors(
            query=draw.query(regions, "reduced" in kinds) if "query" in kinds else None,
            deviation=draw.deviation(regions) if "deviation" in kinds else None,
            motion=draw.motion() if "motion" in kinds else None,
            lora=draw.lora() if "lora" in kinds else None,
            skip=draw.skip(int(sizes["skip_gain"][0])) if "skip" in kinds else None,
        ),
    )


class _Draw:
    """Random controls of one batch."""

    def __init__(
        self,
        network: Any,
        metadata: NetworkMetadata,
        shape: ExampleShape,
        seed: int,
        banks: BankSizes,
    ) -> None:
        self._banks = banks
        self._network, self._metadata, self._shape = network, metadata, shape
        self._generator = torch.Generator().manual_seed(seed)
        self._device, self._dtype = network.device, network.dtype

    def normal(self, *size: int) -> Tensor:
        """Standard normal numbers of the network's type."""
        drawn = torch.randn(size, generator=self._generator)
        return drawn.to(self._device, self._dtype)

    def _uniform(self, *size: int) -> Tensor:
        return torch.rand(size, generator=self._generator).to(self._device)

    def _rows(self) -> Tensor:
        """[sites, rows]; each row reads another one, at every second site the next but one."""
        rows, sites = self._shape.rows, len(self._metadata.sites)
        step = 1 + torch.arange(sites)[:, None] % 2
        return ((torch.arange(rows) + step) % rows).to(self._device)

    def _region(self) -> Tensor:
        shape = self._shape
        return self._uniform(shape.rows, shape.frames, shape.height, shape.width)

    def _slot(self, slots: int) -> Tensor:
        return ((torch.arange(self._shape.rows) + 1) % slots).to(self._device)

    def query(self, regions: bool, reduced: bool) -> QueryControl:
        blend = self._region() if regions else self._uniform(self._shape.rows)
        kept = torch.arange(self._shape.rows, device=self._device) % 2 == 0
        return QueryControl(self._rows(), blend, kept if reduced else None)

    def deviation(self, regions: bool) -> DeviationControl:
        rows, sites = self._shape.rows, len(self._metadata.sites)
        return DeviationControl(
            self._rows(),
            self._uniform(sites, rows),
            self._uniform(rows, 3),
            self._region() if regions else None,
        )

    def motion(self) -> MotionControl:
        banks = {}
        for number, site in enumerate(self._metadata.sites):
            if site.kind is SiteKind.TEMPORAL and number % 3:  # some sites have none
                banks[number] = self._bank(site.name, site.width, self._level(site.name))
        slot = self._slot(self._banks.motion_slots)
        return MotionControl(slot, 0.5 + self._uniform(self._shape.rows), banks)

    def _bank(self, path: str, width: int, level: int) -> MotionBank:
        shape = self._shape
        tokens = level_tokens(shape.height, shape.width, level)
        slots = self._banks.motion_slots
        query_key = _GAIN * self.normal(slots, shape.frames, width)
        value = _GAIN * self.normal(slots, shape.frames, tokens, width)
        query_key[0], value[0] = 0, 0
        attention = self._network.get_submodule(path)

        def through(projection: str, part: Tensor) -> Tensor:
            weight: Tensor = getattr(attention, projection).weight
            return part @ weight.T

        with torch.no_grad():
            return MotionBank(
                query_key,
                value,
                through("to_q", query_key),
                through("to_k", query_key),
                through("to_v", value),
            )

    def _level(self, path: str) -> int:
        name = f"motion.{path}.value"
        tokens = next(info.axes[2] for info in self._metadata.inputs if info.name == name)
        return int(str(tokens).rpartition("_")[2])

    def lora(self) -> LoraControl:
        banks, slots, rank = {}, self._banks.lora_slots, self._banks.lora_rank
        names = [info for info in self._metadata.inputs if info.name.startswith("lora.")]
        for down, up in zip(names[::2], names[1::2], strict=True):
            path = down.name.removeprefix("lora.").removesuffix(".down")
            inner, outer = int(down.axes[2]), int(up.axes[1])
            bank = LoraBank(
                self.normal(slots, rank, inner) * inner**-0.5,
                self.normal(slots, outer, rank) * _GAIN,
            )
            bank.up[0] = 0
            banks[path] = bank
        return LoraControl(self._slot(slots), 0.5 + self._uniform(self._shape.rows), banks)

    def skip(self, count: int) -> SkipControl:
        rows = self._shape.rows
        return SkipControl(self._uniform(count, rows), 1 + _GAIN * self._uniform(count, rows))
