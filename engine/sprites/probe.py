"""What attention does in a network: how sharp each site looks, and what it is worth.

The probe runs the network on rendered clips noised to a few steps of the checkpoint's own sampler.
Entropy near 1 is a site that looks everywhere alike; an effect near 0 is a site that could as well
not be there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinetiq.denoiser import EagerDenoiser
from kinetiq.engine import Engine
from kinetiq.families import ANIMATEDIFF, Site, SiteKind
from kinetiq.sampler import SamplerRow, build_sampler_table
from kinetiq.sprites.cases import TransferPair
from kinetiq.sprites.world import Caption, Mention, Scene, colour_name
from kinetiq.text import encode_prompts

PLACES = (0.1, 0.4, 0.7)  # of the sampler's steps, from noise to clip


@dataclass(frozen=True)
class SiteProbe:
    """What one attention site does.

    Args:
        site: which.
        entropy: mean entropy of its attention weights, of the greatest possible, 0 to 1. At a
            cross-attention site the padding of the prompt counts among what can be looked at.
        effect: relative change of the network's output when its output is zero.
    """

    site: Site
    entropy: float
    effect: float


@dataclass(frozen=True)
class _Inputs:
    """What the network is given at one step."""

    latents: Tensor
    timesteps: Tensor
    text: Tensor


@torch.inference_mode()
def probe_sites(engine: Engine, pairs: Sequence[TransferPair]) -> list[SiteProbe]:
    """Probe every attention site on the references of `pairs`.

    Self-attention is probed as the network denoises a reference whose prompt is unknown, so that
    what agrees over the clip does so by attention; cross-attention with a caption that says all
    that the reference shows. The stock network is probed: kernels that compute a whole layer would
    hide its parts.
    """
    network = engine.checkpoint.unet
    captions = [_full_caption(pair.scene).text for pair in pairs]
    silent, told = (_inputs(engine, pairs, prompts) for prompts in ([""] * len(pairs), captions))
    probes = []
    with _stock(engine):
        for inputs, crosses in ((silent, False), (told, True)):
            sites = [s for s in engine.denoiser.sites if (s.kind is SiteKind.CROSS) is crosses]
            entropies: dict[str, list[float]] = {site.name: [] for site in sites}
            with _watched(network, entropies):
                outputs = [_predict(network, given) for given in inputs]
            for site in sites:
                mute = network.get_submodule(site.name).to_out[0].register_forward_hook(_silence)
                changes = [
                    float((_predict(network, given) - output).norm() / output.norm())
                    for given, output in zip(inputs, outputs, strict=True)
                ]
                mute.remove()
                probes.append(SiteProbe(site, _mean(entropies[site.name]), _mean(changes)))
    order = [site.name for site in engine.denoiser.sites]
    return sorted(probes, key=lambda probe: order.index(probe.site.name))


@contextmanager
def _stock(engine: Engine) -> Iterator[None]:
    """Take our modules out of the network for the time of the block."""
    if not isinstance(engine.denoiser, EagerDenoiser):
        yield
        return
    engine.denoiser.detach()
    try:
        yield
    finally:
        engine.denoiser.attach()


def _predict(network: Any, given: _Inputs) -> Tensor:
    out: Tensor = network(given.latents, given.timesteps, given.text, return_dict=False)[0]
    return out


def _full_caption(scene: Scene) -> Caption:
    """Everything that a caption can say of a scene."""
    mentions = tuple(
        Mention(sprite.shape, colour_name(sprite.hue), sprite.texture, sprite.path.motion)
        for sprite in scene.sprites
    )
    return Caption(mentions, colour_name(scene.background_hue))


def _inputs(engine: Engine, pairs: Sequence[TransferPair], prompts: Sequence[str]) -> list[_Inputs]:
    """What the network is given for the references at each of the steps."""
    checkpoint = engine.checkpoint
    table = build_sampler_table(
        checkpoint.scheduler, checkpoint.scheduler_config, engine.defaults.steps
    )
    clean = torch.stack([engine.encode(pair.reference()) for pair in pairs])
    text = encode_prompts(checkpoint, list(prompts))
    if engine.family is ANIMATEDIFF:  # whose pipeline, not whose network, says it to every frame
        text = text.repeat_interleave(clean.shape[2], dim=0)
    rows = [table.row(round(place * (table.steps - 1))) for place in PLACES]
    return [
        _Inputs(
            _noised(clean, row, seed).to(checkpoint.dtype),
            torch.full((len(pairs),), float(row.timestep), device=clean.device),
            text,
        )
        for seed, row in enumerate(rows)
    ]


def _noised(clean: Tensor, row: SamplerRow, seed: int) -> Tensor:
    """The network's input at a step, a z + b ε."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return row.source_signal * clean + row.source_noise * noise.to(clean)


@contextmanager
def _watched(network: Any, entropies: dict[str, list[float]]) -> Iterator[None]:
    """Add the entropy of every site named, once for each run of the network in the block."""
    hooks = []
    for name, found in entropies.items():
        module = network.get_submodule(name)
        seen: dict[str, Tensor] = {}
        for part in ("to_q", "to_k"):
            hook = _entropy_hook(part, seen, module.heads, found)
            hooks.append(getattr(module, part).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _entropy_hook(part: str, seen: dict[str, Tensor], heads: int, found: list[float]) -> Any:
    """Keeps the output of a projection; the entropy is taken when both are there."""

    def hook(_: Any, __: Any, output: Tensor) -> None:
        seen[part] = output
        if len(seen) == 2:
            found.append(_entropy(seen.pop("to_q"), seen.pop("to_k"), heads))

    return hook


def _entropy(query: Tensor, key: Tensor, heads: int) -> float:
    """Mean entropy of softmax(q k / sqrt(d)) over its maximum; tensors [batch, tokens, C]."""
    q, k = (t.float().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean()
    return float(entropy / torch.tensor(float(k.shape[-2])).log())


def _silence(_: Any, __: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
