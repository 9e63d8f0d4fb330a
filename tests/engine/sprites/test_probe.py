import pytest
import torch

import kinetiq as kq
from kinetiq.families import SiteKind
from kinetiq.sampler import build_sampler_table
from kinetiq.sprites import probe
from kinetiq.sprites.cases import transfer_pairs


@pytest.mark.parametrize("keys", [4, 6])
def test_entropy_is_one_for_uniform_attention_and_zero_for_a_single_look(keys):
    query, key = torch.zeros(2, 6, 16), torch.randn(2, keys, 16)
    assert probe._entropy(query, key, 2) == pytest.approx(1.0)
    one_hot = torch.nn.functional.one_hot(torch.arange(keys), 8).float()
    looks = one_hot.repeat(2, 1, 2)
    assert probe._entropy(100 * looks, looks, 2) == pytest.approx(0.0, abs=1e-6)
    assert 0.1 < probe._entropy(4 * looks, looks, 2) < 0.95


@pytest.mark.parametrize("family", ["animatediff", "unet3d"])
def test_probes_every_site_and_leaves_the_network_alone(tiny_folder, monkeypatch, family):
    monkeypatch.setattr(probe, "PLACES", (0.5,))
    with kq.Engine.load(tiny_folder(family)) as engine:
        probes = probe.probe_sites(engine, transfer_pairs(1))
        sites = engine.denoiser.sites
        hooks = [m for m in engine.checkpoint.unet.modules() if m._forward_hooks]
        assert engine.denoiser.attached
    assert {site.kind for site in sites} == set(SiteKind)
    assert [one.site for one in probes] == list(sites)
    assert all(0 < one.entropy <= 1 and one.effect > 0 for one in probes)
    assert not hooks


def test_the_network_is_attached_again_after_a_failure(tiny_folder, monkeypatch):
    def fail(*_):
        raise RuntimeError("no more")

    with kq.Engine.load(tiny_folder()) as engine:
        monkeypatch.setattr(probe, "_predict", fail)
        with pytest.raises(RuntimeError, match="no more"):
            probe.probe_sites(engine, transfer_pairs(1))
        assert engine.denoiser.attached
        assert not [m for m in engine.checkpoint.unet.modules() if m._forward_hooks]


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_references_are_noised_as_the_sampler_of_the_checkpoint_would(tiny_folder, sampler):
    """In the very units that the network sees: a² + b² = 1 for every sampler."""
    with kq.Engine.load(tiny_folder()) as engine:
        config = engine.checkpoint.scheduler_config
        row = build_sampler_table(sampler, config, engine.defaults.steps).row(3)
    clean = torch.full((1, 4, 2, 64, 64), 2.0)
    noised = probe._noised(clean, row, seed=0)
    assert noised.mean().item() == pytest.approx(2.0 * row.source_signal, abs=0.03)
    assert noised.std().item() == pytest.approx(row.source_noise, abs=0.03)
    assert row.source_signal**2 + row.source_noise**2 == pytest.approx(1.0)


def test_cross_attention_is_told_what_the_reference_shows(tiny_folder, monkeypatch):
    told = []
    encode = probe.encode_prompts
    monkeypatch.setattr(
        probe, "encode_prompts", lambda parts, texts: told.append(texts) or encode(parts, texts)
    )

    def stop(_):
        raise RuntimeError("both prompts are known by now")

    monkeypatch.setattr(probe, "_stock", stop)
    pair = transfer_pairs(1)[0]
    with (
        kq.Engine.load(tiny_folder()) as engine,
        pytest.raises(RuntimeError, match="both prompts are known"),
    ):
        probe.probe_sites(engine, [pair])
    assert told[0] == [""]
    words = told[1][0].split()
    assert pair.sprite.shape in words and pair.sprite.texture in words
    assert pair.caption.text != told[1][0]
