"""Skip connections: which there are, and that each row's start where its controls say."""

import copy

import pytest
import tiny
import torch
from stock import predict_stock

import kinetiq as kq
from kinetiq.attention import Signal
from kinetiq.control_tensors import ControlTensors, SkipControl
from kinetiq.denoiser import EagerDenoiser
from kinetiq.families import ANIMATEDIFF, UNET3D, detect_family
from kinetiq.skips import attach_skips, choose_highway, list_skips

TINY = {"animatediff": tiny.tiny_animatediff, "unet3d": tiny.tiny_unet3d}
TOLERANCE = 1e-4  # of the largest value: the project's word for "equal" in float32
FRAMES = 3


@pytest.fixture(params=TINY)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def networks():
    """Two layers a level, as real checkpoints have, so that blocks read several skips."""
    return {family: build(layers_per_block=2) for family, build in TINY.items()}


def sample(rows=2):
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(rows, 4, FRAMES, 8, 8, generator=rng)
    text = torch.randn(rows, 5, tiny.CROSS_WIDTH, generator=rng)
    return latents, 999 * torch.rand(rows, generator=rng), text


def control(skips, rows, source=None, gain=None):
    made = SkipControl(torch.zeros(len(skips), rows), torch.ones(len(skips), rows))
    for index, values in (source or {}).items():
        made.source[index] = torch.tensor(values)
    for index, values in (gain or {}).items():
        made.gain[index] = torch.tensor(values)
    return made


def seen_by_readers(network, skips, run):
    """What each reader's input ends in: the skip connection as it arrives."""
    seen = {}

    def keep(skip):
        def hook(_, given, named):
            joined = given[0] if given else named["input_tensor"]
            seen[skip.reader] = joined[:, -skip.channels :].clone()

        return hook

    handles = [
        network.get_submodule(skip.reader).register_forward_pre_hook(keep(skip), with_kwargs=True)
        for skip in skips
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


def test_lists_what_the_network_writes_in_order(networks, family):
    network = networks[family]
    skips = list_skips(network, detect_family(network))
    written, seen = {}, {}

    def write(name):
        def hook(_, __, output):
            written[name] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    handles = [
        network.get_submodule(skip.writer).register_forward_hook(write(skip.writer))
        for skip in skips
    ]
    seen = seen_by_readers(network, skips, lambda: predict_stock(network, family, *sample()))
    for handle in handles:
        handle.remove()
    assert len(skips) == len(seen) == 9
    for skip in skips:
        frames_and_rows = seen[skip.reader]
        assert frames_and_rows.shape[1] == skip.channels
        assert torch.equal(written[skip.writer].reshape(frames_and_rows.shape), frames_and_rows)


def test_a_control_of_nothing_changes_no_bit(networks, family):
    network = networks[family]
    denoiser = EagerDenoiser(network).attach()
    given = sample()
    wanted = denoiser.predict(*given)
    got = denoiser.predict(*given, ControlTensors(skip=control(denoiser.skips, 2)))
    denoiser.detach()
    assert torch.equal(got, wanted)


def test_only_the_chosen_skips_of_the_chosen_rows_change(networks, family):
    network = networks[family]
    denoiser = EagerDenoiser(network).attach()
    given, skips = sample(), denoiser.skips
    moved = next(i for i, skip in enumerate(skips) if skip.temporal is not None)
    stronger = next(i for i, skip in enumerate(skips) if skip.temporal is None)
    before = {}
    name = skips[moved].temporal
    hook = network.get_submodule(name).register_forward_pre_hook(
        lambda _, args: before.update(args=args[0].clone())
    )
    plain = seen_by_readers(network, skips, lambda: denoiser.predict(*given))
    hook.remove()
    chosen = ControlTensors(
        skip=control(skips, 2, source={moved: [0.0, 1.0]}, gain={stronger: [1.5, 1.0]})
    )
    steered = seen_by_readers(network, skips, lambda: denoiser.predict(*given, chosen))
    denoiser.detach()
    for index, skip in enumerate(skips):
        was, got = plain[skip.reader], steered[skip.reader]
        if index == moved:
            assert torch.equal(got[:FRAMES], was[:FRAMES])
            assert torch.equal(got[FRAMES:], before["args"][FRAMES:])
            assert not torch.equal(got[FRAMES:], was[FRAMES:])
        elif index == stronger:
            assert torch.equal(got[:FRAMES], 1.5 * was[:FRAMES])
            assert torch.equal(got[FRAMES:], was[FRAMES:])
        else:
            assert torch.equal(got, was)


def plain_highway(network, family, given, moved, stronger, beta):
    """The same on the stock network, with hooks that share nothing with ours but the names.

    `moved` and `stronger` are readers, in the order of up blocks and their ResNet blocks.
    """
    inputs, handles = {}, []
    folder = "motion_modules" if family == "animatediff" else "temp_attentions"
    for number, block in enumerate(network.down_blocks):
        for layer, module in enumerate(getattr(block, folder, [])):

            def keep(_, args, kwargs, key=(number, layer)):
                inputs[key] = (args[0] if args else kwargs["hidden_states"]).clone()

            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    stack = [None]  # conv_in
    for number, block in enumerate(network.down_blocks):
        temporal = len(getattr(block, folder, [])) > 0
        stack += [(number, layer) if temporal else None for layer in range(len(block.resnets))]
        stack += [None] if block.downsamplers is not None else []
    for number, block in enumerate(network.up_blocks):
        for layer, resnet in enumerate(block.resnets):
            origin, reader = stack.pop(), (number, layer)
            if reader not in moved and reader not in stronger:
                continue

            def reroute(_, args, kwargs, origin=origin, reader=reader, own=resnet):
                joined, *others = [*args, *kwargs.values()]  # by position, or all by name
                if reader in moved:
                    skip = inputs[origin]
                else:
                    width = own.in_channels - hidden_width(network, *reader)
                    skip = joined[:, -width:]
                hidden = joined[:, : joined.shape[1] - skip.shape[1]]
                factor = beta if reader in stronger else 1.0
                return (torch.cat([hidden, factor * skip], dim=1), *others), {}

            handles.append(resnet.register_forward_pre_hook(reroute, with_kwargs=True))
    out = predict_stock(network, family, *given)
    for handle in handles:
        handle.remove()
    return out


def hidden_width(network, number, layer):
    """Channels that enter a ResNet block of an up block beside the skip connection."""
    if layer > 0:
        return network.up_blocks[number].resnets[layer - 1].out_channels
    if number > 0:
        return network.up_blocks[number - 1].resnets[-1].out_channels
    return network.mid_block.resnets[-1].out_channels


# (up block, ResNet block) of the readers whose skip connection a temporal transformer writes:
# three levels of two layers, downsamplers between them; the deepest level of UNet3D has none.
BEHIND_TEMPORAL = {
    "animatediff": {(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)},
    "unet3d": {(1, 0), (1, 1), (2, 0), (2, 1)},
}
RELEASED_MOVED = {(1, 0), (1, 1)}
RELEASED_STRONGER = {(1, 0), (1, 1), (1, 2), (2, 0)}


@pytest.mark.parametrize("which", ["all", "released"])
def test_a_highway_equals_the_stock_network_with_hooks(networks, family, which):
    network = networks[family]
    given, beta = sample(), 1.3
    moved, stronger = {
        "all": (BEHIND_TEMPORAL[family], BEHIND_TEMPORAL[family]),
        "released": (RELEASED_MOVED, RELEASED_STRONGER),
    }[which]
    wanted = plain_highway(network, family, given, moved, stronger, beta)
    untouched = predict_stock(network, family, *given)
    denoiser = EagerDenoiser(network).attach()
    sources, gains = choose_highway(network, denoiser.skips, which)
    skip = SkipControl(
        torch.tensor(sources).float()[:, None].repeat(1, 2),
        torch.where(torch.tensor(gains), beta, 1.0)[:, None].repeat(1, 2),
    )
    got = denoiser.predict(*given, ControlTensors(skip=skip))
    denoiser.detach()
    scale = wanted.abs().max()
    assert (got - wanted).abs().max() <= TOLERANCE * scale
    assert (untouched - wanted).abs().max() > 0.01 * scale


def test_released_names_the_skips_of_the_released_code():
    """Of ZeroScope's layout: the two layers of down block 2, and the strength of four."""
    config = {"block_out_channels": (16, 32, 32, 32), "layers_per_block": 2}
    down = ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",)
    up = ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3
    network = tiny.tiny_unet3d(down_block_types=down, up_block_types=up, **config)
    skips = list_skips(network, UNET3D)
    moved, stronger = choose_highway(network, skips, "released")
    assert [s.temporal for s, chosen in zip(skips, moved, strict=True) if chosen] == [
        "down_blocks.2.temp_attentions.0",
        "down_blocks.2.temp_attentions.1",
    ]
    assert [s.reader for s, chosen in zip(skips, stronger, strict=True) if chosen] == [
        "up_blocks.2.resnets.0",
        "up_blocks.1.resnets.2",
        "up_blocks.1.resnets.1",
        "up_blocks.1.resnets.0",
    ]


def test_a_network_without_such_skips_is_refused():
    network = tiny.tiny_animatediff(
        down_block_types=("DownBlockMotion",) * 3, up_block_types=("UpBlockMotion",) * 3
    )
    skips = list_skips(network, ANIMATEDIFF)
    assert sum(choose_highway(network, skips, "all")[0]) == 3
    with pytest.raises(kq.RequestError, match="'released' needs an up block with spatial attent"):
        choose_highway(network, skips, "released")
    bare = tuple(skip for skip in skips if skip.temporal is None)
    with pytest.raises(kq.RequestError, match="'all' needs a skip connection behind a temporal"):
        choose_highway(network, bare, "all")


def test_hooks_can_be_taken_off(networks):
    network = copy.deepcopy(networks["unet3d"])
    given = sample()
    wanted = predict_stock(network, "unet3d", *given)
    skips = list_skips(network, UNET3D)
    signal = Signal(FRAMES, ControlTensors(skip=control(skips, 2, gain={0: [2.0, 2.0]})))
    signal.before_temporal.update(
        {s.temporal: torch.zeros(2 * FRAMES, s.channels, 1, 1) for s in skips if s.temporal}
    )
    handles = attach_skips(network, skips[:1], signal)
    assert not torch.equal(predict_stock(network, "unet3d", *given), wanted)
    for handle in handles:
        handle.remove()
    assert torch.equal(predict_stock(network, "unet3d", *given), wanted)
