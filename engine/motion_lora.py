"""Motion LoRA: a low-rank change of temporal projections that holds one motion.

Each adapted projection W of the temporal transformers becomes

    y = W x + scale up (down x)

for the first `until` of the sampler's steps; behind them the network is the untouched one. With
the default target the LoRA changes keys only, so it can say which frames attend to which, and not
what they carry. An appearance highway may let the skip connections start before the temporal
transformers, in the same steps.

Source: "Separate Motion from Appearance", arXiv:2501.16714, sec. 3 (temporal attention
purification, appearance highway, phased LoRA integration); its targets beside "k" are those of the
released code ("k_out") and of MotionDirector, arXiv:2310.08465 ("all").
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import attrs
import torch
from torch import Tensor, nn

from kinetiq.control_tensors import LoraBank
from kinetiq.errors import CheckpointError, RequestError, ShapeError
from kinetiq.families import FAMILIES, Family, temporal_transformers
from kinetiq.files import replacing, write_tensors
from kinetiq.injection import check_share, injected_steps
from kinetiq.inversion import resize_noise
from kinetiq.learned_motion import (
    MotionArithmetic,
    check_factor,
    check_switches,
    check_word,
    chosen_switches,
    freeze_tensor,
    freeze_tensors,
    join_info,
    join_noise_prior,
    optional,
    said_of,
    switch_names,
    use_with,
)
from kinetiq.motion_file import (
    MotionInfo,
    check_tensors,
    fingerprint,
    read_motion,
    refuse_pickle,
    require_described,
    require_family,
    require_kind,
    require_known,
    require_site,
    require_width,
    take_part,
    write_motion,
)
from kinetiq.skips import HIGHWAYS, Skip, choose_highway

TARGETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "k": ("to_k",),
        "k_out": ("to_k", "to_out.0"),
        "q": ("to_q",),
        "v": ("to_v",),
        "ff": ("net.0.proj", "net.2"),
        "all": ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"),
    }
)
_PROJECTION = re.compile(
    r"(?P<block>(?P<transformer>.+)\.transformer_blocks\.\d+)\."
    r"(?:attn[12]\.(?P<attention>to_q|to_k|to_v|to_out\.0)|ff\.(?P<feed_forward>net\.0\.proj|net\.2))"
)
_PLACES = ("down_blocks", "mid_block", "up_blocks", "transformer_in")  # a module path's first part
_PARTS = ("down", "up", "noise")
_BETA = 1.1  # strength of a highway, the paper's best

# Where a public file keeps a matrix of a projection: PEFT's names, diffusers' newer and older ones,
# and those of trainers that wrap a linear layer.
_PUBLIC_MATRIX = re.compile(
    r"(?P<path>.+?)"
    r"(?:\.lora_(?P<peft>A|B)(?:\.\w+)?|(?:\.lora_|\.lora\.|\.lora_linear_layer\.|_lora\.)(?P<way>down|up))"
    r"\.weight"
)
_PUBLIC_ALPHA = re.compile(r"(?P<path>.+?)(?:\.lora|_lora)?\.alpha")
_PUBLIC_PREFIXES = ("base_model.model.", "module.", "unet.")
_ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings


@attrs.frozen(kw_only=True, eq=False)
class MotionLora(MotionArithmetic):
    """A motion as low-rank changes of temporal projections; a control.

    Equal LoRAs hold equal tensors and have equal switches. `a * m` scales the change, `m1 + m2` is
    the sum of both changes, exactly: the ranks add up. The switches say how it is used; the scale
    of a term goes into the sum, the other switches of terms must be equal. A factor or a scale
    below 0 is arithmetic on weights, W - up down in the place of W + up down, and no promise that
    the motion is reversed.

    Args:
        down: by module path of the projection, [rank, channels in]; any rank.
        up: likewise, [channels out, rank].
        noise: [channels, frames, h, w], what DDIM inversion made of the reference, or None; its
            deviation is its weight in sums, and it is brought to unit variance where it is used.
        info: what it is for. A LoRA fits any number of frames and any size.
        scale: factor on the low-rank change, any finite number; a negative one takes the change
            away from the weights, and no noise; 0 keeps the noise.
        until: share of the steps that it, and its highway, act in, from the first, 0 to 1; 0 takes
            no noise either.
        highway: which skip connections start before temporal transformers: "all", "released" or
            None; see `choose_highway`.
        beta: strength of the skip connections of the highway, at least 0; None: 1.1. Without a
            highway it has no meaning.
        noise_prior: share of `noise` in a clip's first noise, 0 to 1; None: 0.2 of what noise
            there is. More than 0 is refused where none can be taken.
        halves: "both" halves of guidance, or "cond" alone.

    Raises:
        RequestError: a switch is out of its range or would change nothing, a tensor is not
            finite, or a name is not that of a projection of a temporal transformer.
        ShapeError: the shapes of a projection's two matrices do not go together.
    """

    down: Mapping[str, Tensor] = attrs.field(converter=freeze_tensors, kw_only=False, repr=False)
    up: Mapping[str, Tensor] = attrs.field(converter=freeze_tensors, kw_only=False, repr=False)
    noise: Tensor | None = attrs.field(default=None, converter=freeze_tensor, repr=False)
    info: MotionInfo = attrs.field(validator=attrs.validators.instance_of(MotionInfo))
    scale: float = attrs.field(default=1.0, validator=check_factor)
    until: float = attrs.field(default=1.0, validator=check_share)
    highway: str | None = attrs.field(default=None)
    beta: float | None = attrs.field(default=None)
    noise_prior: float | None = attrs.field(default=None, validator=optional(check_share))
    halves: str = attrs.field(default="both", validator=check_word("both", "cond"))

    _FACTOR_MUST: ClassVar = "MotionLora: a factor must be a finite number"
    _NOISE_PRIOR: ClassVar = 0.2

    @highway.validator
    def _check_highway(self, _: object, value: object) -> None:
        if value is not None and value not in HIGHWAYS:
            words = ", ".join(map(repr, HIGHWAYS))
            raise RequestError(f"highway: must be None, {words}, got {value!r}")

    @beta.validator
    def _check_beta(self, attribute: Any, value: Any) -> None:
        if value is None:
            return
        check_factor(self, attribute, value)
        if value < 0:
            raise RequestError(f"beta: must be at least 0, got {value!r}")

    def __attrs_post_init__(self) -> None:
        require_highway("beta:", self.highway, self.beta)
        require_kind("MotionLora: info", self.info, "lora")
        check_tensors("MotionLora", self._tensors, RequestError)
        check_tensors("MotionLora: down and up", self.down, RequestError)
        if set(self.down) != set(self.up):
            odd = min(set(self.down) ^ set(self.up))
            raise RequestError(f"MotionLora: each projection must have down and up, got one: {odd}")
        folders = FAMILIES[self.info.family].temporal_folders
        for path, down in self.down.items():
            if not _is_temporal_projection(path, folders):
                raise RequestError(
                    "MotionLora: must adapt linear layers of temporal transformers, got "
                    f"{path!r}, which is none in the family {self.info.family}"
                )
            up = self.up[path]
            if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
                raise ShapeError(
                    f"MotionLora: {path} must have down [rank, channels in] and up [channels out, "
                    f"rank], got {list(down.shape)} and {list(up.shape)}"
                )
        if self.noise is not None and self.noise.ndim != 4:
            raise ShapeError(
                f"noise: must be [channels, frames, h, w], got {list(self.noise.shape)}"
            )
        self._require_noise()
        object.__setattr__(self, "info", _describe(self.info, self.down))  # frozen for others

    @property
    def _tensors(self) -> dict[str, Tensor]:
        noise = {} if self.noise is None else {"noise": self.noise}
        return {
            **{f"down.{path}": tensor for path, tensor in self.down.items()},
            **{f"up.{path}": tensor for path, tensor in self.up.items()},
            **noise,
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tensors and what they are for, in hexadecimal; switches do not enter."""
        return fingerprint(self._tensors, self.info)

    def _times(self, factor: float, left: Mapping[str, Any]) -> Self:
        up = {path: factor * matrix for path, matrix in self.up.items()}
        return attrs.evolve(self, up=up, **left)

    def _plus(self, other: Self) -> Self:
        """Both changes at once; projections that one lacks are the other's."""
        _require_equal_switches(self, other)
        _require_equal_widths(self, other)
        terms = [m if m.scale == 1.0 else m.scale * m for m in (self, other)]
        paths = [path for term in terms for path in term.up]
        return attrs.evolve(
            self,
            down={p: torch.cat([t.down[p] for t in terms if p in t.down]) for p in paths},
            up={p: torch.cat([t.up[p] for t in terms if p in t.up], dim=1) for p in paths},
            noise=_add_noise(terms[0].noise, terms[1].noise),
            noise_prior=join_noise_prior(*terms),
            info=join_info(*(m.info for m in sorted(terms, key=lambda m: m.noise is None))),
            scale=1.0,
        )

    @classmethod
    def read(cls, path: str | os.PathLike[str], **switches: Any) -> "MotionLora":
        """Read what `write` wrote, to be used with these switches.

        What is not among them is as it was when the file was written; see `use_with`.

        Raises:
            CheckpointError: it is not a whole file of a motion LoRA.
            RequestError: there is no such switch, or it is out of its range.
        """
        check_switches(cls, switches)
        tensors, info, said = read_motion(path)
        require_kind(f"read: {path}", info, "lora")
        require_known(path, tensors, _PARTS)
        with said_of(f"read: {path}"):
            made = cls(
                take_part(tensors, "down"),
                take_part(tensors, "up"),
                noise=tensors.get("noise"),
                info=info,
            )
            made = use_with(made, **said)
        require_described(f"read: the metadata of {path}", info, made.info)
        return use_with(made, **switches)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the tensors, what they are for, and the switches, as safetensors.

        Raises:
            OutputError: the path cannot be written.
            RequestError: its name does not end in .safetensors.
        """
        write_motion(path, self._tensors, self.info, chosen_switches(self))

    @classmethod
    def read_peft(
        cls, path: str | os.PathLike[str], info: MotionInfo, **switches: Any
    ) -> "MotionLora":
        """Read a LoRA of temporal projections in the layout of diffusers and PEFT.

        Names of PEFT, of diffusers' attention processors and of the original AnimateDiff are
        understood; alpha, where a file has one, goes into `up`.

        Args:
            path: a safetensors file.
            info: what the file does not say.
            switches: how it is used.

        Raises:
            CheckpointError: it is not such a file.
            RequestError: there is no such switch, or it is out of its range.
        """
        check_switches(cls, switches)
        tensors, metadata = _read_safetensors(Path(path))
        down, up = parse_public(f"read: {path}", tensors, metadata)
        with said_of(f"read: {path}"):
            made = cls(down, up, info=info)
        return attrs.evolve(made, **switches)

    def write_peft(self, path: str | os.PathLike[str]) -> None:
        """Write the layout that `AnimateDiffPipeline.load_lora_weights` reads; no noise, no switch.

        Names are `unet.<projection>.lora_A.weight` (down) and `.lora_B.weight` (up). Alpha is the
        rank, so that the file's own scale is 1. Readers differ in what alpha they take where ranks
        differ, so smaller ranks are filled up with zeros.

        Raises:
            OutputError: the path cannot be written.
            RequestError: its name does not end in .safetensors.
        """
        if Path(path).suffix != ".safetensors":
            raise RequestError(f"write: a LoRA's file must end in .safetensors, got {str(path)!r}")
        rank = max(down.shape[0] for down in self.down.values())
        tensors = {}
        for name, down in self.down.items():
            up, missing = self.up[name], rank - down.shape[0]
            tensors[f"unet.{name}.lora_A.weight"] = nn.functional.pad(down, (0, 0, 0, missing))
            tensors[f"unet.{name}.lora_B.weight"] = nn.functional.pad(up, (0, missing))
        with replacing(path) as temporary:
            write_tensors(temporary, tensors, {"format": "pt"})


@attrs.frozen(eq=False)
class ResolvedHighway:
    """Where the skip connections of one clip's rows start; see `SkipControl`.

    Args:
        source: for each skip connection, 0 behind the temporal transformer to 1 before it.
        gain: for each skip connection, a factor.
    """

    source: tuple[float, ...]
    gain: tuple[float, ...]


@attrs.frozen(eq=False)
class ResolvedMotionLora:
    """A motion LoRA as data for one clip.

    Args:
        key: what two LoRAs with the same banks have in common.
        banks: by module path of the projection, one slot each.
        scale: factor on the low-rank change.
        steps: how many steps it and its highway act in, from the first.
        conditional_only: whether the unconditional row is left alone.
        highway: or None.
    """

    key: str
    banks: Mapping[str, LoraBank]
    scale: float
    steps: int
    conditional_only: bool
    highway: ResolvedHighway | None


def lora_paths(network: nn.Module, family: Family, target: str = "k") -> tuple[str, ...]:
    """Module paths of the linear layers that a motion LoRA adapts, in the network's order.

    Args:
        network: of the family.
        family: says what its temporal transformers are.
        target: "k" (the paper), "k_out" (its released code), "q", "v", "ff" or "all"
            (MotionDirector), in both self-attentions of every block.

    Raises:
        RequestError: there is no such target.
    """
    if target not in TARGETS:
        raise RequestError(f"target: must be one of {', '.join(TARGETS)}, got {target!r}")
    wanted = TARGETS[target]
    transformers = set(temporal_transformers(network, family))
    paths = []
    for name, module in network.named_modules():
        found = _PROJECTION.fullmatch(name)
        if found is None or found["transformer"] not in transformers:
            continue
        if (
            isinstance(module, nn.Linear)
            and (found["attention"] or found["feed_forward"]) in wanted
        ):
            paths.append(name)
    return tuple(paths)


def require_highway(where: str, highway: str | None, beta: float | None) -> None:
    """Raise if the strength of a highway is chosen, and no highway.

    Raises:
        RequestError: it is so.
    """
    if highway is None and beta is not None:
        raise RequestError(
            f"{where} acts with a highway, got {beta!r} without one; choose a highway, "
            f"{' or '.join(map(repr, HIGHWAYS))}, too"
        )


def resolve_highway(
    network: Any, skips: tuple[Skip, ...], which: str, beta: float | None = None
) -> ResolvedHighway:
    """An appearance highway as data for one clip; see `choose_highway`.

    Args:
        network: whose skip connections they are.
        skips: of the network, from `list_skips`.
        which: "all" or "released".
        beta: strength of the skip connections; None: 1.1.

    Raises:
        RequestError: the network has no such skip connections.
    """
    moved, stronger = choose_highway(network, skips, which)
    gain = _BETA if beta is None else float(beta)
    return ResolvedHighway(
        source=tuple(float(one) for one in moved),
        gain=tuple(gain if one else 1.0 for one in stronger),
    )


@attrs.frozen
class LoraBankRequest:
    """What banks of a LoRA are made of; equal where the banks are, so that they can be made once.

    Args:
        key: of the banks.
        control: the LoRA.
    """

    key: str
    control: MotionLora = attrs.field(eq=False)


MakeLoraBanks = Callable[[LoraBankRequest], Mapping[str, LoraBank]]


def resolve_motion_lora(
    control: MotionLora,
    network: Any,
    family: Family,
    skips: tuple[Skip, ...],
    steps: int,
    make: MakeLoraBanks | None = None,
) -> ResolvedMotionLora:
    """Turn what was asked into data, for a clip of any size sampled in `steps` steps.

    Args:
        control: what was asked.
        network: with our modules in it or not.
        family: of the network.
        skips: of the network, from `list_skips`.
        steps: sampler steps of the request.
        make: makes the banks; one that remembers them saves copying them for each clip.

    Raises:
        CheckpointError: the LoRA is of another family, site or width than the network.
        RequestError: the network has no skip connections such as the highway moves.
    """
    asked = LoraBankRequest(control.fingerprint, control)
    return ResolvedMotionLora(
        key=asked.key,
        banks=make_lora_banks(asked, network, family) if make is None else make(asked),
        scale=float(control.scale),
        steps=injected_steps(control.until, steps),
        conditional_only=control.halves == "cond",
        highway=None
        if control.highway is None
        else resolve_highway(network, skips, control.highway, control.beta),
    )


def make_lora_banks(asked: LoraBankRequest, network: Any, family: Family) -> dict[str, LoraBank]:
    """The banks of a LoRA, one slot each, where the network's weights are; by module path.

    Raises:
        CheckpointError: the LoRA is of another family, site or width than the network.
    """
    control = asked.control
    require_family(control.info, family)
    known = set(lora_paths(network, family, "all"))
    banks: dict[str, LoraBank] = {}
    for path, down in control.down.items():
        up = control.up[path]
        require_site(control.info, path, known)
        linear = network.get_submodule(path)
        require_width(control.info, f"down of {path}", down.shape[1], linear.in_features)
        require_width(control.info, f"up of {path}", up.shape[0], linear.out_features)
        weight = linear.weight
        banks[path] = LoraBank(
            down[None].to(weight.device, weight.dtype), up[None].to(weight.device, weight.dtype)
        )
    return banks


def parse_public(
    where: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The matrices of a public LoRA by our module paths: down, and up with alpha in it.

    Args:
        where: what the messages of errors begin with.
        tensors: of the file.
        metadata: of the file; diffusers keeps PEFT's settings there.

    Raises:
        CheckpointError: a name is not understood, a matrix misses its other half, or the file is
            more than a plain LoRA.
    """
    matrices: dict[str, dict[str, Tensor]] = {"down": {}, "up": {}}
    alphas: dict[str, float] = {}
    for name, tensor in tensors.items():
        plain = _plain_name(name)
        matrix, alpha = _PUBLIC_MATRIX.fullmatch(plain), _PUBLIC_ALPHA.fullmatch(plain)
        if matrix is not None:
            way = matrix["way"] or {"A": "down", "B": "up"}[matrix["peft"]]
            matrices[way][_projection(matrix["path"])] = tensor
        elif alpha is not None and tensor.numel() == 1:
            alphas[_projection(alpha["path"])] = float(tensor)
        else:
            raise CheckpointError(
                f"{where} must hold matrices of a LoRA, such as ...attn1.to_k.lora_A.weight or "
                f"...attn1.processor.to_k_lora.down.weight, got {name!r}"
            )
    down, up = matrices["down"], matrices["up"]
    if not down or set(down) != set(up):
        odd = sorted(set(down) ^ set(up))[:1]
        raise CheckpointError(
            f"{where} must hold both matrices of each projection, got "
            + (f"one of {odd[0]}" if odd else "none")
        )
    scale = _peft_scale(where, metadata)
    scaled = {}
    for path, tensor in up.items():
        rank = tensor.shape[1] if tensor.ndim == 2 else 0
        if down[path].ndim != 2 or rank == 0:
            raise CheckpointError(f"{where}: {path} must have matrices of a linear layer")
        factor = alphas[path] / rank if path in alphas else scale(path, rank)
        scaled[path] = tensor if factor == 1.0 else factor * tensor
    return down, scaled


def _plain_name(name: str) -> str:
    """A public name without what wraps it, its modules called as diffusers calls them."""
    for prefix in _PUBLIC_PREFIXES:
        name = name.removeprefix(prefix)
    name = name.replace(".temporal_transformer.", ".").replace(".processor.", ".")
    return re.sub(r"\.attention_blocks\.([01])\.", lambda found: f".attn{int(found[1]) + 1}.", name)


def _projection(path: str) -> str:
    """The module path; attention processors of diffusers and AnimateDiff say to_out for its 0."""
    return f"{path}.0" if path.endswith(".to_out") else path


def _peft_scale(where: str, metadata: Mapping[str, str]) -> Callable[[str, int], float]:
    """The scale of each projection that PEFT's settings in the metadata say; 1 without any."""
    if _ADAPTER_METADATA not in metadata:
        return lambda _path, _rank: 1.0
    try:
        said = json.loads(metadata[_ADAPTER_METADATA])
        settings = {key.removeprefix("unet."): value for key, value in said.items()}
        general = settings.get("lora_alpha")
        alpha = None if general is None else float(general)
        patterns = {k: float(v) for k, v in (settings.get("alpha_pattern") or {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: {_ADAPTER_METADATA} must be the settings of a LoRA as JSON ({error})"
        ) from error
    if settings.get("use_dora"):
        raise CheckpointError(f"{where} must be a plain LoRA, got DoRA")

    def scale(path: str, rank: int) -> float:
        own = [value for key, value in patterns.items() if _peft_matches(key, path)]
        chosen = own[0] if own else alpha
        if chosen is None:
            return 1.0
        return chosen / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    return scale


def _peft_matches(key: str, path: str) -> bool:
    plain = re.escape(key.removeprefix("^").removeprefix("unet."))
    return re.fullmatch(rf"(?:.*\.)?{plain}", path) is not None


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    refuse_pickle(file)
    try:
        with safe_open(file, framework="pt") as opened:
            return {n: opened.get_tensor(n) for n in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"read: {file} must be a whole safetensors file, and cannot be read as one ({error})"
        ) from error


def _describe(info: MotionInfo, down: Mapping[str, Tensor]) -> MotionInfo:
    """What is to be said of a LoRA's matrices."""
    found = [match for match in map(_PROJECTION.fullmatch, down) if match is not None]
    changed = {match["attention"] or match["feed_forward"] for match in found}
    targets = [name for name, layers in TARGETS.items() if set(layers) == changed]
    return attrs.evolve(
        info,
        target=targets[0] if targets else "",
        rank=max(matrix.shape[0] for matrix in down.values()),
        sites=tuple(sorted({match["block"] for match in found})),
    )


def _is_temporal_projection(path: str, folders: tuple[str, ...]) -> bool:
    found = _PROJECTION.fullmatch(path)
    if found is None:
        return False
    parts = found["transformer"].split(".")
    return parts[0] in _PLACES and bool(set(parts) & set(folders))


def _require_equal_switches(one: MotionLora, other: MotionLora) -> None:
    for name in switch_names(MotionLora):
        mine, its = getattr(one, name), getattr(other, name)
        if name not in ("scale", "noise_prior") and mine != its:
            raise RequestError(
                f"MotionLora: LoRAs that are added must have the same {name}, got {mine!r} and "
                f"{its!r}; set it with attrs.evolve(lora, {name}={mine!r})"
            )


def _require_equal_widths(one: MotionLora, other: MotionLora) -> None:
    if one.info.family != other.info.family:
        raise RequestError(
            "MotionLora: LoRAs that are added must be of one family, got "
            f"{one.info.family} and {other.info.family}"
        )
    for path in one.down.keys() & other.down.keys():
        widths = [(m.down[path].shape[1], m.up[path].shape[0]) for m in (one, other)]
        if widths[0] != widths[1]:
            raise ShapeError(
                f"MotionLora: LoRAs that are added must be of one network, got {path} from "
                f"{widths[0][0]} to {widths[0][1]} channels and from {widths[1][0]} to "
                f"{widths[1][1]}"
            )


def _add_noise(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    if len(one) != len(other):
        raise ShapeError(
            "MotionLora: noises that are added must have the same channels, got "
            f"{len(one)} and {len(other)}; leave one out with attrs.evolve(lora, noise=None)"
        )
    if one.shape != other.shape:  # its deviation is its weight, and stays
        other = other.std(correction=0) * resize_noise(other, one.shape[1:])
    return one + other
