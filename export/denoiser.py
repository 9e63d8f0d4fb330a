"""An exported network as a denoiser: control tensors become the inputs of its graph.

`GraphDenoiser` knows nothing of runtimes: what runs the graph is in the classes built on it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor

from kinetiq.control_tensors import (
    ControlTensors,
    DeviationControl,
    KeyValueBank,
    LoraBank,
    LoraControl,
    MotionBank,
    MotionControl,
    QueryControl,
    SkipControl,
    at_site,
)
from kinetiq.denoiser import NO_CONTROLS, Watched
from kinetiq.errors import CheckpointError, RequestError, ShapeError
from kinetiq.export.metadata import (
    NetworkMetadata,
    TensorInfo,
    level_size,
    level_tokens,
    tap_level,
)
from kinetiq.export.nodes import KINDS
from kinetiq.families import SiteKind
from kinetiq.taps import DEFAULT_TAP

CHANNELS = "feature_channels"
"""The input that says which channels of a tap are chosen."""

_Marks = tuple[int, dict[tuple[Any, str], tuple[int, int]]]
"""Of banks: the frames that they were asked for, and what each of their tensors was."""


class GraphDenoiser(ABC):
    """A `kinetiq.denoiser.Denoiser` whose network is an exported graph.

    Args:
        metadata: of the network.
        where: what messages call it, such as "onnxruntime".
        device: where inputs are to be.
    """

    most_rows: int | None = None
    least: Mapping[str, int] = MappingProxyType({})
    """By name of an axis of banks, the fewest that the graph takes, where that is more than one."""

    def __init__(self, metadata: NetworkMetadata, where: str, device: torch.device) -> None:
        self.metadata = metadata
        self.multiple = metadata.multiple
        self.family = metadata.family_of()
        self.sites = metadata.sites
        self.device = device
        self._where = where
        self._dtype: torch.dtype = getattr(torch, metadata.precision)
        self._infos = {tensor.name: tensor for tensor in metadata.inputs}
        self._kept: dict[str, tuple[_Marks, object, dict[str, Tensor]]] = {}  # of the last banks

    @abstractmethod
    def run(self, inputs: Mapping[str, Tensor], kinds: frozenset[str], output: str) -> Tensor:
        """One output of the graph.

        Args:
            inputs: by name; those of `wanted(kinds)`, of the graph's types, contiguous, on
                `device`. Which channels of a tap are chosen is among them for "motion" alone.
            kinds: the kinds of control that are among them.
            output: "prediction", "features" or "motion"; `output_shape` says its shape.
        """

    def wanted(self, kinds: Collection[str]) -> frozenset[str]:
        """Which kinds of control `run` is to be given, where these are used; at least these."""
        return frozenset(kinds)

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        controls: ControlTensors = NO_CONTROLS,
    ) -> Tensor:
        """Return the network's output; see `kinetiq.denoiser.Denoiser.predict`.

        Raises:
            RequestError: the exported network does not carry a kind of control, the engine was
                built without a prediction, or gradients are wanted.
            ShapeError: an input does not fit the network.
        """
        return self._run(latents, timesteps, text, controls, "prediction")

    def features(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        controls: ControlTensors = NO_CONTROLS,
        tap: str = DEFAULT_TAP,
    ) -> Tensor:
        """Return the output of one block; see `kinetiq.denoiser.Denoiser.features`.

        Raises:
            RequestError: the network was exported without this tap, or gradients are wanted.
        """
        self._require_tap(tap)
        return self._run(latents, timesteps, text, controls, "features")

    def motion(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        controls: ControlTensors,
        tap: str,
        channels: Tensor,
    ) -> Tensor:
        """Return what moves in some channels of the output of one block.

        Args:
            latents: as in `predict`, and so are those up to `tap`.
            timesteps: likewise.
            text: likewise.
            controls: likewise.
            tap: the block.
            channels: int64 [K], of its output.

        Returns:
            [rows, frames, tokens, K]; see `kinetiq.kernels.motion_feature`.

        Raises:
            RequestError: the network was exported without this tap, or gradients are wanted.
            ShapeError: an input does not fit the network, or the block has not all the channels;
                on a GPU their values are not looked at.
        """
        self._require_tap(tap)
        self._require_channels(channels, tap)
        return self._run(latents, timesteps, text, controls, "motion", {CHANNELS: channels})

    def keeping(
        self,
        sites: Collection[int],  # noqa: ARG002  the protocol fixes the signature, here and below
        rows: Tensor,  # noqa: ARG002
    ) -> AbstractContextManager[Mapping[int, KeyValueBank]]:
        """Refuse; see `kinetiq.denoiser.Denoiser.keeping`.

        Raises:
            RequestError: always; an exported network does not return keys and values.
        """
        self._refuse("keeping keys and values of sites", "load the model with backend='eager'")

    def watching(
        self,
        rows: Tensor,  # noqa: ARG002
        words: Tensor,  # noqa: ARG002
        tap: str,  # noqa: ARG002
    ) -> AbstractContextManager[Watched]:
        """Refuse; see `kinetiq.denoiser.Denoiser.watching`.

        Raises:
            RequestError: always; an exported network does not return what it attends to.
        """
        self._refuse("watching words of the prompt", "load the model with backend='eager'")

    def kinds_of(self, controls: ControlTensors) -> frozenset[str]:
        """The kinds of control that are present.

        Raises:
            RequestError: the exported network does not carry one of them.
        """
        present = {part.name for part in fields(controls) if _is_present(controls, part.name)}
        if controls.query is not None and controls.query.reduced is not None:
            present.add("reduced")
        missing = sorted(present.difference(self.metadata.controls))
        if missing:
            self._refuse(f"the control {', '.join(missing)}", self.advise_on(missing))
        return frozenset(present)

    def advise_on(self, missing: Sequence[str]) -> str:
        """What to do where the network does not carry these kinds of control."""
        if not set(missing) <= set(KINDS):
            return "no exported network carries it; load the model with backend='eager'"
        return (
            f"the network was exported with {', '.join(self.metadata.controls) or 'none'}; export "
            f"it with --controls that include {', '.join(missing)}, or load the model with "
            "backend='eager'"
        )

    def check_shapes(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> None:
        """Raise a `ShapeError` unless the network can take these."""
        given = {"latents": latents, "timesteps": timesteps, "text": text}
        for name, tensor in given.items():
            axes = self._infos[name].axes
            wrong = len(axes) != tensor.ndim or any(
                isinstance(axis, int) and axis != size
                for axis, size in zip(axes, tensor.shape, strict=True)
            )
            if wrong or 0 in tensor.shape:
                raise ShapeError(
                    f"{self._where}: {name} must be [{', '.join(map(str, axes))}], "
                    f"got {list(tensor.shape)}"
                )
        if not len(latents) == len(timesteps) == len(text):
            raise ShapeError(
                f"{self._where}: latents, timesteps and text must have as many rows, got "
                f"{len(latents)}, {len(timesteps)} and {len(text)}"
            )
        positions, frames = self.metadata.positions, latents.shape[2]
        if positions is not None and frames > positions:
            raise ShapeError(
                f"{self._where}: latents must have at most {positions} frames, of which the "
                f"network knows the positions, got {frames}"
            )
        if latents.shape[3] % self.multiple or latents.shape[4] % self.multiple:
            raise ShapeError(
                f"{self._where}: height and width of latents must be multiples of {self.multiple}, "
                f"got {latents.shape[3]}x{latents.shape[4]}; ask for another size, or load the "
                "model with backend='eager'"
            )

    def inputs_of(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        controls: ControlTensors,
        kinds: Collection[str],
    ) -> dict[str, Tensor]:
        """The graph's inputs, neutral for those of `kinds` that `controls` have not."""
        own = {"latents": latents, "timesteps": timesteps, "text": text}
        sizes = _Sizes(latents, len(self.sites))
        if "query" in kinds:
            own |= self._query(controls.query, sizes, reduced="reduced" in kinds)
        if "deviation" in kinds:
            own |= self._deviation(controls.deviation, sizes)
        if "motion" in kinds:
            own |= self._motion(controls.motion, sizes)
        if "lora" in kinds:
            own |= self._lora(controls.lora, sizes)
        if "skip" in kinds:
            own |= self._skip(controls.skip, sizes)
        return {  # an engine lacks what none of its outputs depends on
            name: tensor.to(self.device, getattr(torch, self._infos[name].dtype)).contiguous()
            for name, tensor in own.items()
            if name in self._infos
        }

    def output_shape(self, output: str, inputs: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The shape of an output for these inputs."""
        rows, _, frames, height, width = inputs["latents"].shape
        axes = {info.name: info.axes for info in self.metadata.outputs}[output]
        if self.metadata.tap is None or output == "prediction":
            return (rows, int(axes[1]), frames, height, width)
        level = tap_level(self.metadata.tap, self.metadata.levels)
        if output == "motion":
            return (rows, frames, level_tokens(height, width, level), len(inputs[CHANNELS]))
        return (rows, frames, *level_size(height, width, level), int(axes[4]))

    def _run(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        controls: ControlTensors,
        output: str,
        others: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        if output not in (known := [info.name for info in self.metadata.outputs]):
            self._refuse(
                f"the output {output}",
                f"it was built with {', '.join(known)}; build it with outputs that include "
                f"{output}",
            )
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in _tensors_in((latents, timesteps, text, controls))
        ):
            self._refuse(f"gradients of {output}", "load the model with backend='eager'")
        self.check_shapes(latents, timesteps, text)
        kinds = self.wanted(self.kinds_of(controls))
        inputs = self.inputs_of(latents, timesteps, text, controls, kinds)
        given = {name: tensor.to(self.device) for name, tensor in others.items()}
        return self.run({**inputs, **given}, kinds, output)

    def _require_tap(self, tap: str) -> None:
        if self.metadata.tap != tap:
            self._refuse(
                f"features of {tap}",
                f"the network was exported with {self.metadata.tap or 'no tap'}; "
                f"export it with --tap {tap}",
            )

    def _refuse(self, what: str, advice: str) -> NoReturn:
        raise RequestError(f"{self._where}: must be asked for what it can do, got {what}; {advice}")

    def _require_inside(self, what: str, index: Tensor, count: int, advice: str = "") -> None:
        """Raise a `ShapeError` unless indices are some of `count`; on a GPU none are looked at."""
        if index.device.type != "cpu":  # the look would wait for the GPU at every step
            return
        least, most = (int(end) for end in index.aminmax())
        if least < 0 or most >= count:
            raise ShapeError(
                f"{self._where}: {what} must be from 0 to {count - 1}, got {least} to {most}"
                f"{advice}"
            )

    def _require_channels(self, channels: Tensor, tap: str) -> None:
        """Raise a `ShapeError` unless these are channels of a block's output."""
        if channels.dtype != torch.int64 or channels.ndim != 1 or not len(channels):
            raise ShapeError(
                f"{self._where}: channels must be int64 [K], one at the least, got "
                f"{str(channels.dtype).removeprefix('torch.')} {list(channels.shape)}; give the "
                f"numbers of channels of {tap} in such a tensor"
            )
        axes = {info.name: info.axes for info in self.metadata.outputs}["features"]
        advice = f"; choose among the {axes[-1]} channels of {tap}"
        self._require_inside("channels", channels, int(axes[-1]), advice)

    def _named(self, prefix: str) -> dict[str, TensorInfo]:
        return {name: info for name, info in self._infos.items() if name.startswith(prefix)}

    def _masks(self, prefix: str, mask: Tensor, sizes: "_Sizes") -> dict[str, Tensor]:
        """A mask [rows, frames or 1, h or 1, w or 1] at each level, [rows, frames, tokens]."""
        out = {}
        for name in self._named(f"{prefix}."):
            tokens = level_tokens(*sizes.space, int(name.rpartition(".")[2]))
            at_level = mask.flatten(2) if mask.shape[-1] == 1 else at_site(mask, tokens)
            out[name] = at_level.expand(sizes.rows, sizes.frames, tokens)
        return out

    def _query(
        self, control: QueryControl | None, sizes: "_Sizes", *, reduced: bool
    ) -> dict[str, Tensor]:
        blend, row = sizes.full(0.0), sizes.own_rows()
        kept = sizes.full(0.0)
        if control is not None:
            blend, row = control.blend.float(), control.row
            if control.reduced is not None:
                kept = control.reduced.float()
        self._require_inside("query_row", row, sizes.rows)
        wide = blend if blend.ndim == 4 else blend[:, None, None, None]
        return {
            "query_row": row,
            **self._masks("query_blend", wide, sizes),
            **({"query_reduced": kept} if reduced else {}),
        }

    def _deviation(self, control: DeviationControl | None, sizes: "_Sizes") -> dict[str, Tensor]:
        if control is None:
            control = DeviationControl(
                row=sizes.own_rows(),
                blend=sizes.full(0.0).expand(sizes.sites, -1),
                parts=sizes.full(0.0)[:, None].expand(-1, 3),
            )
        self._require_inside("deviation_row", control.row, sizes.rows)
        region = control.region
        wide = sizes.full(1.0)[:, None, None, None] if region is None else region.float()
        return {
            "deviation_row": control.row,
            "deviation_blend": control.blend,
            "deviation_parts": control.parts,
            **self._masks("deviation_region", wide, sizes),
        }

    def _motion(self, control: MotionControl | None, sizes: "_Sizes") -> dict[str, Tensor]:
        given = {} if control is None else control.banks
        for site, bank in given.items():
            self._require_bank(site, bank, sizes)
        slots = [_count_slots(bank) for bank in given.values()]
        banks = self._remembered(
            "motion", given, sizes.frames, lambda: self._motion_banks(given, sizes.frames)
        )
        if control is None or not any(slots):  # a motion may have no part that acts
            return {"motion_slot": sizes.slots(), "motion_scale": sizes.full(0.0), **banks}
        self._require_inside("motion_slot", control.slot, max(slots))
        return {"motion_slot": control.slot, "motion_scale": control.scale, **banks}

    def _require_bank(self, site: int, bank: MotionBank, sizes: "_Sizes") -> None:
        """Raise unless a bank is one of a temporal site, for clips of these sizes."""
        known = dict(enumerate(self.sites)).get(site)
        if known is None or known.kind is not SiteKind.TEMPORAL:
            temporal = [n for n, one in enumerate(self.sites) if one.kind is SiteKind.TEMPORAL]
            raise CheckpointError(
                f"{self._where}: a motion must be at temporal sites of the network, "
                f"{', '.join(map(str, temporal))} of its {len(self.sites)}, got site {site}"
                f"{'' if known is None else f', {known.name}'}; make its banks for this network"
            )
        projected = bank.projected_query is not None or bank.projected_key is not None
        if (bank.query_key is None and projected) or (
            bank.value is None and bank.projected_value is not None
        ):
            raise RequestError(
                f"{self._where}: a motion's embedding must be given beside its projections, which "
                f"an exported network makes itself, got projections alone at site {site}"
            )
        for part in ("query_key", "value"):
            given, info = getattr(bank, part), self._infos.get(f"motion.{known.name}.{part}")
            if given is None or info is None:  # an engine lacks what none of its outputs reads
                continue
            places = str(info.axes[2]).removeprefix("motion_tokens_")
            tokens = [level_tokens(*sizes.space, int(places))] if part == "value" else []
            wanted = [sizes.frames, *tokens, info.axes[3]]
            if list(given.shape[1:]) != wanted or not len(given):
                height, width = sizes.space
                raise ShapeError(
                    f"{self._where}: {part} of a motion at {known.name} must be "
                    f"[slots, {', '.join(map(str, wanted))}] beside latents of {sizes.frames} "
                    f"frames of {height}x{width}, got {list(given.shape)}; make its banks for the "
                    "size of the clip"
                )

    def _motion_banks(self, given: Mapping[int, MotionBank], frames: int) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for site, bank in given.items():
            name = self.sites[site].name
            if bank.query_key is not None:
                parts[f"motion.{name}.query_key"] = bank.query_key.unsqueeze(2)
            if bank.value is not None:
                parts[f"motion.{name}.value"] = bank.value
        infos = self._named("motion.")
        parts = {name: part for name, part in parts.items() if name in infos}
        # All that have an axis in common must agree on it; zeros of one token suffice alone.
        sizes = {str(infos[name].axes[2]): part.shape[2] for name, part in parts.items()}
        slots = max(self.least.get("motion_slots", 1), *map(len, parts.values()), 1)
        return {
            name: self._own(parts[name])
            if name in parts and len(parts[name]) == slots
            else self._filled(
                (slots, frames, sizes.get(str(info.axes[2]), 1), info.axes[3]), parts.get(name)
            )
            for name, info in infos.items()
        }

    def _lora(self, control: LoraControl | None, sizes: "_Sizes") -> dict[str, Tensor]:
        given = {} if control is None else control.banks
        banks = self._remembered("lora", given, 0, lambda: self._lora_banks(given))
        if control is None or not given:
            return {"lora_slot": sizes.slots(), "lora_scale": sizes.full(0.0), **banks}
        slots = max(len(bank.down) for bank in given.values())
        self._require_inside("lora_slot", control.slot, slots)
        return {"lora_slot": control.slot, "lora_scale": control.scale, **banks}

    def _lora_banks(self, given: Mapping[str, LoraBank]) -> dict[str, Tensor]:
        blocks = {
            site.name.rpartition(".")[0] for site in self.sites if site.kind is SiteKind.TEMPORAL
        }
        # One that an engine lacks, since no output depends on it, is in a temporal block all the
        # same, or is its transformer's.
        unknown = sorted(
            path
            for path in given
            if f"lora.{path}.down" not in self._infos
            and not any(path.startswith(f"{block}.") for block in blocks)
        )
        if unknown:
            raise CheckpointError(
                f"{self._where}: a LoRA must change projections of the network, got {unknown[0]}"
            )
        for path, bank in given.items():
            self._require_lora(path, bank)
        sizes = {"lora_slots": 1, "lora_rank": 1, **self.least}
        for bank in given.values():
            sizes["lora_slots"] = max(sizes["lora_slots"], len(bank.down))
            sizes["lora_rank"] = max(sizes["lora_rank"], bank.down.shape[1])
        out = {}
        for name, info in self._named("lora.").items():
            path, _, side = name.removeprefix("lora.").rpartition(".")
            shape = tuple(sizes.get(str(axis), axis) for axis in info.axes)
            out[name] = self._filled(shape, getattr(given[path], side) if path in given else None)
        return out

    def _require_lora(self, path: str, bank: LoraBank) -> None:
        """Raise a `ShapeError` unless both sides of a bank fit the projection and each other."""
        down, up = (self._infos.get(f"lora.{path}.{side}") for side in ("down", "up"))
        if down is None or up is None:
            return
        slots, rank = (*bank.down.shape, 0, 0)[:2]
        if (
            not slots * rank
            or list(bank.down.shape) != [slots, rank, down.axes[2]]
            or list(bank.up.shape) != [slots, up.axes[1], rank]
        ):
            raise ShapeError(
                f"{self._where}: a LoRA of {path} must be down [slots, rank, {down.axes[2]}] and "
                f"up [slots, {up.axes[1]}, rank], got {list(bank.down.shape)} and "
                f"{list(bank.up.shape)}; make its banks for this network"
            )

    def _remembered(
        self,
        kind: str,
        banks: Mapping[Any, MotionBank | LoraBank],
        frames: int,
        make: Callable[[], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Inputs that are made of banks, made again only for others: all steps have the same."""
        held = {
            (place, part.name): tensor
            for place, bank in banks.items()
            for part in fields(bank)
            if (tensor := getattr(bank, part.name)) is not None
        }
        marks = frames, {place: _mark(tensor) for place, tensor in held.items()}
        known = self._kept.get(kind)
        if known is None or known[0] != marks:
            # Not of inference mode, so that it can be seen at every step that they are the same.
            with torch.inference_mode(False), torch.no_grad():
                known = self._kept[kind] = (marks, held, make())
        return known[2]

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self._dtype).contiguous()

    def _skip(self, control: SkipControl | None, sizes: "_Sizes") -> dict[str, Tensor]:
        if control is not None:
            return {"skip_source": control.source, "skip_gain": control.gain}
        if "skip_gain" not in self._infos:
            return {}
        count = int(self._infos["skip_gain"].axes[0])
        return {
            "skip_source": sizes.full(0.0).expand(count, -1),
            "skip_gain": sizes.full(1.0).expand(count, -1),
        }

    def _filled(self, shape: tuple[Any, ...], part: Tensor | None) -> Tensor:
        """A part of a bank, filled up with zeros, which add nothing."""
        filled = torch.zeros(shape, dtype=self._dtype, device=self.device)
        if part is not None:
            filled[tuple(slice(size) for size in part.shape)] = part
        return filled


class _Sizes:
    """The sizes of a batch, and tensors of them that steer nothing."""

    def __init__(self, latents: Tensor, sites: int) -> None:
        self.rows, _, self.frames, *_ = latents.shape
        self.space: tuple[int, int] = (latents.shape[3], latents.shape[4])
        self.sites = sites
        self._device = latents.device

    def full(self, value: float) -> Tensor:
        """[rows], float32."""
        return torch.full((self.rows,), value, device=self._device)

    def slots(self) -> Tensor:
        """[rows], no slot."""
        return torch.zeros(self.rows, dtype=torch.int64, device=self._device)

    def own_rows(self) -> Tensor:
        """[sites, rows], under which every row uses its own."""
        return torch.arange(self.rows, device=self._device).repeat(self.sites, 1)


def _count_slots(bank: MotionBank) -> int:
    """Slots of a site's bank, 0 where it has no part."""
    return max((len(part) for part in (bank.query_key, bank.value) if part is not None), default=0)


def _mark(tensor: Tensor) -> tuple[int, int]:
    """What tells a tensor that is still there from any other, and from what it was before.

    Whether one of inference mode was changed in place cannot be known.
    """
    return id(tensor), -1 if tensor.is_inference() else tensor._version  # noqa: SLF001  no public way


def _tensors_in(part: object) -> Iterator[Tensor]:
    """All tensors of controls, and of what holds them."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, Mapping):
        for value in part.values():
            yield from _tensors_in(value)
    elif isinstance(part, tuple):
        for value in part:
            yield from _tensors_in(value)
    elif is_dataclass(part):
        for one in fields(part):
            yield from _tensors_in(getattr(part, one.name))


def _is_present(controls: ControlTensors, name: str) -> bool:
    part = getattr(controls, name)
    return part is not None and not (isinstance(part, tuple) and not part)
