import pytest
import torch

import kinetiq as kq
from kinetiq.families import SiteKind
from kinetiq.sprites import probe
from kinetiq.sprites.cases import transfer_pairs


@pytest.mark.parametrize("kind", [SiteKind.SPATIAL, SiteKind.TEMPORAL])
def test_entropy_is_one_for_uniform_attention_and_zero_for_a_single_look(kind):
    frames, tokens = 4, 6
    shape = (2, frames, tokens, 16)
    uniform = probe._entropy(torch.zeros(shape), torch.randn(shape), 2, kind)
    place = torch.arange(tokens) if kind is SiteKind.SPATIAL else torch.arange(frames)[:, None]
    one_hot = torch.nn.functional.one_hot(place.expand(frames, tokens), 8).float()
    looks = one_hot.repeat(2, 1, 1, 2).reshape(2, frames, tokens, 16)
    assert uniform == pytest.approx(1.0)
    assert probe._entropy(100 * looks, looks, 2, kind) == pytest.approx(0.0, abs=1e-6)
    assert 0.1 < probe._entropy(4 * looks, looks, 2, kind) < 0.95


def test_probes_every_self_attention_site_and_leaves_the_network_alone(tiny_folder, monkeypatch):
    monkeypatch.setattr(probe, "TIMESTEPS", (500,))
    with kq.Engine.load(tiny_folder()) as engine:
        probes = probe.probe_sites(engine, transfer_pairs(1))
        kinds = {site.kind for site in engine.denoiser.sites}
        count = sum(site.kind is not SiteKind.CROSS for site in engine.denoiser.sites)
        hooks = [m for m in engine.checkpoint.unet.modules() if m._forward_hooks]
    assert kinds == set(SiteKind)
    assert len(probes) == count
    assert all(0 < one.entropy < 1 and one.effect > 0 for one in probes)
    assert not hooks
