"""Files of learned motions: named tensors in safetensors, and what they are for as metadata.

A motion fits one family of networks, some of its sites, and their widths. The file says all of
that, so that a motion made for another network is refused in words instead of steering nothing.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from kinetiq import __version__
from kinetiq.errors import CheckpointError, RequestError
from kinetiq.families import FAMILIES, Family
from kinetiq.files import replacing, write_tensors
from kinetiq.named_files import is_there

KINDS = ("embedding", "lora")
_LATER = ("target", "rank", "sites")  # in `MotionInfo`, and not in files of earlier versions
_SWITCHES = "switches"  # likewise, where the metadata says how a motion is used
FORMAT = "kinetiq motion 1"  # what the metadata says under "format"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_HEADER_LENGTH = bytes(8)  # as many bytes begin a safetensors file
_HASHED = 1 << 20  # elements that are read for a fingerprint at a time


def _one_of(words: Collection[object]) -> Any:
    def check(_: object, attribute: Any, value: object) -> None:
        if value not in words:
            raise RequestError(
                f"{attribute.name}: must be one of {', '.join(map(str, words))}, got {value!r}"
            )

    return check


def _text(_: object, attribute: Any, value: object) -> None:
    if not isinstance(value, str):
        raise RequestError(f"{attribute.name}: must be text, got {value!r}")


def _paths(_: object, attribute: Any, value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(path, str) for path in value):
        raise RequestError(f"{attribute.name}: must be module paths, got {value!r}")


def _at_least(low: int) -> Any:
    def check(_: object, attribute: Any, value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise RequestError(
                f"{attribute.name}: must be a whole number of at least {low}, got {value!r}"
            )

    return check


@attrs.frozen(kw_only=True)
class MotionInfo:
    """What a learned motion is, and what it was learned from.

    Args:
        kind: "embedding" or "lora".
        family: of the network, a name in `kinetiq.families.FAMILIES`.
        frames: that it was trained on.
        height: of the latents that it was trained on.
        width: likewise.
        checkpoint: name of the model that it was trained on; informative.
        loss: name of the training loss.
        steps: of the training.
        prompt: that it was trained with.
        reference: `Clip.fingerprint` of the clip that it was learned from, or "".
        version: of kinetiq that wrote it.
        target: of a LoRA, which projections it changes, a name in `kinetiq.motion_lora.TARGETS`;
            "" where it is another set, and of an embedding.
        rank: of a LoRA, the largest of its projections'; 0 of an embedding.
        sites: module paths of the temporal transformer blocks that it acts in, in order. A motion
            fills in these three by its tensors.
    """

    kind: str = attrs.field(validator=_one_of(KINDS))
    family: str = attrs.field(validator=_one_of(FAMILIES))
    frames: int = attrs.field(validator=_at_least(1))
    height: int = attrs.field(validator=_at_least(1))
    width: int = attrs.field(validator=_at_least(1))
    checkpoint: str = attrs.field(default="", validator=_text)
    loss: str = attrs.field(default="", validator=_text)
    steps: int = attrs.field(default=0, validator=_at_least(0))
    prompt: str = attrs.field(default="", validator=_text)
    reference: str = attrs.field(default="", validator=_text)
    version: str = attrs.field(default=__version__, validator=_text)
    target: str = attrs.field(default="", validator=_text)
    rank: int = attrs.field(default=0, validator=_at_least(0))
    sites: tuple[str, ...] = attrs.field(default=(), validator=_paths)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the latents."""
        return self.frames, self.height, self.width


class MotionFile(NamedTuple):
    """What a motion's file holds; `switches` say how it is used unless it is said otherwise."""

    tensors: dict[str, Tensor]
    info: MotionInfo
    switches: dict[str, Any]


def write_motion(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    info: MotionInfo,
    switches: Mapping[str, str | float | None] = MappingProxyType({}),
) -> None:
    """Write a motion; the file carries its name only when it is whole.

    Args:
        path: ends in .safetensors; a file of that name is replaced.
        tensors: by name, at least one, finite.
        info: what they are for.
        switches: how they are used unless it is said otherwise.

    Raises:
        OutputError: the path cannot be written.
        RequestError: the name has another ending, or a tensor is not finite.
    """
    if Path(path).suffix != ".safetensors":
        raise RequestError(f"write: a motion's file must end in .safetensors, got {str(path)!r}")
    check_tensors("write: a motion", tensors, RequestError)
    # Copied, because tensors that share memory have no place in a safetensors file.
    whole = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    said = {
        name: json.dumps(value) if name == "sites" else str(value)
        for name, value in attrs.asdict(info).items()
    }
    said[_SWITCHES] = json.dumps(dict(switches))
    with replacing(path) as temporary:
        write_tensors(temporary, whole, {"format": FORMAT, **said})


def read_info(path: str | os.PathLike[str]) -> MotionInfo:
    """What a motion's file says it is; its tensors are not read.

    Raises:
        CheckpointError: it is not a whole motion's file.
    """
    return _read(path, with_tensors=False).info


def read_motion(path: str | os.PathLike[str]) -> MotionFile:
    """Read a motion's tensors, on the CPU, what they are for, and how they are used.

    Raises:
        CheckpointError: it is not a whole motion's file, or a tensor is not finite.
    """
    found = _read(path, with_tensors=True)
    check_tensors(f"read: {path}", found.tensors, CheckpointError)
    return found


def _read(path: str | os.PathLike[str], *, with_tensors: bool) -> MotionFile:
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    if not is_there(file) or not file.is_file():
        what = "is a folder" if is_there(file) and file.is_dir() else "is not there"
        raise CheckpointError(f"read: {file} must be a motion's file, and {what}")
    refuse_pickle(file)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            names = opened.keys() if with_tensors else ()
            tensors = {name: opened.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise CheckpointError(
            f"read: {file} must be a whole safetensors file, and is damaged or another kind of "
            f"file ({error}); write it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"read: {file} cannot be read ({error.strerror or error})") from error
    return MotionFile(tensors, _parse(file, metadata), _parse_switches(file, metadata))


def refuse_pickle(file: Path) -> None:
    """Raise if a file is a pickle, and say how it is converted.

    Raises:
        CheckpointError: it is, or it cannot be read.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_HEADER_LENGTH) + 1)
    except OSError as error:
        raise CheckpointError(f"read: {file} cannot be read ({error.strerror or error})") from error
    # The length of a safetensors file's header, which is JSON, may look like the start of a pickle.
    is_safetensors = start[len(_HEADER_LENGTH) :] == b"{"
    if file.suffix in _PICKLES or (start.startswith(_PICKLE_STARTS) and not is_safetensors):
        raise CheckpointError(
            f"read: {file} must be safetensors, and is a pickle, which can run code when it is "
            f"read; convert it: kinetiq convert {file} --out {file.with_suffix('.safetensors')}"
        )


def _parse(file: Path, metadata: Mapping[str, str]) -> MotionInfo:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"read: {file} must be a motion that kinetiq wrote (format {FORMAT!r}), got "
            f"{metadata.get('format', 'no')!r}; the public formats are converted: kinetiq convert "
            f"{file} --out {file.with_name(file.stem + '-motion.safetensors')}"
        )
    said: dict[str, Any] = {}
    for field in attrs.fields(MotionInfo):
        if field.name not in metadata:
            if field.name in _LATER:
                continue
            raise CheckpointError(f"read: the metadata of {file} must say {field.name!r}")
        value = metadata[field.name]
        whole = field.type is int and re.fullmatch("[0-9]{1,18}", value)
        said[field.name] = int(value) if whole else value
    if "sites" in said:
        listed = _parse_json(file, "sites", said["sites"])
        said["sites"] = tuple(listed) if isinstance(listed, list) else listed
    try:
        return MotionInfo(**said)
    except RequestError as error:
        raise CheckpointError(f"read: the metadata of {file}: {error}") from error


def _parse_switches(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    switches = _parse_json(file, _SWITCHES, metadata.get(_SWITCHES, "{}"))
    if not isinstance(switches, dict):
        raise CheckpointError(
            f"read: the metadata of {file} must say {_SWITCHES!r} as a JSON object, got "
            f"{metadata[_SWITCHES]!r}"
        )
    return switches


def _parse_json(file: Path, name: str, words: str) -> Any:
    try:
        return json.loads(words)
    except ValueError as error:
        raise CheckpointError(
            f"read: the metadata of {file} must say {name!r} as JSON: {error}"
        ) from error


def require_described(where: str, said: MotionInfo, found: MotionInfo) -> None:
    """Raise unless what a file says of its tensors, where it does, is what they are.

    Args:
        where: what the error begins with.
        said: by the file.
        found: of the motion that was made of its tensors.

    Raises:
        CheckpointError: they differ.
    """
    for name in _LATER:
        mine, its = getattr(said, name), getattr(found, name)
        if mine and mine != its:
            raise CheckpointError(
                f"{where} must say what its tensors are: {name} {its!r}, got {mine!r}; it was "
                "changed after it was written: write it again"
            )


def check_tensors(
    where: str, tensors: Mapping[str, Tensor], error: type[CheckpointError] | type[RequestError]
) -> None:
    """Raise `error` unless there are tensors, and all are of floating point and finite."""
    if not tensors:
        raise error(f"{where} must hold at least one tensor, got none")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise error(f"{where}: {name} must be of floating point, got {tensor.dtype}")
        if not bool(tensor.isfinite().all()):
            raise error(f"{where}: {name} must be finite, got NaN or infinity")


def take_part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors whose names begin with "<part>.", by the rest of their names."""
    return {
        name.removeprefix(f"{part}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{part}.")
    }


def require_known(path: str | os.PathLike[str], names: Iterable[str], parts: Iterable[str]) -> None:
    """Raise unless each name is one of `parts`, or begins with one of them and a dot.

    Raises:
        CheckpointError: there is another name.
    """
    known = tuple(parts)
    pattern = re.compile("|".join(rf"{part}(\..+)?" for part in known))
    unknown = [name for name in names if not pattern.fullmatch(name)]
    if unknown:
        raise CheckpointError(
            f"read: tensors of {path} must be named {', '.join(known)}, got {unknown[0]!r}"
        )


def require_kind(where: object, info: MotionInfo, kind: str) -> None:
    """Raise unless a motion is of this kind.

    Raises:
        CheckpointError: it is of the other.
    """
    if info.kind != kind:
        raise CheckpointError(
            f"{where} must be a motion of kind {kind!r}, got {info.kind!r}; read it with "
            + {"embedding": "MotionEmbedding.read", "lora": "MotionLora.read"}[info.kind]
        )


def require_family(info: MotionInfo, family: Family) -> None:
    """Raise unless a motion was learned by a network of this family.

    Raises:
        CheckpointError: it was learned by one of another.
    """
    if info.family != family.name:
        trained = f"{info.family} ({info.checkpoint})" if info.checkpoint else info.family
        raise CheckpointError(
            f"motion: it must have been trained on the family of the network, {family.name}, got "
            f"{trained}; train it on this model"
        )


def require_site(info: MotionInfo, name: str, known: Iterable[str]) -> None:
    """Raise unless the network has the site, block or projection that a motion has.

    Raises:
        CheckpointError: it has not.
    """
    if name not in known:
        raise CheckpointError(
            f"motion: all its sites must be in the network, got {name}, which is not; it was "
            f"trained on {info.checkpoint or 'another model'}: train it on this one"
        )


def require_width(info: MotionInfo, name: str, got: int, wanted: int) -> None:
    """Raise unless a motion's tensor is as wide as the network is there.

    Raises:
        CheckpointError: it is not.
    """
    if got != wanted:
        raise CheckpointError(
            f"motion: {name} must be {wanted} wide, as the network is, got {got}; it was "
            f"trained on {info.checkpoint or 'another model'}: train it on this one"
        )


def fingerprint(tensors: Mapping[str, Tensor], info: MotionInfo) -> str:
    """What motions of the same tensors, family and size have in common; hexadecimal."""
    digest = hashlib.sha256(repr((info.kind, info.family, info.shape)).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        for part in tensor.flatten().split(_HASHED):
            digest.update(part.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
