"""Motion embeddings: a motion learned from one clip, added to what temporal attention projects.

At a temporal self-attention with normalised input x (frame position included),

    q = W_q (x + s m_qk)    k = W_k (x + s m_qk)    v = W_v (x + s d)

with s the scale, m_qk one vector a frame and transformer block, and d made of one vector m a frame
and position by the `debias` that keeps appearance out of it:

    difference: d_0 = m_0, d_j = m_j - m_{j-1}    mean: d = m - mean_F(m)    none: d = m
    drop: no d at all, which leaves motions of the camera

Sampling starts from noise blended with the reference's own, found by DDIM inversion. As the
embedding is additive, motions can be scaled, negated and summed.

Source: Motion Inversion, arXiv:2403.20193, sec. 3. That its difference is taken after resampling,
over the trained frames alone, and that m is resized in space are this project's.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, Self

import attrs
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from kinetiq.control_tensors import MotionBank
from kinetiq.errors import CheckpointError, RequestError
from kinetiq.families import Family, Site, SiteKind
from kinetiq.injection import check_share, injected_steps
from kinetiq.inversion import ResolvedNoise, resize_noise, resolve_noise
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
    use_with,
)
from kinetiq.motion_file import (
    MotionInfo,
    check_tensors,
    fingerprint,
    read_motion,
    require_described,
    require_family,
    require_kind,
    require_known,
    require_site,
    require_width,
    take_part,
    write_motion,
)

DEBIAS = ("difference", "none", "mean", "drop")
_PARTS = ("query_key", "value", "noise")


@attrs.frozen(kw_only=True, eq=False)
class MotionEmbedding(MotionArithmetic):
    """A learned motion that is added at temporal attention; a control.

    `a * m`, `-m`, `m1 + m2` and `m1 - m2` are motions: coefficients go into the tensors, and in a
    sum so do `scale` and `value_scale`. A coefficient that is not positive leaves the noise behind,
    which has nothing to say of the reverse of a motion, and with it the share that was chosen of
    it; so does a negative `scale`. A `scale` of 0 keeps it, to see what the noise does alone, but
    in a sum it is a coefficient like others.

    Args:
        query_key: m_qk by the path of the transformer block, [frames, channels].
        value: m by the path of the attention, [frames, h, w, channels].
        noise: the inverted reference, [channels, frames, h, w] at `info`'s size, or None; its
            deviation is its weight in sums, and it is brought to unit variance where it is used.
        info: what it was learned from.
        scale: factor on the embedding, not on the noise; negative reverses the motion, and takes
            no noise.
        value_scale: a further factor on `value` alone, where that acts. A negative one reverses
            this part and no other, so the noise stays: the query-key part, which says how frames
            attend to each other, is still that of the motion.
        debias: "difference", "none", "mean" or "drop", as above.
        noise_prior: share of `noise` in the initial noise, 0 to 1; None: 0.5 of what noise there
            is. More than 0 is refused where none can be taken.
        until: share of the steps in which it acts, from the first, 0 to 1; 0 takes no noise
            either.
        halves: "both" halves of guidance, or "cond" alone.

    Raises:
        RequestError: a switch is out of its range or would change nothing, or tensors do not have
            the shapes that `info` asks for.
    """

    query_key: Mapping[str, Tensor] = attrs.field(factory=dict, converter=freeze_tensors)
    value: Mapping[str, Tensor] = attrs.field(factory=dict, converter=freeze_tensors)
    noise: Tensor | None = attrs.field(default=None, converter=freeze_tensor)
    info: MotionInfo = attrs.field(validator=attrs.validators.instance_of(MotionInfo))
    scale: float = attrs.field(default=1.0, validator=check_factor)
    value_scale: float = attrs.field(default=1.0, validator=check_factor)
    debias: str = attrs.field(default="difference", validator=check_word(*DEBIAS))
    noise_prior: float | None = attrs.field(default=None, validator=optional(check_share))
    until: float = attrs.field(default=1.0, validator=check_share)
    halves: str = attrs.field(default="both", validator=check_word("both", "cond"))

    _FACTOR_MUST: ClassVar = "motion: a factor must be finite"
    _NOISE_PRIOR: ClassVar = 0.5

    def __attrs_post_init__(self) -> None:
        require_kind("motion: it", self.info, "embedding")
        if not self.query_key and not self.value:
            raise RequestError("motion: must hold an embedding of at least one site, got none")
        check_tensors("motion: it", self._tensors, RequestError)
        frames = self.info.frames
        wanted: dict[str, tuple[tuple[int | None, ...], str]] = {}
        for name in self.query_key:
            wanted[f"query_key.{name}"] = (frames, None), "[frames, channels]"
        for name in self.value:
            wanted[f"value.{name}"] = (frames, None, None, None), "[frames, h, w, channels]"
        if self.noise is not None:
            wanted["noise"] = (None, *self.info.shape), "[channels, frames, h, w]"
        for name, (shape, said) in wanted.items():
            got = self._tensors[name].shape
            if len(got) != len(shape) or any(
                asked not in (None, size) for asked, size in zip(shape, got, strict=True)
            ):
                frames, height, width = self.info.shape
                raise RequestError(
                    f"motion: {name} must be {said} for {frames} frames of {height}x{width} "
                    f"latents, got {list(got)}"
                )
        self._require_noise()
        if self.value_scale != 1.0 and (self.debias == "drop" or not self.value):
            why = "debias is 'drop'" if self.value else "the motion has no value part"
            raise RequestError(
                f"value_scale: must be 1 or left out where {why}, got {self.value_scale!r}, since "
                "nothing is there that it would scale"
            )
        blocks = {*self.query_key, *(_block_of(name) for name in self.value)}
        described = attrs.evolve(self.info, target="", rank=0, sites=tuple(sorted(blocks)))
        object.__setattr__(self, "info", described)  # frozen for others

    @classmethod
    def read(cls, path: str | os.PathLike[str], **switches: Any) -> Self:
        """Read what `write` wrote; `switches` are the options from `scale` on.

        What is not among them is as it was when the file was written; see `use_with`.

        Raises:
            CheckpointError: the file is none, is damaged, or is another kind of motion.
            RequestError: a switch is unknown or out of range.
        """
        check_switches(cls, switches)
        tensors, info, said = read_motion(path)
        require_kind(f"read: {path}", info, "embedding")
        require_known(path, tensors, _PARTS)
        parts: dict[str, Any] = {
            "query_key": take_part(tensors, "query_key"),
            "value": take_part(tensors, "value"),
            "noise": tensors.get("noise"),
        }
        with said_of(f"read: {path}"):
            made = use_with(cls(**parts, info=info), **said)
        require_described(f"read: the metadata of {path}", info, made.info)
        return use_with(made, **switches)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the tensors, `info`, and the switches, which may be chosen anew when it is read.

        Raises:
            OutputError: the path cannot be written.
            RequestError: the name does not end in .safetensors.
        """
        write_motion(path, self._tensors, self.info, chosen_switches(self))

    @property
    def _tensors(self) -> dict[str, Tensor]:
        """All tensors by the names that they have in a file."""
        named = {f"query_key.{name}": tensor for name, tensor in self.query_key.items()}
        named |= {f"value.{name}": tensor for name, tensor in self.value.items()}
        return named if self.noise is None else named | {"noise": self.noise}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tensors, the family and the size, in hexadecimal; no switch enters."""
        return fingerprint(self._tensors, self.info)

    def _times(self, factor: float, left: Mapping[str, Any]) -> Self:
        return attrs.evolve(
            self,
            query_key={name: factor * tensor for name, tensor in self.query_key.items()},
            value={name: factor * tensor for name, tensor in self.value.items()},
            **left,
        )

    def _plus(self, other: Self) -> Self:
        """Both motions at once; sites that one lacks are the other's."""
        require_alike(self, other, ("debias", "until", "halves"))
        terms = [m if m.scale == 1.0 else m.scale * m for m in (self, other)]
        noises = [{"noise": term.noise} for term in terms if term.noise is not None]
        return attrs.evolve(
            self,
            query_key=_sum([(1.0, term.query_key) for term in terms]),
            value=_sum([(term.value_scale, term.value) for term in terms]),
            noise=_sum([(1.0, noise) for noise in noises]).get("noise"),
            noise_prior=join_noise_prior(*terms),
            info=join_info(self.info, other.info),
            scale=1.0,
            value_scale=1.0,
        )

    def resample(self, *, frames: int) -> Self:
        """The motion over another number of frames, by linear interpolation between them.

        Raises:
            RequestError: `frames` is below 2, or this motion has a single frame.
        """
        if frames == self.info.frames:
            return self
        if frames < 2 or self.info.frames < 2:
            raise RequestError(
                f"resample: a motion has at least 2 frames, got {self.info.frames} to bring to "
                f"{frames}"
            )
        info = attrs.evolve(self.info, frames=frames)
        return attrs.evolve(
            self,
            query_key={n: _resample(tensor, frames) for n, tensor in self.query_key.items()},
            value={n: _resample(tensor, frames) for n, tensor in self.value.items()},
            noise=_resize_noise(self.noise, info.shape),
            info=info,
        )

    def resize(self, *, height: int, width: int) -> Self:
        """The motion at another size of the latents, by bilinear interpolation.

        Raises:
            RequestError: a size is below 1, or it cannot be known how often the network has
                halved the latents where a part of `value` is: generate at the size instead,
                which knows the network.
        """
        if (height, width) == self.info.shape[1:]:
            return self
        if height < 1 or width < 1:
            raise RequestError(f"resize: a size must be at least 1x1, got {height}x{width}")
        info = attrs.evolve(self.info, height=height, width=width)
        return attrs.evolve(
            self,
            value={
                name: _resize(tensor, _guess_size(name, tensor, self.info, (height, width)))
                for name, tensor in self.value.items()
            },
            noise=_resize_noise(self.noise, info.shape),
            info=info,
        )


def require_alike(first: Any, second: Any, switches: Sequence[str]) -> None:
    """Raise unless two motions can be summed: same family, frames, size and these switches.

    Raises:
        RequestError: they cannot; it says what brings one to the other.
    """
    mine, other = first.info, second.info
    if mine.family != other.family:
        raise RequestError(
            f"motion: both of a sum must be of one family, got {mine.family} and {other.family}"
        )
    if mine.frames != other.frames:
        raise RequestError(
            f"motion: both of a sum must have as many frames, got {mine.frames} and "
            f"{other.frames}; use m.resample(frames={mine.frames}) on the second"
        )
    if mine.shape != other.shape:
        raise RequestError(
            f"motion: both of a sum must be of one size of latents, got {mine.height}x{mine.width} "
            f"and {other.height}x{other.width}; use m.resize(height={mine.height}, "
            f"width={mine.width}) on the second"
        )
    for name in switches:
        if getattr(first, name) != getattr(second, name):
            raise RequestError(
                f"motion: both of a sum must have the same {name}, got {getattr(first, name)!r} "
                f"and {getattr(second, name)!r}"
            )


def _block_of(attention: str) -> str:
    """Module path of the transformer block of an attention."""
    return attention.rpartition(".")[0] or attention


def _sum(terms: Sequence[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for factor, tensors in terms:
        for name, tensor in tensors.items():
            before = total.get(name)
            if before is not None and before.shape != tensor.shape:
                raise RequestError(
                    f"motion: both of a sum must have the same shape of {name}, got "
                    f"{list(before.shape)} and {list(tensor.shape)}; they were trained on "
                    "different models"
                )
            total[name] = factor * tensor if before is None else before + factor * tensor
    return total


def _resample(tensor: Tensor, frames: int) -> Tensor:
    """[frames, ...] at another number of frames."""
    if tensor.shape[0] == frames:
        return tensor
    flat = tensor.flatten(1).T[None]  # [1, everything else, frames]
    resampled = F.interpolate(flat, size=frames, mode="linear", align_corners=False)
    return resampled[0].T.reshape(frames, *tensor.shape[1:])


def _resize(tensor: Tensor, size: tuple[int, int]) -> Tensor:
    """[frames, h, w, channels] at another height and width."""
    if tuple(tensor.shape[1:3]) == size:
        return tensor
    first = tensor.permute(0, 3, 1, 2)
    resized = F.interpolate(first, size=size, mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1)


def _resize_noise(noise: Tensor | None, shape: tuple[int, int, int]) -> Tensor | None:
    """Noise at another size, its weight kept."""
    return None if noise is None else noise.std(correction=0) * resize_noise(noise, shape)


def _halved(size: tuple[int, int], times: int) -> tuple[int, int]:
    """A size of latents after so many halvings by the network, which rounds up."""
    height, width = size
    for _ in range(times):
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def _guess_size(
    name: str, value: Tensor, info: MotionInfo, size: tuple[int, int]
) -> tuple[int, int]:
    """The size that a site has in latents of `size`, by how it compares to that trained at."""
    stored = tuple(value.shape[1:3])
    trained = (info.height, info.width)
    levels = range(max(*trained, *size).bit_length() + 1)  # at the last, all is one position
    found = {_halved(size, level) for level in levels if _halved(trained, level) == stored}
    if len(found) != 1:
        sizes = " or ".join(f"{height}x{width}" for height, width in sorted(found)) or "none"
        raise RequestError(
            f"resize: the size of {name} must follow from that of the latents, got "
            f"{stored[0]}x{stored[1]} in {trained[0]}x{trained[1]}, which becomes {sizes} in "
            f"{size[0]}x{size[1]}; generate at that size without resizing, since the network knows"
        )
    return found.pop()


def site_size(network: Any, name: str, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a site in latents of `size`.

    Args:
        network: of a supported family.
        name: module path of the site, or of a part of it.
        size: height and width of the latents.
    """
    down = [block.downsamplers is not None for block in network.down_blocks]
    up = [block.upsamplers is not None for block in network.up_blocks]
    head, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    levels = 0  # of what comes before all blocks
    if head == "down_blocks":
        levels = sum(down[: int(number)])
    elif head == "mid_block":
        levels = sum(down)
    elif head == "up_blocks":
        levels = sum(down) - sum(up[: int(number)])
    return _halved(size, levels)


def debias(value: Tensor, mode: str) -> Tensor | None:
    """What of a value embedding [frames, ...] is added; see the top of this file.

    Raises:
        RequestError: there is no such mode.
    """
    if mode == "difference":
        return torch.cat([value[:1], value[1:] - value[:-1]])
    if mode == "mean":
        return value - value.mean(0, keepdim=True)
    if mode not in DEBIAS:
        raise RequestError(f"debias: must be one of {', '.join(DEBIAS)}, got {mode!r}")
    return value if mode == "none" else None


def project_bank(attention: Any, query_key: Tensor | None, value: Tensor | None) -> MotionBank:
    """An embedding through the projections of a temporal attention; differentiable.

    Without the projections' biases, which W x has already.

    Args:
        attention: a diffusers attention module.
        query_key: [slots, frames, channels], or None.
        value: [slots, frames, tokens, channels], or None.

    Returns:
        Without the embedding itself; of the network's type, or of autocast's where that is on, as
        W x is.
    """

    def project(linear: Any, given: Tensor | None) -> Tensor | None:
        return None if given is None else F.linear(given.to(linear.weight), linear.weight)

    return MotionBank(
        projected_query=project(attention.to_q, query_key),
        projected_key=project(attention.to_k, query_key),
        projected_value=project(attention.to_v, value),
    )


@attrs.frozen(eq=False)
class ResolvedMotionEmbedding:
    """A motion embedding as data for one clip.

    Args:
        key: what two embeddings with the same banks have in common.
        banks: by index of the temporal site, one slot each, resampled to the clip, debiased and
            projected; without the embedding itself.
        raw: makes the embedding itself, likewise, at the same sites.
        scale: factor on the embedding.
        steps: how many steps it acts in, from the first.
        conditional_only: whether the unconditional row is left alone.
    """

    key: str
    banks: Mapping[int, MotionBank]
    raw: Callable[[], Mapping[int, MotionBank]]
    scale: float
    steps: int
    conditional_only: bool


@attrs.frozen
class BankRequest:
    """What banks are made of; equal where the banks are, so that they can be made once.

    Args:
        key: of the banks.
        control: the embedding.
        shape: frames, height and width of the clip's latents.
        raw: whether the embedding itself is wanted, in the place of its projections.
    """

    key: str
    control: MotionEmbedding = attrs.field(eq=False)
    shape: tuple[int, int, int] = attrs.field(eq=False)
    raw: bool = False


MakeBanks = Callable[[BankRequest], Mapping[int, MotionBank]]


def resolve_motion_embedding(
    control: MotionEmbedding,
    network: Any,
    family: Family,
    sites: tuple[Site, ...],
    shape: tuple[int, int, int],
    steps: int,
    make: MakeBanks | None = None,
) -> ResolvedMotionEmbedding:
    """Turn what was asked into data.

    Args:
        control: what was asked.
        network: whose projections it goes through.
        family: of the network.
        sites: of the network.
        shape: frames, height and width of the clip's latents.
        steps: sampler steps of the clip.
        make: makes the banks; one that remembers them saves projecting them for each clip.

    Raises:
        CheckpointError: the motion was made for another family, other sites or other widths.
    """
    said = "x".join(map(str, shape))
    key = f"{control.fingerprint} {control.debias} {control.value_scale!r} {said}"
    asked = BankRequest(key, control, shape)

    def made(asked: BankRequest) -> Mapping[int, MotionBank]:
        return make_banks(asked, network, family, sites) if make is None else make(asked)

    return ResolvedMotionEmbedding(
        key=key,
        banks=made(asked),
        raw=partial(made, attrs.evolve(asked, raw=True)),
        scale=float(control.scale),
        steps=injected_steps(control.until, steps),
        conditional_only=control.halves == "cond",
    )


def resolve_motion_noise(
    control: Any, channels: int, shape: tuple[int, int, int]
) -> ResolvedNoise | None:
    """A learned motion's noise for a clip.

    None where `noise_share` is 0.

    Args:
        control: a motion embedding, or a motion LoRA.
        channels: of the clip's latents.
        shape: frames, height and width of the clip's latents.

    Raises:
        CheckpointError: the noise has another number of channels.
    """
    share = control.noise_share
    if share and control.noise is not None and len(control.noise) != channels:
        raise CheckpointError(
            f"motion: its noise must have {channels} channels, as the latents have, got "
            f"{len(control.noise)}; it was trained on {control.info.checkpoint or 'another model'}"
        )
    return resolve_noise(control.noise, share, shape)


@torch.no_grad()
def make_banks(
    asked: BankRequest, network: Any, family: Family, sites: tuple[Site, ...]
) -> dict[int, MotionBank]:
    """The banks of an embedding, one slot each, at the clip's size; by index of the site.

    Raises:
        CheckpointError: the motion was made for another family, other sites or other widths.
    """
    control, (frames, height, width) = asked.control, asked.shape
    info = control.info
    require_family(info, family)
    temporal = {index: site for index, site in enumerate(sites) if site.kind is SiteKind.TEMPORAL}
    _require_fit(control, temporal.values(), network)
    banks = {}
    for index, site in temporal.items():
        query_key = control.query_key.get(site.name.rpartition(".")[0])
        if query_key is not None:
            query_key = _resample(query_key, frames)[None]
        value = control.value.get(site.name)
        added = None
        if value is not None and control.debias != "drop":
            size = site_size(network, site.name, (height, width))
            moved = _resize(_resample(value, frames), size)
            added = debias(control.value_scale * moved, control.debias)
            added = None if added is None else added.flatten(1, 2)[None]
        if query_key is not None or added is not None:
            attention = network.get_submodule(site.name)
            banks[index] = (
                MotionBank(
                    query_key=None if query_key is None else query_key.to(attention.to_q.weight),
                    value=None if added is None else added.to(attention.to_v.weight),
                )
                if asked.raw
                else project_bank(attention, query_key, added)
            )
    return banks


def _require_fit(control: MotionEmbedding, sites: Any, network: Any) -> None:
    """Raise unless the network has all of a motion's sites, as wide and as large as trained."""
    attentions = {site.name: site.width for site in sites}
    blocks = {_block_of(name): width for name, width in attentions.items()}
    info = control.info
    for part, tensors, known, others, must in (
        ("query_key", control.query_key, blocks, attentions, "a transformer block"),
        ("value", control.value, attentions, blocks, "an attention"),
    ):
        for name, tensor in tensors.items():
            if name in others and name not in known:  # there it would never be looked for
                near = next(one for one in known if one in name or name in one)
                raise CheckpointError(
                    f"motion: {part} must be named by the path of {must}, such as {near}, got "
                    f"{name}"
                )
            require_site(info, name, known)
            require_width(info, name, tensor.shape[-1], known[name])
    for name, tensor in control.value.items():
        wanted = site_size(network, name, (info.height, info.width))
        if tuple(tensor.shape[1:3]) != wanted:
            raise CheckpointError(
                f"motion: {name} must be {wanted[0]}x{wanted[1]} where latents are "
                f"{info.height}x{info.width}, got {tensor.shape[1]}x{tensor.shape[2]}; it was "
                f"trained on {info.checkpoint or 'another model'}: train it on this one"
            )
