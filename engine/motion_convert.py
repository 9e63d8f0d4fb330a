"""Learned motions in public formats, made files of ours.

    MotionInversion  motion_embed.pt: parameters by module path, pos_embed [1, slots, channels] and
                     vSpatial [h * w, slots, channels]; frames and size are not in the file
    MotionDirector   a list without names, [up0, down0, up1, down1, ...], in the order in which the
                     network holds the layers that a filter picked; its descendants' too
    LoRAs by name    AnimateDiff's MotionLoRA, diffusers, PEFT; safetensors or a pickle, in which
                     AnimateDiff keeps settings beside the matrices

A pickle can run any code when it is read, so it is read by PyTorch's reader of plain tensors
(`weights_only=True`), which runs none.

Source: the released code of Motion Inversion (arXiv:2403.20193), MotionDirector (arXiv:2310.08465),
Separate Motion from Appearance (arXiv:2501.16714) and AnimateDiff (arXiv:2307.04725).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from kinetiq.checkpoint import embedded_folder
from kinetiq.convert import single_file_advice
from kinetiq.errors import CheckpointError, OutputError, RequestError
from kinetiq.families import FAMILIES, detect_family, list_sites
from kinetiq.learned_motion import said_of
from kinetiq.motion_embedding import MotionEmbedding, resolve_motion_embedding
from kinetiq.motion_file import FORMAT, MotionInfo
from kinetiq.motion_lora import (
    TARGETS,
    MotionLora,
    lora_paths,
    parse_public,
    resolve_motion_lora,
)

_LATENT_PIXELS = 8  # along each side, in all models that these formats are made for
_USUAL_SIZE = {"animatediff": (512, 512), "unet3d": (320, 576)}  # of the public models, in pixels
_QUERY_KEY, _VALUE = ".pos_embed", ".vSpatial"


@attrs.frozen(kw_only=True)
class PublicMotion:
    """What a public file does not say of its motion; None: not said.

    Args:
        family: of the network that it was trained on, a name in `kinetiq.families.FAMILIES`.
        frames: that it was trained on.
        height: of the clip that it was trained on, in pixels.
        width: likewise.
        base: the network that it was trained on: a diffusers folder, "sprites", or the name of a
            family for the public models of that family. Names and widths are checked against it;
            a list without names needs it.
        target: which layers a list without names is of, one of `kinetiq.motion_lora.TARGETS`.
    """

    family: str | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    base: str | None = None
    target: str | None = None

    def __attrs_post_init__(self) -> None:
        for name, known in (("family", FAMILIES), ("target", TARGETS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise RequestError(
                    f"convert: --{name} must be one of {', '.join(known)}, got {value!r}"
                )
        for name, multiple in (
            ("frames", 1),
            ("height", _LATENT_PIXELS),
            ("width", _LATENT_PIXELS),
        ):
            value = getattr(self, name)
            if value is not None and (value < 1 or value % multiple):
                what = "at least 1" if multiple == 1 else f"a multiple of {multiple} pixels"
                raise RequestError(f"convert: --{name} must be {what}, got {value!r}")


def convert_motion(source: Path, out: Path, said: PublicMotion) -> str:
    """Write a public file's motion as ours.

    Args:
        source: the public file.
        out: a new file, which ends in .safetensors.
        said: what the public file does not say.

    Returns:
        What was found, in words.

    Raises:
        CheckpointError: the file is of none of these formats, does not fit the network or what is
            said of it, or holds no tensors.
        RequestError: something that the file does not say must be said.
        OutputError: `out` cannot be written.
    """
    where = f"convert: {source}"
    require_other(source, out)
    content, metadata, left_out = _read(source)
    network = None if said.base is None else _skeleton(said.base)
    motion: MotionEmbedding | MotionLora
    if isinstance(content, Sequence):
        motion = _from_list(where, content, network, said)
        found = f"a list of {len(content) // 2} LoRA pairs (target {said.target})"
    elif any(name.endswith((_QUERY_KEY, _VALUE)) for name in content):
        motion = _from_motion_inversion(where, content, said)
        found = f"a motion embedding of {len(motion.query_key)} blocks"
    else:
        motion = _from_names(where, content, metadata, said)
        found = f"a LoRA of {len(motion.down)} projections"
    if network is not None:
        _require_fit(motion, network)
    motion.write(out)
    return found + (f", without {', '.join(left_out)}" if left_out else "")


def default_motion_target(source: Path, *, as_peft: bool = False) -> Path:
    """Where a motion's file is converted to unless it is said: a new name beside it.

    Raises:
        OutputError: the name is taken.
    """
    target = source.with_suffix(".safetensors")
    if as_peft or target == source:
        target = source.with_name(f"{source.stem}-{'peft' if as_peft else 'motion'}.safetensors")
    if target.exists():
        raise OutputError(
            f"convert: {target} must be a new name, and exists; name it by --out to replace it, or "
            "choose another"
        )
    return target


def require_other(source: Path, out: Path) -> None:
    """Raise unless a motion is converted to another file than it is read from.

    Raises:
        RequestError: it is the same.
    """
    if out.resolve() == source.resolve():
        raise RequestError(
            f"convert: {source} must not be converted to itself; choose another --out"
        )


class _Content(NamedTuple):
    """A public file: its tensors, by name or in a row, its metadata, and names of what is none."""

    tensors: list[Tensor] | dict[str, Tensor]
    metadata: Mapping[str, str]
    left_out: tuple[str, ...] = ()


def _read(source: Path) -> _Content:
    from safetensors import SafetensorError, safe_open

    if source.suffix == ".safetensors":
        try:
            with safe_open(source, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"convert: {source} must be a whole safetensors file, and cannot be read as one "
                f"({error})"
            ) from error
        if metadata.get("format") == FORMAT:
            raise RequestError(f"convert: {source} is a motion of kinetiq already; use it as it is")
        return _Content(tensors, metadata)
    try:
        content: Any = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # what a reader of foreign bytes may raise has no end
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"convert: {source} must be a pickle of plain tensors, which can be read without "
            f"running its code, and is not ({reason})"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if isinstance(content, list | tuple) and _are_tensors(content):
        return _Content([tensor.detach() for tensor in content], {})
    if isinstance(content, dict):
        named = {str(n): t.detach() for n, t in content.items() if isinstance(t, Tensor)}
        if named:
            left_out = tuple(
                str(n) for n, value in content.items() if not isinstance(value, Tensor)
            )
            return _Content(named, {}, left_out)
    raise CheckpointError(
        f"convert: {source} must hold tensors by name, or a list of tensors, and holds other things"
    )


def _are_tensors(values: Any) -> bool:
    return len(values) > 0 and all(isinstance(value, Tensor) for value in values)


def _from_motion_inversion(
    where: str, tensors: Mapping[str, Tensor], said: PublicMotion
) -> MotionEmbedding:
    family, frames, height, width = said.family, said.frames, said.height, said.width
    if family is None or frames is None or height is None or width is None:
        raise RequestError(
            f"{where} does not say what it was trained on: say --family, --frames, --height and "
            "--width, which its config.yaml has (size in pixels)"
        )
    query_key, value = {}, {}
    latent = (height // _LATENT_PIXELS, width // _LATENT_PIXELS)
    _require_frames(where, tensors, frames)
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        if not set(path.split(".")) & set(FAMILIES[family].temporal_folders):
            raise CheckpointError(f"{where}: {name} is no part of a network of family {family}")
        if name.endswith(_QUERY_KEY) and tensor.shape[0] == 1:
            query_key[path] = tensor[0, :frames]
        elif name.endswith(_VALUE):
            size = _site_size(f"{where}: {last} of {path}", tensor.shape[0], latent)
            by_position = tensor[:, :frames].unflatten(0, size)  # [h, w, frames, channels]
            value[path] = by_position.permute(2, 0, 1, 3)
        else:
            raise CheckpointError(
                f"{where} must hold pos_embed [1, slots, channels] and vSpatial [h * w, slots, "
                f"channels], got {name} of {list(tensor.shape)}"
            )
    if not value:
        raise CheckpointError(
            f"{where} must hold vSpatial beside pos_embed; without, it is of the method's first "
            "version, whose embedding acted on values too, and which is not read"
        )
    info = MotionInfo(
        kind="embedding",
        family=family,
        frames=frames,
        height=latent[0],
        width=latent[1],
        checkpoint=said.base or "",
    )
    with said_of(where):
        return MotionEmbedding(query_key=query_key, value=value, info=info)


def _require_frames(where: str, tensors: Mapping[str, Tensor], frames: int) -> None:
    """Slots start as zeros, and only those of the trained frames ever change."""
    used = 0
    for name, tensor in tensors.items():
        if tensor.ndim != 3:
            raise CheckpointError(
                f"{where}: {name} must have 3 dimensions, got {list(tensor.shape)}"
            )
        changed = (tensor != 0).any(dim=2).any(dim=0).nonzero()
        used = max(used, int(changed[-1]) + 1 if len(changed) else 0)
        if frames > tensor.shape[1]:
            raise CheckpointError(
                f"{where}: {name} has {tensor.shape[1]} slots, fewer than --frames {frames}"
            )
    if used and used != frames:
        raise CheckpointError(
            f"{where} was trained on {used} frames, since its slots behind them are untouched, got "
            f"--frames {frames}"
        )


def _site_size(where: str, tokens: int, latent: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a site of so many tokens; the network halves latents, rounding up."""
    height, width = latent
    while height * width > tokens and height * width > 1:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != tokens:
        raise CheckpointError(
            f"{where} has {tokens} positions, and latents of {latent[0]}x{latent[1]} halved become "
            f"{height}x{width}; check --height and --width"
        )
    return height, width


def _from_list(
    where: str, tensors: Sequence[Tensor], network: Any, said: PublicMotion
) -> MotionLora:
    if network is None or said.target is None:
        raise RequestError(
            f"{where} is a list without names: say --base, the model that it was trained on, and "
            "--target, the layers it is of ('all' for MotionDirector, 'k_out' for Separate Motion "
            "from Appearance)"
        )
    family = detect_family(network)
    _require_family(where, family.name, said)
    paths = lora_paths(network, family, said.target)
    if len(tensors) != 2 * len(paths):
        fitting = [
            name for name in TARGETS if 2 * len(lora_paths(network, family, name)) == len(tensors)
        ]
        advice = f"; --target {' or '.join(fitting)} would fit" if fitting else ""
        raise CheckpointError(
            f"{where} must hold {len(paths)} pairs for --target {said.target} of {said.base}, got "
            f"{len(tensors)} tensors{advice}"
        )
    ups, downs = tensors[0::2], tensors[1::2]
    for path, up, down in zip(paths, ups, downs, strict=True):
        linear = network.get_submodule(path)
        wanted = [linear.out_features, linear.in_features]
        shapes = list(up.shape), list(down.shape)
        fits = up.ndim == down.ndim == 2 and up.shape[1] == down.shape[0]
        if not fits or [up.shape[0], down.shape[1]] != wanted:
            raise CheckpointError(
                f"{where}: the pair of {path} must be [{wanted[0]}, rank] and [rank, {wanted[1]}], "
                f"got {shapes[0]} and {shapes[1]}; check --base and --target"
            )
    with said_of(where):
        return MotionLora(
            dict(zip(paths, downs, strict=True)),
            dict(zip(paths, ups, strict=True)),
            info=_lora_info(family.name, said),
        )


def _from_names(
    where: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], said: PublicMotion
) -> MotionLora:
    try:
        down, up = parse_public(where, tensors, metadata)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. Known are motion_embed.pt of MotionInversion, lists of MotionDirector, and "
            f"LoRAs of AnimateDiff, diffusers and PEFT; if it is a model, {single_file_advice()}"
        ) from error
    folders = {part for path in down for part in path.split(".")}
    families = [f.name for f in FAMILIES.values() if folders & set(f.temporal_folders)]
    if len(families) != 1:
        raise CheckpointError(
            f"{where} must change temporal transformers of one family "
            f"({' or '.join(FAMILIES)}), got {next(iter(down))}"
        )
    _require_family(where, families[0], said)
    with said_of(where):
        return MotionLora(down, up, info=_lora_info(families[0], said))


def _require_family(where: str, found: str, said: PublicMotion) -> None:
    if said.family not in (None, found):
        raise CheckpointError(f"{where} is of family {found}, got --family {said.family}")


def _lora_info(family: str, said: PublicMotion) -> MotionInfo:
    """A LoRA fits any number of frames and any size, so the usual ones stand in for unsaid ones."""
    height, width = _USUAL_SIZE[family]
    return MotionInfo(
        kind="lora",
        family=family,
        frames=said.frames or FAMILIES[family].frames,
        height=(said.height or height) // _LATENT_PIXELS,
        width=(said.width or width) // _LATENT_PIXELS,
        checkpoint=said.base or "",
    )


def _require_fit(motion: MotionEmbedding | MotionLora, network: Any) -> None:
    """Raise unless the network has all that a motion changes, as wide and as large."""
    family = detect_family(network)
    if isinstance(motion, MotionLora):
        resolve_motion_lora(motion, network, family, (), 1)
        return
    sites, shape = list_sites(network, family), motion.info.shape
    resolve_motion_embedding(motion, network, family, sites, shape, 1)


def _skeleton(base: str) -> Any:
    """A network without weights: of a model's folder, or as the public models of a family are."""
    import diffusers

    with torch.device("meta"):
        if base in FAMILIES:
            return getattr(diffusers, FAMILIES[base].network)()
        network, config = _read_config(base)
        return getattr(diffusers, network).from_config(config)


def _read_config(base: str) -> tuple[str, dict[str, Any]]:
    folder = embedded_folder() if base == "sprites" else Path(base)
    names = [family.network for family in FAMILIES.values()]
    for file in (folder / "unet" / "config.json", folder / "config.json"):
        try:
            config: Any = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise CheckpointError(f"convert: {file} must be readable JSON: {error}") from error
        if isinstance(config, dict) and config.get("_class_name") in names:
            return config["_class_name"], config
        break
    raise CheckpointError(
        f"convert: --base must be {', '.join(FAMILIES)}, sprites, or the folder of a model whose "
        f"unet is a {' or a '.join(names)}, got {base}"
    )
