"""What attention does in a network: how sharp each site looks, and what it is worth.

The probe runs the denoiser on rendered clips noised to a few timesteps. Entropy near 1 is a site
that looks everywhere alike; an effect near 0 is a site that could as well not be there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kinetiq.control_tensors import ControlTensors
from kinetiq.engine import Engine
from kinetiq.families import Site, SiteKind
from kinetiq.sprites.cases import TransferPair
from kinetiq.text import encode_prompts

TIMESTEPS = (900, 600, 300)


@dataclass(frozen=True)
class SiteProbe:
    """What one attention site does.

    Args:
        site: which.
        entropy: mean entropy of its attention weights, of the greatest possible, 0 to 1.
        effect: relative change of the network's output when its output is zero.
    """

    site: Site
    entropy: float
    effect: float


@torch.inference_mode()
def probe_sites(engine: Engine, pairs: Sequence[TransferPair]) -> list[SiteProbe]:
    """Probe every self-attention site on the references of `pairs`.

    The network is probed as it denoises a reference whose prompt is unknown.
    """
    batches = [_noised(engine, pairs, timestep) for timestep in TIMESTEPS]
    outputs = [engine.denoiser.predict(*batch) for batch in batches]
    probes = []
    for site in engine.denoiser.sites:
        if site.kind is SiteKind.CROSS:
            continue
        module = engine.checkpoint.unet.get_submodule(site.name)
        seen: dict[str, Tensor] = {}
        hooks = [
            getattr(module, name).register_forward_hook(_keep(seen, name))
            for name in ("to_q", "to_k")
        ]
        entropies = []
        for batch in batches:
            engine.denoiser.predict(*batch)
            entropies.append(_entropy(seen["to_q"], seen["to_k"], module.heads, site.kind))
        for hook in hooks:
            hook.remove()
        mute = module.to_out[0].register_forward_hook(_silence)
        changes = [
            float((engine.denoiser.predict(*batch) - output).norm() / output.norm())
            for batch, output in zip(batches, outputs, strict=True)
        ]
        mute.remove()
        probes.append(SiteProbe(site, _mean(entropies), _mean(changes)))
    return probes


def _noised(
    engine: Engine, pairs: Sequence[TransferPair], timestep: int
) -> tuple[Tensor, Tensor, Tensor, ControlTensors]:
    """What the denoiser is given for the references at one timestep."""
    from kinetiq.sprites.components import build_scheduler

    clean = torch.stack([engine.encode(pair.reference()) for pair in pairs])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(timestep))
    share = float(build_scheduler().alphas_cumprod[timestep])
    latents = share**0.5 * clean + (1 - share) ** 0.5 * noise.to(clean)
    text = encode_prompts(engine.checkpoint, [""]).expand(len(pairs), -1, -1)
    times = torch.full((len(pairs),), float(timestep), device=clean.device)
    return latents.to(engine.checkpoint.dtype), times, text, ControlTensors()


def _entropy(query: Tensor, key: Tensor, heads: int, kind: SiteKind) -> float:
    """Mean entropy of softmax(q k / sqrt(d)) over its maximum; tensors [rows, F, tokens, C]."""
    q, k = (t.float().unflatten(-1, (heads, -1)) for t in (query, key))
    order = (0, 1, 3, 2, 4) if kind is SiteKind.SPATIAL else (0, 2, 3, 1, 4)
    q, k = q.permute(order), k.permute(order)
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean()
    return float(entropy / torch.tensor(float(k.shape[-2])).log())


def _keep(seen: dict[str, Tensor], name: str) -> Any:
    def hook(_: Any, __: Any, output: Tensor) -> None:
        seen[name] = output

    return hook


def _silence(_: Any, __: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
