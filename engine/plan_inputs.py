"""What one prediction is given, as named tensors whose shapes say which plan runs it.

Shapes are rounded up, so that few plans serve many batches: rows by `round_rows`, the slots of
motion embeddings and LoRAs and the ranks of LoRAs to powers of two. A row that is filled up repeats
the last one, and a slot or a rank is zero; neither changes the other rows.

With a motion embedding every temporal site has banks, zero where no motion of the batch has one.
So motions at other sites, and mixtures of them, are the same plan. LoRAs are known by the
projections that they change: all of them would cost a pass over the activations each.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

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
)
from kinetiq.errors import RequestError, ShapeError

Path = tuple[str | int, ...]
KINDS = ("query", "deviation", "motion", "lora", "skip")  # of control that a plan may carry
_EXACT_ROWS = 16
_ROW_AXES: Mapping[Path, int] = {
    ("latents",): 0,
    ("timesteps",): 0,
    ("query", "row"): 1,
    ("query", "blend"): 0,
    ("query", "reduced"): 0,
    ("deviation", "row"): 1,
    ("deviation", "blend"): 1,
    ("deviation", "parts"): 0,
    ("deviation", "region"): 0,
    ("motion", "slot"): 0,
    ("motion", "scale"): 0,
    ("lora", "slot"): 0,
    ("lora", "scale"): 0,
    ("skip", "source"): 1,
    ("skip", "gain"): 1,
}
_BANK_AXES: Mapping[str, tuple[int, ...]] = {"down": (0, 1), "up": (0, 2)}  # others: slots alone
_PROJECTED = ("projected_query", "projected_key", "projected_value")
_RAW = ("query_key", "value")


@dataclass(frozen=True)
class Form:
    """The shape and the type of an input, and how many rows of its axis are filled up.

    Args:
        shape: rounded up.
        dtype: of its elements.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


Forms = Mapping[Path, Form]


@dataclass(frozen=True)
class MotionSite:
    """What the banks of one temporal site are like.

    Args:
        width: channels of what is projected.
        query: channels of the projected queries.
        key: likewise.
        value: likewise.
        tokens: positions, for latents of a height and a width.
    """

    width: int
    query: int
    key: int
    value: int
    tokens: Callable[[int, int], int]


class PlanInput:
    """A tensor of a form that plans read, and what it was filled from last.

    Plans that run in turn may share one, as they do banks: those of a motion embedding are larger
    than most plans, and other numbers of rows read the same.

    Args:
        path: in `list_inputs`.
        form: of the tensor.
        device: where it is.
    """

    def __init__(self, path: Path, form: Form, device: torch.device) -> None:
        self.buffer = torch.zeros(form.shape, dtype=form.dtype, device=device)
        self._path = path
        self._filled: tuple[weakref.ref[Tensor] | None, int] | None = None

    def take(self, given: Tensor | None) -> None:
        """Copy a tensor, or zeros for None, unless it is there already.

        It is if it is the same one as the last time, and PyTorch has counted no change in place.
        Writes through `.data` or by kernels of one's own are not counted.
        """
        if given is None:
            state: tuple[weakref.ref[Tensor] | None, int] = (None, 0)
            same = self._filled == state
        else:
            # Of a tensor of inference mode it cannot be known whether it was changed in place.
            version = -1 if given.is_inference() else given._version  # noqa: SLF001  no public way
            state = (weakref.ref(given), version)
            same = (
                self._filled is not None
                and self._filled[0] is not None
                and self._filled[0]() is given
                and self._filled[1] == version >= 0
            )
        if not same:
            self._filled = None  # what is half written is nobody's
            fill(self.buffer, self._path, given)
            self._filled = state


def round_rows(rows: int) -> int:
    """Rows of the plan that runs so many: exact up to 16, then at most an eighth more."""
    return -(-rows // _step(rows)) * _step(rows)


def _step(rows: int) -> int:
    return 1 << max(0, (rows - 1).bit_length() - _EXACT_ROWS.bit_length() + 1)


def round_slots(slots: int) -> int:
    """The next power of two."""
    return 1 << (slots - 1).bit_length()


def list_inputs(
    latents: Tensor,
    timesteps: Tensor,
    prompts: Mapping[int, KeyValueBank],
    controls: ControlTensors,
) -> dict[Path, Tensor]:
    """All tensors that a plan reads, by path.

    Args:
        latents: [rows, channels, frames, h, w].
        timesteps: [rows].
        prompts: keys and values by cross-attention site, a slot a row.
        controls: of the kinds of `KINDS`.
    """
    found: dict[Path, Tensor] = {("latents",): latents, ("timesteps",): timesteps}
    for site, bank in prompts.items():
        found["prompt", site, "key"] = bank.key
        found["prompt", site, "value"] = bank.value
    for kind in KINDS:
        control = getattr(controls, kind)
        if control is not None:
            _collect(control, (kind,), found)
    for path in [path for path in found if path[:2] == ("motion", "banks")]:
        if path[3] not in motion_parts(controls):
            del found[path]
    return found


def motion_parts(controls: ControlTensors) -> tuple[str, ...]:
    """Which parts of banks are read: m itself where a LoRA may change W, else W m."""
    return _PROJECTED if controls.lora is None else (*_RAW, *_PROJECTED)


def list_forms(
    inputs: Mapping[Path, Tensor],
    controls: ControlTensors,
    motion_sites: Mapping[int, MotionSite],
    rows: Callable[[int], int],
) -> dict[Path, Form]:
    """The form of each input of the plan, also of those that are zero for want of a tensor.

    Args:
        inputs: from `list_inputs`.
        controls: likewise.
        motion_sites: what banks of each temporal site are like.
        rows: rounds rows up.

    Raises:
        RequestError: an input is on another device than the latents.
        ShapeError: an input has other rows than the latents, or a bank does not fit its site.
    """
    forms: dict[Path, Form] = {}
    latents = inputs["latents",]
    for path, tensor in inputs.items():
        if tensor.device != latents.device:
            raise RequestError(
                f"compiled: {_words(path)} must be on {latents.device}, where the latents are, got "
                f"{tensor.device}; move it there"
            )
        shape = list(tensor.shape)
        for axis in bank_axes(path):
            shape[axis] = round_slots(shape[axis])
        axis_of_rows = row_axis(path)
        if axis_of_rows is not None:
            if shape[axis_of_rows] != len(latents):
                raise ShapeError(
                    f"compiled: {_words(path)} must have a row for each of the {len(latents)} of "
                    f"latents, got {shape[axis_of_rows]}"
                )
            shape[axis_of_rows] = rows(len(latents))
        forms[path] = Form(tuple(shape), tensor.dtype)
    if controls.motion is not None:
        whole = _motion_forms(forms, latents, motion_parts(controls), motion_sites)
        for path in forms.keys() & whole.keys():
            if forms[path] != whole[path]:
                raise ShapeError(
                    f"compiled: {_words(path)} must be {list(whole[path].shape)} of "
                    f"{whole[path].dtype}, got {list(forms[path].shape)} of {forms[path].dtype}"
                )
        forms |= whole
    return forms


def _words(path: Path) -> str:
    return " ".join(map(str, path))


def _motion_forms(
    forms: Forms,
    latents: Tensor,
    parts: tuple[str, ...],
    sites: Mapping[int, MotionSite],
) -> dict[Path, Form]:
    given = {path: form for path, form in forms.items() if path[:2] == ("motion", "banks")}
    slots = max((form.shape[0] for form in given.values()), default=1)
    dtype = next((form.dtype for form in given.values()), latents.dtype)
    frames, height, width = latents.shape[2:]
    whole: dict[Path, Form] = {}
    for index, site in sites.items():
        tokens = site.tokens(height, width)
        shapes = {
            "query_key": (slots, frames, site.width),
            "value": (slots, frames, tokens, site.width),
            "projected_query": (slots, frames, site.query),
            "projected_key": (slots, frames, site.key),
            "projected_value": (slots, frames, tokens, site.value),
        }
        whole |= {("motion", "banks", index, part): Form(shapes[part], dtype) for part in parts}
    return whole


def row_axis(path: Path) -> int | None:
    """The axis of rows of an input; None for banks."""
    return 0 if path[0] == "prompt" else _ROW_AXES.get(path)


def bank_axes(path: Path) -> tuple[int, ...]:
    """The axes of slots and of ranks of an input."""
    return _BANK_AXES.get(str(path[-1]), (0,)) if path[1:2] == ("banks",) else ()


def build_controls(inputs: Mapping[Path, Tensor]) -> ControlTensors:
    """The controls that `list_inputs` took apart."""

    def simple(kind: str) -> dict[str, Tensor]:
        return {str(p[1]): tensor for p, tensor in inputs.items() if p[0] == kind and len(p) == 2}

    def banks(kind: str) -> dict[str | int, dict[str, Tensor]]:
        found: dict[str | int, dict[str, Tensor]] = {}
        for path, tensor in inputs.items():
            if path[:2] == (kind, "banks"):
                found.setdefault(path[2], {})[str(path[3])] = tensor
        return found

    query, deviation, motion, lora, skip = (simple(kind) for kind in KINDS)
    nothing = dict.fromkeys((*_RAW, *_PROJECTED))
    return ControlTensors(
        query=QueryControl(**query) if query else None,
        deviation=DeviationControl(**deviation) if deviation else None,
        motion=MotionControl(
            **motion,
            banks={
                int(site): MotionBank(**{**nothing, **parts})
                for site, parts in banks("motion").items()
            },
        )
        if motion
        else None,
        lora=LoraControl(
            **lora, banks={str(path): LoraBank(**parts) for path, parts in banks("lora").items()}
        )
        if lora
        else None,
        skip=SkipControl(**skip) if skip else None,
    )


def build_prompts(inputs: Mapping[Path, Tensor]) -> dict[int, KeyValueBank]:
    """The keys and values that `list_inputs` took apart."""
    return {
        int(path[1]): KeyValueBank(tensor, inputs["prompt", path[1], "value"])
        for path, tensor in inputs.items()
        if path[0] == "prompt" and path[2] == "key"
    }


def fill(buffer: Tensor, path: Path, given: Tensor | None) -> None:
    """Put an input into a tensor of its form."""
    if given is None:
        buffer.zero_()
        return
    axis = row_axis(path)
    if axis is not None:
        rows, missing = given.shape[axis], buffer.shape[axis] - given.shape[axis]
        buffer.narrow(axis, 0, rows).copy_(given)
        if missing:
            buffer.narrow(axis, rows, missing).copy_(given.narrow(axis, rows - 1, 1))
        return
    if buffer.shape != given.shape:
        buffer.zero_()
    buffer[tuple(slice(size) for size in given.shape)].copy_(given)


def _collect(part: object, path: Path, found: dict[Path, Tensor]) -> None:
    if isinstance(part, Tensor):
        found[path] = part
    elif isinstance(part, Mapping):
        for key, value in part.items():
            _collect(value, (*path, key), found)
    elif part is not None:
        for field in fields(part):  # type: ignore[arg-type]  # a control or a bank
            _collect(getattr(part, field.name), (*path, field.name), found)
