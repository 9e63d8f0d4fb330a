"""Adapters that are there for training alone, and the way around the temporal layers."""

import copy
from contextlib import ExitStack

import pytest
import tiny
import torch
from stock import predict_stock

from kinetiq.denoiser import EagerDenoiser
from kinetiq.families import SiteKind
from kinetiq.spatial_lora import Adapter, Bypass, LowRank, draw_low_rank, spatial_linears


@pytest.fixture
def adapt():
    """Makes adapters, and detaches them at the end."""
    with ExitStack() as stack:

        def make(network, paths):
            adapter = Adapter(network, paths)
            stack.callback(adapter.detach)
            return adapter

        yield make


def sample(rows=1, frames=3, height=8, width=8, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(rows, 4, frames, height, width, generator=rng)
    text = torch.randn(rows, 5, tiny.CROSS_WIDTH, generator=rng)
    return latents.to(dtype), 999 * torch.rand(rows, generator=rng), text.to(dtype)


def random_weights(network, paths, rank=2):
    rng = torch.Generator().manual_seed(1)
    weights = {}
    for path in paths:
        linear = network.get_submodule(path)
        weights[path] = LowRank(
            torch.randn(rank, linear.in_features, generator=rng) / linear.in_features**0.5,
            torch.randn(linear.out_features, rank, generator=rng) / rank**0.5,
        )
    return weights


def test_adapts_self_attentions_and_feed_forwards_of_frames_and_nothing_else(denoiser):
    paths = spatial_linears(denoiser.network, denoiser.family)
    spatial = [site.name for site in denoiser.sites if site.kind is SiteKind.SPATIAL]
    wanted = {
        f"{site}.{linear}" for site in spatial for linear in ("to_q", "to_k", "to_v", "to_out.0")
    }
    blocks = [site.removesuffix(".attn1") for site in spatial]
    wanted |= {f"{block}.ff.{linear}" for block in blocks for linear in ("net.0.proj", "net.2")}
    assert set(paths) == wanted and len(paths) == len(wanted) == 6 * len(spatial) > 0


def test_starts_as_nothing_with_initial_values_as_released(denoiser, adapt):
    paths = spatial_linears(denoiser.network, denoiser.family)
    weights = draw_low_rank(denoiser.network, paths, 4, torch.Generator().manual_seed(0))
    down = torch.cat([low.down.detach().flatten() for low in weights.values()])
    assert down.std() == pytest.approx(1 / 4, rel=0.05) and abs(down.mean()) < 0.02
    for path, low in weights.items():
        linear = denoiser.network.get_submodule(path)
        assert low.down.shape == (4, linear.in_features)
        assert low.up.shape == (linear.out_features, 4) and not low.up.any()
        assert low.down.requires_grad and low.up.requires_grad
    base = denoiser.predict(*sample())
    # Recorded attention takes other operators, so without a graph.
    with torch.no_grad(), adapt(denoiser.network, paths).acting(weights):
        assert torch.equal(denoiser.predict(*sample()), base)


def test_equals_the_change_merged_into_the_weights(denoiser, adapt):
    paths = spatial_linears(denoiser.network, denoiser.family)
    weights = random_weights(denoiser.network, paths)
    merged = copy.deepcopy(denoiser.detach())
    for path, low in weights.items():
        merged.get_submodule(path).weight.add_(low.up @ low.down)
    wanted = predict_stock(merged, denoiser.family.name, *sample())
    denoiser.attach()
    base = denoiser.predict(*sample())
    with adapt(denoiser.network, paths).acting(weights):
        got = denoiser.predict(*sample())
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert (got - base).abs().max() > 0.01 * wanted.abs().max()


def test_out_of_use_and_detached_the_network_is_what_it_was(denoiser):
    paths = spatial_linears(denoiser.network, denoiser.family)
    base = denoiser.predict(*sample())
    before = {name: value.clone() for name, value in denoiser.network.state_dict().items()}
    adapter = Adapter(denoiser.network, paths)
    with adapter.acting(random_weights(denoiser.network, paths)):
        assert not torch.equal(denoiser.predict(*sample()), base)
    assert torch.equal(denoiser.predict(*sample()), base)
    adapter.detach()
    assert torch.equal(denoiser.predict(*sample()), base)
    after = denoiser.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks for module in denoiser.network.modules())


def test_a_constant_records_nothing_but_lets_gradients_through():
    linear = torch.nn.Linear(3, 2).requires_grad_(False)
    network = torch.nn.Sequential(linear)
    weights = draw_low_rank(network, ["0"], 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        weights["0"].up.fill_(0.5)
    adapter = Adapter(network, ["0"])
    x = torch.randn(4, 3, requires_grad=True)
    with adapter.acting(weights):
        learning = network(x)
        wanted = torch.autograd.grad(learning.sum(), [x, *weights["0"]])
    with adapter.acting(weights, constant=True):
        standing = network(x)
        got = torch.autograd.grad(standing.sum(), [x, *weights["0"]], allow_unused=True)
        assert not network(x.detach()).requires_grad
    assert torch.equal(standing, learning) and torch.equal(got[0], wanted[0])
    assert got[1:] == (None, None) and all(gradient.any() for gradient in wanted[1:])


def test_dropout_leaves_out_part_of_the_change_and_keeps_its_mean():
    linear = torch.nn.Linear(1, 10_000, bias=False)
    linear.weight.data.zero_()
    network = torch.nn.Sequential(linear)
    adapter = Adapter(network, ["0"], dropout=0.25)
    weights = {"0": LowRank(torch.ones(1, 1), torch.ones(10_000, 1))}
    torch.manual_seed(0)
    with adapter.acting(weights):
        out = network(torch.ones(1, 1))
    assert out.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (out == 0).float().mean() == pytest.approx(0.25, abs=0.02)


def test_around_the_temporal_layers_is_the_image_model():
    """A UNetMotionModel is inflated from an image model, which is what must be left of it."""
    from diffusers import UNetMotionModel

    image = tiny.tiny_unet2d()
    network = UNetMotionModel.from_unet2d(image, tiny.tiny_adapter()).eval()
    denoiser = EagerDenoiser(network).attach()
    latents, timesteps, text = sample(rows=2, frames=1)
    base = denoiser.predict(latents, timesteps, text)
    with Bypass(network, denoiser.family).around():
        got = denoiser.predict(latents, timesteps, text)
    wanted = image(latents[:, :, 0], timesteps, text).sample[:, :, None]
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert (base - wanted).abs().max() > 0.01 * wanted.abs().max()
    assert torch.equal(denoiser.predict(latents, timesteps, text), base)


def test_around_the_temporal_layers_each_frame_is_alone(denoiser):
    latents, timesteps, text = sample(frames=4)
    bypass = Bypass(denoiser.network, denoiser.family)
    base = denoiser.predict(latents, timesteps, text)
    names = [name for name, _ in denoiser.network.named_modules()]
    with bypass.around():
        whole = denoiser.predict(latents, timesteps, text)
        alone = denoiser.predict(latents[:, :, 2:3], timesteps, text)
    assert (whole[:, :, 2:3] - alone).abs().max() <= 1e-4 * alone.abs().max()
    assert torch.equal(denoiser.predict(latents, timesteps, text), base)
    assert [name for name, _ in denoiser.network.named_modules()] == names
