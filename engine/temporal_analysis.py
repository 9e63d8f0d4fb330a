"""How far a model's temporal attention looks over frames, and what a motion embedding changes.

At a temporal self-attention, each head h and position p has a map over frames, with queries q and
keys k as the attention uses them (frame position and motion embedding included):

    A[p, h, f, g] = softmax_g(q[f, p, h] . k[g, p, h] / sqrt(d))

All figures are means over positions, heads, rows and a few timesteps. With A[f, g] the mean map,

    reach        sum_fg A[f, g] |f - g| / F, in frames; (F^2 - 1) / (3 F) if the map is uniform
    own share    sum_f A[f, f] / F: what a frame takes from itself; 1 / F if it is uniform

and, of each map by itself, since the mean of sharp maps can be flat,

    entropy      -sum_g A log A / log F, mean over f: 0 is one frame alone, 1 is uniform
    discrepancy  sum_g |A'[f, g] - A[f, g]| / 2, mean over f: the total variation distance to the
                 map A' of the network that is run with a motion embedding, 0 to 1
    direct       likewise, with what enters the attention held, so that only the query-key part at
                 this very attention counts, not what the embedding changed before it

Sites differ in how they join frames, which says where an embedding has something to act on. Which
sites to train is proposed by a rule of thumb on these figures; see `propose_sites`.

Source: the idea, "temporal discrepancy", is from the first version of Motion Inversion,
arXiv:2403.20193v1; the figures and the rule are this project's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kinetiq.backends import EAGER
from kinetiq.clip import Clip
from kinetiq.control_tensors import ControlTensors, MotionControl
from kinetiq.denoiser import EagerDenoiser
from kinetiq.engine import Engine
from kinetiq.errors import (
    ClipError,
    NonFiniteError,
    RequestError,
)
from kinetiq.families import Site, SiteKind
from kinetiq.files import replacing
from kinetiq.generation import Progress, no_progress
from kinetiq.kernels.frame_attention import add_motion
from kinetiq.motion_embedding import MotionEmbedding
from kinetiq.motion_losses import read_diffusion
from kinetiq.motion_training import block_of
from kinetiq.request import Request
from kinetiq.rows import join_motions
from kinetiq.text import encode_prompts

PICTURE = "temporal.png"
REPORT = "temporal.json"
NO_PROMPT = "any"  # a request must have one; what the network is told may be nothing
_MOMENTS = (0.2, 0.4, 0.6, 0.8)  # shares of the timesteps at which maps are read
_ELEMENTS = 1 << 22  # of the maps that are held at a time to be averaged
_COMPARED = 256  # positions of a site whose maps are held until the other pass is there
_MOST = 0.5  # share of the change that the proposed blocks carry

SitePattern = tuple[str, int] | str
Look = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class SiteMaps:
    """The attention maps of one temporal site, in figures; see the top of this file.

    Args:
        site: which.
        positions: height times width there.
        mean: A, [frames, frames], float64 on the CPU; each row sums to 1.
        entropy: 0 to 1.
        discrepancy: 0 to 1; None without an embedding.
        direct: 0 to 1; None without an embedding.
    """

    site: Site
    positions: int
    mean: Tensor
    entropy: float
    discrepancy: float | None = None
    direct: float | None = None

    @property
    def reach(self) -> float:
        """Mean distance of what is attended to, in frames."""
        frame = torch.arange(len(self.mean), dtype=torch.float64)
        distance = (frame[:, None] - frame).abs()
        return float((self.mean * distance).sum() / len(frame))

    @property
    def own_share(self) -> float:
        """Share of a frame's attention that stays on it."""
        return float(self.mean.diagonal().mean())


@dataclass(frozen=True)
class Proposal:
    """Sites to train.

    Args:
        sites: in the form that `EmbeddingOptions.sites` takes.
        blocks: the transformer blocks that these are.
        rule: how they were chosen, in words.
    """

    sites: tuple[SitePattern, ...]
    blocks: tuple[str, ...]
    rule: str

    @property
    def words(self) -> str:
        """In the form that `kinetiq train embedding --sites` takes."""
        return ",".join(one if isinstance(one, str) else f"{one[0]}:{one[1]}" for one in self.sites)


@dataclass(frozen=True, eq=False)
class TemporalAnalysis:
    """What was found, and of what.

    Args:
        model: name of the checkpoint.
        frames: F.
        height: of the latents.
        width: likewise.
        timesteps: at which maps were read.
        prompt: what the network was told.
        reference: `Clip.fingerprint` of what was noised, or "" for noise alone.
        motion: `MotionEmbedding.fingerprint`, or "".
        sites: all temporal sites, in the order of the network's modules.
        proposal: which to train.
    """

    model: str
    frames: int
    height: int
    width: int
    timesteps: tuple[int, ...]
    prompt: str
    reference: str
    motion: str
    sites: tuple[SiteMaps, ...]
    proposal: Proposal

    @property
    def uniform_reach(self) -> float:
        """The reach of a map that attends to all frames alike, in frames."""
        return (self.frames**2 - 1) / (3 * self.frames)


def analyze_temporal(
    engine: Engine,
    reference: Clip | None = None,
    prompt: str = "",
    motion: MotionEmbedding | None = None,
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> TemporalAnalysis:
    """Read the temporal attention maps of a model; the network is left as it was.

    The network runs once a timestep, or twice with an embedding. Maps are averaged as they come;
    for the discrepancy those of at most 256 evenly spaced positions a site are kept between the
    two runs.

    Args:
        engine: with a network that PyTorch runs.
        reference: is brought to the size and noised to each timestep; None: the network is given
            noise of unit variance instead.
        prompt: what the network is told.
        motion: embedding whose effect is wanted, with its own `scale`, `value_scale` and `debias`.
            It acts at every timestep, and its noise is not used.
        frames: the model's default if None, as are the next two.
        height: pixels.
        width: pixels.
        seed: of the noise.
        progress: told of ("analyzing", done, total).

    Raises:
        RequestError: an option has no meaning for this model.
        ClipError: the reference is a still image.
        CheckpointError: the motion was made for another model.
        NonFiniteError: a map is not finite.
    """
    denoiser = engine.denoiser
    if not isinstance(denoiser, EagerDenoiser) or engine.backend != EAGER:
        raise RequestError(
            "analyze: the engine must run its network by the back end 'eager', got "
            f"{type(denoiser).__name__}"
        )
    if motion is not None and not isinstance(motion, MotionEmbedding):
        raise RequestError(
            f"analyze: motion must be a MotionEmbedding, got {type(motion).__name__}"
        )
    options = {"control": motion, "frames": frames, "height": height, "width": width}
    request = Request.from_options(prompt or NO_PROMPT, options)
    if (request.frames or engine.defaults.frames) < 2:
        raise RequestError(
            "analyze: frames must be at least 2 for attention over frames, got "
            f"{request.frames or engine.defaults.frames}"
        )
    if reference is not None and reference.num_frames < 2:
        raise ClipError(
            "analyze: the reference must have at least 2 frames, got a still image; give a clip "
            "that moves, or none"
        )
    asked = engine.resolve(request)
    checkpoint = engine.checkpoint
    size = (asked.frames, asked.latent_height, asked.latent_width)
    shape = (checkpoint.unet.config.in_channels, *size)
    diffusion = read_diffusion(checkpoint.scheduler, checkpoint.scheduler_config)
    timesteps = tuple(int(moment * diffusion.timesteps) for moment in _MOMENTS)
    clean = None
    if reference is not None:
        pixels = (size[1] * engine.vae_scale, size[2] * engine.vae_scale)
        clean = engine.encode(reference.resample(asked.frames).resize(*pixels)).cpu()
    embedding = asked.controls.embedding
    without = with_motion = None
    if embedding is not None:
        banks, scale = join_motions((embedding,)), torch.tensor([embedding.scale])
        # Slot 0 adds nothing. Both runs take the same way through the network, so that whatever
        # they differ by is the embedding's.
        without, with_motion = (
            MotionControl(
                torch.tensor([slot], device=checkpoint.device), scale.to(checkpoint.device), banks
            )
            for slot in (0, 1)
        )
    reading = _Reading(denoiser, without, with_motion)
    generator = torch.Generator().manual_seed(seed)
    text = encode_prompts(checkpoint, [prompt]).to(checkpoint.device, checkpoint.dtype)
    progress("analyzing", 0, len(timesteps))
    for done, timestep in enumerate(timesteps, start=1):
        noise = torch.randn(shape, generator=generator)
        given = noise if clean is None else diffusion.noise(clean, noise, timestep)
        given = given[None].to(checkpoint.device, checkpoint.dtype)
        reading.read(given, torch.tensor([timestep], device=checkpoint.device), text)
        progress("analyzing", done, len(timesteps))
    sites = reading.result(len(timesteps))
    return TemporalAnalysis(
        model=checkpoint.name,
        frames=size[0],
        height=size[1],
        width=size[2],
        timesteps=timesteps,
        prompt=prompt,
        reference="" if reference is None else reference.fingerprint,
        motion="" if motion is None else motion.fingerprint,
        sites=sites,
        proposal=propose_sites(sites),
    )


def attention_maps(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """A, as at the top of this file.

    Args:
        query: [rows, frames, positions, heads * d].
        key: likewise.
        heads: of the attention.

    Returns:
        [rows, positions, heads, frames, frames], float32 or wider.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    mine, other = (
        part.to(wide).unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4) for part in (query, key)
    )
    return torch.softmax(mine @ other.mT * mine.shape[-1] ** -0.5, dim=-1)


def propose_sites(sites: Sequence[SiteMaps]) -> Proposal:
    """Which blocks an embedding is worth training at: a rule of thumb, not a measurement.

    Both attentions of a block share an embedding, so blocks are chosen. Without a motion: those
    whose reach, mean over their attentions, is not below the median, since a site that looks at
    its own frame has no motion to pass on. With one: the fewest whose discrepancies sum to half of
    that of all; blocks that were not trained may be among them, as they pass the motion on. A
    motion that changes nothing says nothing, and is as none.
    """
    blocks: dict[str, list[SiteMaps]] = {}
    for one in sites:
        blocks.setdefault(block_of(one.site.name), []).append(one)
    changes = {name: sum(one.discrepancy or 0.0 for one in held) for name, held in blocks.items()}
    if any(changes.values()):
        rule = f"the fewest blocks that carry {_MOST:.0%} of the discrepancy"
        chosen: set[str] = set()
        for name in sorted(changes, key=lambda name: -changes[name]):
            if sum(changes[taken] for taken in chosen) >= _MOST * sum(changes.values()):
                break
            chosen.add(name)
    else:
        rule = "the blocks whose reach is not below the median"
        reaches = {name: sum(o.reach for o in held) / len(held) for name, held in blocks.items()}
        middle = median(reaches.values())
        chosen = {name for name, reach in reaches.items() if reach >= middle}
    groups: dict[tuple[str, int], list[str]] = {}
    for name, held in blocks.items():
        groups.setdefault((held[0].site.place, held[0].site.width), []).append(name)
    patterns: list[SitePattern] = []
    for pair, names in groups.items():
        taken = [name for name in names if name in chosen]
        patterns += [pair] if len(taken) == len(names) else taken
    return Proposal(tuple(patterns), tuple(name for name in blocks if name in chosen), rule)


@contextmanager
def observed(denoiser: EagerDenoiser, look: Look) -> Iterator[None]:
    """Tell `look` of the projections of each temporal site that runs in the block.

    Args:
        denoiser: attached.
        look: is given the site's index, and its queries and keys, [rows, frames, positions,
            channels], to which no control was applied yet.
    """
    queries: dict[int, Tensor] = {}
    handles: list[Any] = []

    def listen(index: int, attention: Any) -> None:
        def keep(_: object, __: object, query: Tensor) -> None:
            queries[index] = query

        def tell(_: object, __: object, key: Tensor) -> None:
            look(index, queries.pop(index), key)

        handles.append(attention.to_q.register_forward_hook(keep))
        handles.append(attention.to_k.register_forward_hook(tell))

    try:
        for index, site in enumerate(denoiser.sites):
            if site.kind is SiteKind.TEMPORAL:
                listen(index, denoiser.network.get_submodule(site.name))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Sums:
    """Means of each reading of a site, summed over readings."""

    mean: Tensor
    positions: int
    entropy: float = 0.0
    discrepancy: float = 0.0
    direct: float = 0.0


class _Reading:
    """Runs the network and sums up what its temporal attentions do.

    Args:
        denoiser: attached.
        without: a control whose rows use no embedding; None where there is none.
        with_motion: the same with the embedding in use.
    """

    def __init__(
        self,
        denoiser: EagerDenoiser,
        without: MotionControl | None,
        with_motion: MotionControl | None,
    ) -> None:
        self._denoiser = denoiser
        self._without, self._with = without, with_motion
        self._sums: dict[int, _Sums] = {}
        self._kept: dict[int, Tensor] = {}  # maps of the run without, at the compared positions

    @torch.inference_mode()
    def read(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> None:
        """Run the network on one input, with and without the embedding."""

        def run(control: MotionControl | None, look: Look) -> None:
            with observed(self._denoiser, look):
                self._denoiser.predict(latents, timesteps, text, ControlTensors(motion=control))

        run(self._without, self._add)
        if self._with is not None:
            run(self._with, self._compare)

    def result(self, readings: int) -> tuple[SiteMaps, ...]:
        """The means over all readings."""
        compared = self._with is not None
        return tuple(
            SiteMaps(
                self._denoiser.sites[index],
                sums.positions,
                sums.mean / readings,
                sums.entropy / readings,
                sums.discrepancy / readings if compared else None,
                sums.direct / readings if compared else None,
            )
            for index, sums in sorted(self._sums.items())
        )

    def _heads(self, index: int) -> int:
        heads: int = self._denoiser.network.get_submodule(self._denoiser.sites[index].name).heads
        return heads

    def _add(self, index: int, query: Tensor, key: Tensor) -> None:
        rows, frames, positions, _ = query.shape
        heads = self._heads(index)
        total, entropy = torch.zeros(frames, frames, dtype=torch.float64), 0.0
        part = max(1, _ELEMENTS // (rows * heads * frames**2))
        for mine, other in zip(query.split(part, 2), key.split(part, 2), strict=True):
            maps = attention_maps(mine, other, heads)
            total += maps.sum((0, 1, 2), dtype=torch.float64).cpu()
            entropy += float(torch.special.entr(maps).sum(dtype=torch.float64))
        if not bool(total.isfinite().all()):
            raise NonFiniteError(
                "analyze: attention maps must be finite, got NaN or infinity at "
                f"{self._denoiser.sites[index].name}; try another dtype (float32 or bfloat16)"
            )
        maps_read = rows * positions * heads
        sums = self._sums.setdefault(index, _Sums(torch.zeros_like(total), positions))
        sums.mean += total / maps_read
        sums.entropy += entropy / (maps_read * frames * math.log(frames))
        if self._with is not None:
            self._kept[index] = self._maps(index, query, key, self._without)
            held = self._maps(index, query, key, self._with)
            sums.direct += _distance(held, self._kept[index])

    def _compare(self, index: int, query: Tensor, key: Tensor) -> None:
        changed = self._maps(index, query, key, self._with)
        self._sums[index].discrepancy += _distance(changed, self._kept.pop(index))

    def _maps(
        self, index: int, query: Tensor, key: Tensor, control: MotionControl | None
    ) -> Tensor:
        """The maps at the compared positions, under a control."""
        step = math.ceil(query.shape[2] / _COMPARED)
        query, key = query[:, :, ::step], key[:, :, ::step]
        bank = None if control is None else control.banks.get(index)
        if control is not None and bank is not None:
            if bank.projected_query is not None:
                query = add_motion(query, control.slot, control.scale, bank.projected_query)
            if bank.projected_key is not None:
                key = add_motion(key, control.slot, control.scale, bank.projected_key)
        return attention_maps(query, key, self._heads(index))


def _distance(one: Tensor, other: Tensor) -> float:
    """Mean total variation distance of maps [..., frames, frames]."""
    return float((one - other).abs().sum(-1).mean(dtype=torch.float64)) / 2


def as_json(analysis: TemporalAnalysis) -> dict[str, Any]:
    """All figures, and the proposal; None is what was not asked for."""
    return {
        "model": analysis.model,
        "frames": analysis.frames,
        "latent_height": analysis.height,
        "latent_width": analysis.width,
        "timesteps": list(analysis.timesteps),
        "prompt": analysis.prompt,
        "reference": analysis.reference or None,
        "motion": analysis.motion or None,
        "uniform_reach": analysis.uniform_reach,
        "sites": [
            {
                "name": one.site.name,
                "place": one.site.place,
                "width": one.site.width,
                "positions": one.positions,
                "reach": one.reach,
                "own_share": one.own_share,
                "entropy": one.entropy,
                "discrepancy": one.discrepancy,
                "direct": one.direct,
            }
            for one in analysis.sites
        ],
        "proposal": {
            "sites": analysis.proposal.words,
            "blocks": list(analysis.proposal.blocks),
            "rule": analysis.proposal.rule,
        },
    }


def describe(analysis: TemporalAnalysis) -> str:
    """The figures as a table for a terminal, and the proposal."""
    compared = bool(analysis.motion)
    heads = ["", "", "site", "kind", "reach", "own", "entropy"]
    heads += ["discrepancy", "direct"] if compared else []
    lines = [heads]
    for number, one in enumerate(analysis.sites, start=1):
        mark = "*" if block_of(one.site.name) in analysis.proposal.blocks else ""
        kind = f"{one.site.place}:{one.site.width}"
        line = [mark, str(number), one.site.name, kind, f"{one.reach:.2f}"]
        line += [f"{one.own_share:.2f}", f"{one.entropy:.2f}"]
        if one.discrepancy is not None and one.direct is not None:
            line += [f"{one.discrepancy:.4f}", f"{one.direct:.4f}"]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = (2, 3)  # columns of text; the others are of numbers
    table = [
        "  ".join(
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    uniform = (
        f"uniform attention: reach {analysis.uniform_reach:.2f} frames, "
        f"own {1 / analysis.frames:.2f}, entropy 1"
    )
    return "\n".join(
        [
            _headline(analysis),
            "",
            *table,
            "",
            uniform,
            f"* proposed by a rule of thumb ({analysis.proposal.rule}):",
            f"kinetiq train embedding --sites {analysis.proposal.words}",
        ]
    )


def _headline(analysis: TemporalAnalysis) -> str:
    given = "a noised reference" if analysis.reference else "noise"
    return (
        f"Temporal attention of {analysis.model} over {analysis.frames} frames; {given} at "
        f"timesteps {', '.join(map(str, analysis.timesteps))}"
    )


_PROPOSED, _OTHER, _LINE = "#1f6f8b", "#b8c4cc", "#c2452d"


def draw(analysis: TemporalAnalysis, path: Path) -> None:
    """Draw the reach of each site, what the motion changes, and the mean maps, as a PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    count, compared = len(analysis.sites), bool(analysis.motion)
    height = max(4.6, 1.6 + 0.27 * count)
    rows = min(count, max(2, round((height - 1.0) / 1.3)))
    columns = math.ceil(count / rows)
    widths = [8.2 if compared else 5.8, 1.25 * columns + 0.9]
    figure = Figure(figsize=(sum(widths), height), layout="constrained")
    figure.suptitle(_headline(analysis), fontsize=11)
    halves: Any = figure.subfigures(1, 2, width_ratios=widths, wspace=0.03)
    left, right = halves
    axes = left.subplots(
        1, 2 if compared else 1, sharey=True, squeeze=False, width_ratios=[1, 0.8][: 1 + compared]
    )[0]
    _draw_reach(axes[0], analysis)
    if compared:
        _draw_discrepancy(axes[1], analysis)
    # Frames along the rows of a map look at those along its columns.
    grid = right.subplots(rows, columns, squeeze=False)
    brightest = max(float(one.mean.max()) for one in analysis.sites)
    for number, cell in enumerate(grid.flat):
        if number >= count:
            cell.set_axis_off()
            continue
        one = analysis.sites[number]
        image = cell.imshow(one.mean.numpy(), cmap="viridis", vmin=0.0, vmax=brightest)
        proposed = block_of(one.site.name) in analysis.proposal.blocks
        weight = {"color": _PROPOSED, "fontweight": "bold"} if proposed else {"color": "#444444"}
        cell.set_title(str(number + 1), fontsize=8, pad=2, **weight)
        cell.set_xticks([])
        cell.set_yticks([])
    right.supxlabel("frame that is looked at", fontsize=9)
    right.supylabel("frame that looks", fontsize=9)
    bar = right.colorbar(image, ax=grid, shrink=0.6, pad=0.03)
    bar.set_label("mean share of attention", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    with replacing(path, "analyze") as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _colours(analysis: TemporalAnalysis) -> list[str]:
    blocks = analysis.proposal.blocks
    return [_PROPOSED if block_of(o.site.name) in blocks else _OTHER for o in analysis.sites]


def _draw_reach(axes: Any, analysis: TemporalAnalysis) -> None:
    from matplotlib.patches import Patch

    count = len(analysis.sites)
    axes.barh(range(count), [one.reach for one in analysis.sites], color=_colours(analysis))
    line = axes.axvline(
        analysis.uniform_reach, color=_LINE, linestyle="--", linewidth=1.2, label="uniform"
    )
    labels = [
        f"{one.site.name.replace('.transformer_blocks.0.', '.')}  {number}"
        for number, one in enumerate(analysis.sites, start=1)
    ]
    axes.set_yticks(range(count), labels, fontsize=8)
    axes.set_ylim(count - 0.4, -0.6)  # the first site on top
    axes.set_xlabel("reach (frames)", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    _plain_frame(axes)
    shown = [Patch(color=_PROPOSED, label="proposed"), Patch(color=_OTHER, label="others"), line]
    axes.legend(
        handles=shown,
        fontsize=8,
        ncols=3,
        frameon=False,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        columnspacing=1.0,
        handlelength=1.4,
    )


def _draw_discrepancy(axes: Any, analysis: TemporalAnalysis) -> None:
    count = len(analysis.sites)
    axes.barh(range(count), [one.discrepancy for one in analysis.sites], color=_colours(analysis))
    axes.plot(
        [one.direct for one in analysis.sites],
        range(count),
        "D",
        color=_LINE,
        markersize=4,
        label="direct: at this attention alone",
        clip_on=False,
    )
    axes.set_xlabel("discrepancy (change by the motion, 0 to 1)", fontsize=9)
    axes.set_xlim(left=0.0)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    _plain_frame(axes)
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _plain_frame(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
