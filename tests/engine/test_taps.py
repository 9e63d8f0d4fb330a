"""The network is run as far as a tap, and no further; what comes is what the block returns."""

import pytest
import tiny
import torch
from torch import nn

import kinetiq as kq
from kinetiq.control_tensors import ControlTensors, DeviationControl, QueryControl, no_injection
from kinetiq.denoiser import NO_CONTROLS, EagerDenoiser
from kinetiq.families import SiteKind
from kinetiq.kernels import frame_attention_with_motion, motion_feature
from kinetiq.recomputation import Recomputation, Recomputed
from kinetiq.taps import DEFAULT_TAP, Tap, find_tap, list_taps, run_to_tap

NAMES = [
    *(f"down_blocks.{number}" for number in range(3)),
    "mid_block",
    *(f"up_blocks.{number}" for number in range(3)),
]
WIDTHS = [16, 32, 32, 32, 32, 32, 16]
SIDES = [4, 2, 2, 2, 4, 8, 8]  # of an 8x8 latent, behind each block


@pytest.fixture(params=tiny.NETWORKS)
def denoiser(request):
    return EagerDenoiser(tiny.NETWORKS[request.param]()).attach()


def sample(rows=2, frames=3):
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(rows, 4, frames, 8, 8, generator=rng)
    text = torch.randn(rows, 5, tiny.CROSS_WIDTH, generator=rng)
    return latents, torch.tensor([20.0, 700.0])[:rows], text


def steering(denoiser, rows):
    """Row 0 takes queries and deviations of the last row."""
    row = no_injection(len(denoiser.sites), rows)
    row[:, 0] = rows - 1
    blend = torch.ones(len(denoiser.sites), rows)
    return ControlTensors(
        QueryControl(row, torch.ones(rows)), DeviationControl(row, blend, torch.ones(rows, 3))
    )


def watched(denoiser, name, *given):
    """What the block returns in an ordinary prediction."""
    seen = []
    handle = denoiser.network.get_submodule(name).register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    denoiser.predict(*given)
    handle.remove()
    return seen[0]


def test_taps_are_the_blocks_in_the_order_in_which_they_run(denoiser):
    assert list_taps(denoiser.network) == tuple(map(Tap, NAMES, WIDTHS))
    assert find_tap(denoiser.network) == Tap(DEFAULT_TAP, 32)


@pytest.mark.parametrize(("name", "width", "side"), list(zip(NAMES, WIDTHS, SIDES, strict=True)))
def test_features_are_what_the_block_returns_in_a_prediction(denoiser, name, width, side):
    given = (*sample(), steering(denoiser, 2))
    got = denoiser.features(*given, name)
    assert got.shape == (2, 3, side, side, width)
    wanted = watched(denoiser, name, *given)  # [rows * frames, channels, h, w]
    for row in range(2):
        for frame in range(3):
            assert torch.equal(got[row, frame], wanted[3 * row + frame].permute(1, 2, 0))


def temporal_taps(denoiser):
    return [site.name for site in denoiser.sites if site.kind is SiteKind.TEMPORAL]


def added_by(denoiser, name, *given):
    """What a temporal attention returns in an ordinary prediction, behind its projection."""
    seen = []
    handle = denoiser.network.get_submodule(f"{name}.to_out.1").register_forward_hook(
        lambda _, __, output: seen.append(output)
    )
    denoiser.predict(*given)
    handle.remove()
    return seen[0]


def test_temporal_attentions_are_taps_of_what_they_add(denoiser):
    given = (*sample(), steering(denoiser, 2))
    for name in temporal_taps(denoiser):
        wanted = added_by(denoiser, name, *given)  # [rows, frames, tokens, channels]
        got = denoiser.features(*given, name)
        found = find_tap(denoiser.network, name)
        assert found.is_attention and got.shape[-1] == found.channels
        assert got.shape[:2] == (2, 3) and got.shape[2] == got.shape[3]
        assert torch.equal(got.flatten(2, 3), wanted)


def test_what_an_attention_adds_holds_what_the_operator_projects_on_the_way(denoiser):
    name = next(tap for tap in temporal_taps(denoiser) if tap.startswith("up_blocks.1."))
    attention, channels = denoiser.network.get_submodule(name), torch.tensor([3, 0, 17])
    projected = {}
    for part in ("to_q", "to_k", "to_v"):
        attention.get_submodule(part).register_forward_hook(
            lambda _, __, output, part=part: projected.update({part: output})
        )
    features = denoiser.features(*sample(), NO_CONTROLS, name)
    _, motion = frame_attention_with_motion(
        *projected.values(),
        attention.to_out[0].weight.T[:, channels].contiguous(),
        heads=attention.heads,
    )
    wanted = motion_feature(features.flatten(2, 3), channels)
    assert (motion - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_controls_act_on_features(denoiser):
    plain = denoiser.features(*sample())
    steered = denoiser.features(*sample(), steering(denoiser, 2))
    assert (steered[0] - plain[0]).abs().max() > 0.05 * plain.abs().max()
    # The row that is read stays what it was, but for the rounding of another kernel.
    assert (steered[1] - plain[1]).abs().max() <= 1e-4 * plain.abs().max()


def test_nothing_behind_the_tap_is_run(denoiser):
    network, called = denoiser.network, []
    for name, module in network.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    denoiser.features(*sample())
    behind = ("up_blocks.2", "conv_norm_out", "conv_act", "conv_out")
    assert called[-1] == "up_blocks.1"
    assert not [name for name in called if name.startswith(behind)]
    before = [name for name in called if name]
    called.clear()
    denoiser.predict(*sample())
    assert called[: len(before)] == before  # all before it is
    assert "up_blocks.2" in called


def test_features_can_be_differentiated_in_float64(denoiser):
    denoiser.network.double()
    latents, timesteps, text = (tensor.double() for tensor in sample(rows=1, frames=2))
    latents.requires_grad_()
    rng = torch.Generator().manual_seed(1)
    weights = torch.randn(1, 2, 8, 8, 32, dtype=torch.float64, generator=rng)
    loss = lambda given: (denoiser.features(given, timesteps, text) * weights).sum()
    (slope,) = torch.autograd.grad(loss(latents), latents)
    direction = torch.randn(slope.shape, dtype=torch.float64, generator=rng)
    with torch.no_grad():
        ahead, behind = (loss(latents + sign * 1e-5 * direction) for sign in (1, -1))
    torch.testing.assert_close(
        (slope * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("attention", [False, True])
def test_recomputed_features_have_the_same_gradient(denoiser, attention):
    latents, timesteps, text = sample()
    controls = steering(denoiser, 2)
    tap = temporal_taps(denoiser)[-3] if attention else DEFAULT_TAP

    def gradient():
        given = latents.clone().requires_grad_()
        denoiser.features(given, timesteps, text, controls, tap).square().sum().backward()
        return given.grad

    wanted = gradient()
    with Recomputation(denoiser, ()).active():
        assert any(isinstance(module, Recomputed) for module in denoiser.network.modules())
        assert torch.equal(gradient(), wanted)


def test_nothing_behind_a_tapped_attention_but_its_transformer_is_run(denoiser):
    network, called = denoiser.network, []
    for name, module in network.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    tap = next(tap for tap in temporal_taps(denoiser) if tap.startswith("up_blocks.1."))
    denoiser.features(*sample(), NO_CONTROLS, tap)
    assert called[-1] == tap.partition(".transformer_blocks.")[0]
    assert denoiser.signal.output_capture is None


def test_rows_are_watched_at_blocks_alone(denoiser):
    tap = temporal_taps(denoiser)[0]
    with (
        pytest.raises(kq.RequestError, match=r"^tap: must be a block where rows are watched"),
        denoiser.watching(torch.tensor([0]), torch.zeros(1, 0), tap),
    ):
        pass


def test_it_leaves_the_network_and_the_signal_as_they_were(denoiser):
    wanted = denoiser.predict(*sample())
    block = denoiser.network.get_submodule(DEFAULT_TAP)
    denoiser.features(*sample(), steering(denoiser, 2))
    assert not block._forward_hooks
    assert denoiser.signal.controls is NO_CONTROLS
    latents, timesteps, text = sample()
    with pytest.raises(RuntimeError):  # a prompt of another width
        denoiser.features(latents, timesteps, text[..., :-1], steering(denoiser, 2))
    assert not block._forward_hooks
    assert denoiser.signal.controls is NO_CONTROLS
    assert torch.equal(denoiser.predict(*sample()), wanted)


def test_an_unknown_tap_is_refused_with_the_known_ones(denoiser):
    kind = type(denoiser.network).__name__
    said = rf"^tap: must be a block of this {kind}: {', '.join(NAMES)}; or one of its temporal .* got 'up_blocks.3'$"
    with pytest.raises(kq.RequestError, match=said):
        denoiser.features(*sample(), NO_CONTROLS, "up_blocks.3")
    with pytest.raises(kq.RequestError, match=r"got 'up_blocks.1.resnets.0'$"):
        find_tap(denoiser.network, "up_blocks.1.resnets.0")


def test_a_detached_denoiser_is_refused(denoiser):
    denoiser.detach()
    with pytest.raises(kq.RequestError, match=r"^features: the denoiser must be attached"):
        denoiser.features(*sample())


def test_a_network_that_skips_the_tap_is_refused():
    network = nn.ModuleDict({"mid_block": nn.Identity()})
    with pytest.raises(kq.RequestError, match=r"^tap: mid_block must be run by the network"):
        run_to_tap(network, Tap("mid_block", 1), lambda: None)
    assert not network["mid_block"]._forward_hooks
