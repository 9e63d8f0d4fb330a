"""Motion LoRA: by slot it is the merged network, row by row; its files; its arithmetic."""

import copy
import json
import stat

import attrs
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from stock import load_stock, predict_stock, record_projections

import kinetiq as kq
from kinetiq.control_tensors import (
    ControlTensors,
    MotionBank,
    MotionControl,
)
from kinetiq.controls import ResolvedControls
from kinetiq.denoiser import EagerDenoiser
from kinetiq.families import FAMILIES, SiteKind
from kinetiq.kernels import frame_attention
from kinetiq.motion_file import MotionInfo, write_motion
from kinetiq.motion_lora import (
    TARGETS,
    MotionLora,
    lora_paths,
    parse_public,
    resolve_motion_lora,
)
from kinetiq.rows import ClipState, build_batch

TOLERANCE = 1e-4  # of the largest value: the project's word for "equal" in float32
FRAMES = 3
TO_K = "up_blocks.1.motion_modules.0.transformer_blocks.0.attn1.to_k"


def info(family="animatediff", **changes):
    given = {"frames": FRAMES, "height": 8, "width": 8, "checkpoint": "tiny"}
    return MotionInfo(kind="lora", family=family, **(given | changes))


def make_lora(network, family, target="k", rank=2, seed=0, **switches):
    """A LoRA that changes what the network computes about as much as its weights do."""
    rng = torch.Generator().manual_seed(seed)
    down, up = {}, {}
    for path in lora_paths(network, FAMILIES[family], target):
        linear = network.get_submodule(path)
        wide, out = linear.in_features, linear.out_features
        down[path] = torch.randn(rank, wide, generator=rng) / wide**0.5
        up[path] = torch.randn(out, rank, generator=rng) / rank**0.5
    return MotionLora(down, up, info=info(family), **switches)


def merged(network, *terms):
    """A copy of the stock network with W + scale up down for its weights."""
    network = copy.deepcopy(network)
    for lora, scale in terms:
        for path, down in lora.down.items():
            network.get_submodule(path).weight.data += scale * lora.up[path] @ down
    return network


def sample(rows=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, 4, FRAMES, 8, 8, generator=rng)
    text = torch.randn(rows, 5, tiny.CROSS_WIDTH, generator=rng)
    return latents, 999 * torch.rand(rows, generator=rng), text


def resolve(denoiser, lora, steps=10):
    return resolve_motion_lora(lora, denoiser.network, denoiser.family, denoiser.skips, steps)


def clip_state(row, given, lora):
    latents, timesteps, text = given
    return ClipState(
        latents=latents[row],
        timestep=float(timesteps[row]),
        text=text[row],
        negative_text=None,
        controls=ResolvedControls(lora=lora),
    )


def predict(denoiser, given, loras):
    """One row a LoRA; None for a row without."""
    states = [clip_state(row, given, lora) for row, lora in enumerate(loras)]
    batch = build_batch(states, {}, len(denoiser.sites))
    return denoiser.predict(batch.latents, batch.timesteps, batch.text, batch.controls)


def assert_equal(got, wanted):
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def assert_differs(got, other):
    assert (got - other).abs().max() > 0.01 * other.abs().max()


# ---- what is adapted


@pytest.mark.parametrize("target", TARGETS)
def test_targets_are_the_linear_layers_of_temporal_transformers(networks, family, target):
    network = networks[family]
    paths = lora_paths(network, FAMILIES[family], target)
    ends = {
        "k": {"attn1.to_k", "attn2.to_k"},
        "k_out": {"attn1.to_k", "attn2.to_k", "attn1.to_out.0", "attn2.to_out.0"},
        "q": {"attn1.to_q", "attn2.to_q"},
        "v": {"attn1.to_v", "attn2.to_v"},
        "ff": {"ff.net.0.proj", "ff.net.2"},
    }
    ends["all"] = ends["k_out"] | ends["q"] | ends["v"] | ends["ff"]
    names = [name for name, _ in network.named_modules()]
    folders = {"animatediff": ("motion_modules",), "unet3d": ("temp_attentions", "transformer_in")}
    wanted = [
        name
        for name in names
        if any(folder in name for folder in folders[family])
        and name.partition(".transformer_blocks.0.")[2] in ends[target]
    ]
    assert list(paths) == wanted
    # six temporal transformers on two levels of attention, the rest without; one at the entrance
    assert len(paths) == len(ends[target]) * {"animatediff": 10, "unet3d": 8}[family]


def test_an_unknown_target(networks):
    with pytest.raises(kq.RequestError, match=r"target: must be one of k, k_out, .*, got 'keys'"):
        lora_paths(networks["unet3d"], FAMILIES["unet3d"], "keys")


# ---- what it computes


@pytest.mark.parametrize("target", TARGETS)
def test_by_slot_equals_merging_into_the_weights(networks, family, target):
    network, given = networks[family], sample()
    lora = make_lora(network, family, target, scale=0.7)
    wanted = predict_stock(merged(network, (lora, 0.7)), family, *given)
    denoiser = EagerDenoiser(network).attach()
    got = predict(denoiser, given, [resolve(denoiser, lora)] * 2)
    plain = denoiser.predict(*given)
    denoiser.detach()
    assert_equal(got, wanted)
    assert_differs(got, plain)


def test_rows_with_different_loras_ranks_and_highways_equal_each_alone(denoiser, networks, family):
    network, given = networks[family], sample(rows=5)
    loras = [
        make_lora(network, family, "k", rank=3, seed=1, highway="all"),
        make_lora(network, family, "all", rank=1, seed=2, scale=-0.5),
        None,
        make_lora(network, family, "ff", rank=4, seed=3, highway="released", beta=1.3),
        make_lora(network, family, "k_out", rank=2, seed=4, scale=0.3, highway="all", beta=0.9),
    ]
    resolved = [lora and resolve(denoiser, lora) for lora in loras]
    together = predict(denoiser, given, resolved)
    for row, lora in enumerate(resolved):
        own = tuple(part[row : row + 1] for part in given)
        assert_equal(together[row : row + 1], predict(denoiser, own, [lora]))


def test_scale_and_slot_zero_are_the_base_model_bit_for_bit(denoiser, networks, family):
    network, given = networks[family], sample()
    lora = make_lora(network, family, "all")
    base = denoiser.predict(*given)
    none = predict(denoiser, given, [resolve(denoiser, attrs.evolve(lora, scale=0.0))] * 2)
    assert torch.equal(none, base)
    beside = predict(denoiser, given, [resolve(denoiser, lora), None])
    assert torch.equal(beside[1], base[1])
    assert_differs(beside[0], base[0])


def test_keys_alone_leave_values_as_they_are(denoiser, networks, family, monkeypatch):
    """Given the input of a layer, v and q are the base model's; k is not."""
    network, given = networks[family], sample()
    lora = make_lora(network, family, "k")
    site = next(s.name for s in denoiser.sites if s.kind is SiteKind.TEMPORAL)  # of the first layer
    parts = [f"{site}.{name}" for name in ("to_q", "to_k", "to_v")]
    base = record_projections(network, parts, lambda: denoiser.predict(*given))
    attended = {}

    def keep(*args, **kwargs):
        attended.setdefault("qkv", args[:3])
        return frame_attention(*args, **kwargs)

    monkeypatch.setattr("kinetiq.attention.frame_attention", keep)
    predict(denoiser, given, [resolve(denoiser, lora)] * 2)
    query, key, value = attended["qkv"]
    assert torch.equal(query, base[parts[0]])
    assert torch.equal(value, base[parts[2]])
    assert_differs(key, base[parts[1]])


def test_only_the_conditional_half_is_changed_if_so_asked(denoiser, networks, family):
    network, given = networks[family], sample()
    lora = make_lora(network, family, "all", highway="all", halves="cond")
    latents, timesteps, text = given
    clip = ClipState(
        latents=latents[0],
        timestep=float(timesteps[0]),
        text=text[0],
        negative_text=text[1],
        controls=ResolvedControls(lora=resolve(denoiser, lora)),
    )
    batch = build_batch([clip], {}, len(denoiser.sites))
    got = denoiser.predict(batch.latents, batch.timesteps, batch.text, batch.controls)
    base = denoiser.predict(batch.latents, batch.timesteps, batch.text)
    assert torch.equal(got[1], base[1])
    assert_differs(got[0], base[0])


def test_with_an_embedding_equals_the_merged_network_moved_before_its_projections(networks, family):
    network, given = networks[family], sample()
    lora = make_lora(network, family, "all", rank=3, scale=0.6)
    stock = merged(network, (lora, 0.6))
    denoiser = EagerDenoiser(network).attach()
    rng = torch.Generator().manual_seed(7)
    banks, handles = {}, []
    scale = 0.8
    seen = record_shapes(network, denoiser, given)
    for index, site in enumerate(denoiser.sites):
        if site.kind is not SiteKind.TEMPORAL:
            continue
        tokens = seen[site.name]
        query_key = torch.randn(1, FRAMES, site.width, generator=rng)
        value = torch.randn(1, FRAMES, tokens, site.width, generator=rng)
        attention = network.get_submodule(site.name)
        none = torch.zeros_like(query_key), torch.zeros_like(value)
        banks[index] = MotionBank(
            query_key=torch.cat([none[0], query_key]),
            value=torch.cat([none[1], value]),
            projected_query=attention.to_q(torch.cat([none[0], query_key])),
            projected_key=attention.to_k(torch.cat([none[0], query_key])),
            projected_value=attention.to_v(torch.cat([none[1], value])),
        )
        moved = stock.get_submodule(site.name)
        for name, added in (
            ("to_q", query_key[0][None]),
            ("to_k", query_key[0][None]),
            # stock tokens are [rows * positions, frames, channels]
            ("to_v", value[0].transpose(0, 1).repeat(2, 1, 1)),
        ):
            handles.append(
                getattr(moved, name).register_forward_pre_hook(
                    lambda _, args, added=added: (args[0] + scale * added,)
                )
            )
    wanted = predict_stock(stock, family, *given)
    resolved = resolve(denoiser, lora)
    batch = build_batch(
        [clip_state(row, given, resolved) for row in range(2)], {}, len(denoiser.sites)
    )
    motion = MotionControl(torch.ones(2, dtype=torch.int64), torch.full((2,), scale), banks)
    controls = ControlTensors(motion=motion, lora=batch.controls.lora)
    got = denoiser.predict(*given, controls)
    without = denoiser.predict(*given, ControlTensors(lora=batch.controls.lora))
    denoiser.detach()
    assert_equal(got, wanted)
    assert_differs(got, without)


def record_shapes(network, denoiser, given):
    """How many positions each temporal site has."""
    paths = [f"{s.name}.to_v" for s in denoiser.sites if s.kind is SiteKind.TEMPORAL]
    seen = record_projections(network, paths, lambda: denoiser.predict(*given))
    return {path.removesuffix(".to_v"): tensor.shape[2] for path, tensor in seen.items()}


# ---- the phase window


def test_outside_its_window_the_prediction_is_the_base_models(denoiser, networks, family):
    network, given = networks[family], sample()
    lora = make_lora(network, family, "all", highway="all", until=0.3)
    controls = ResolvedControls(lora=resolve(denoiser, lora, steps=10))
    base = denoiser.predict(*given)
    for step in (0, 2, 3, 9):
        got = predict(denoiser, given, [controls.active(step).lora] * 2)
        if step < 3:
            assert_differs(got, base)
        else:
            assert torch.equal(got, base)


def test_a_window_of_all_steps_or_none_gives_the_two_limits(tiny_folder, family, networks):
    request = kq.Request("a ring", seed=1, frames=FRAMES, steps=4, guidance_scale=3.0)
    with kq.Engine.load(tiny_folder(family)) as engine:
        lora = make_lora(engine.checkpoint.unet, family, "k_out", highway="all")

        def run(**switches):
            control = attrs.evolve(lora, **switches) if switches else ()
            return next(engine.generate_latents([attrs.evolve(request, control=control)]))

        plain, never, always = run(), run(until=0.0), run(until=1.0)
        half = run(until=0.5)
        assert torch.equal(never, plain)
        for one, other in ((always, plain), (half, plain), (half, always)):
            assert_differs(one, other)


# ---- resolving


def test_a_lora_of_another_network_is_refused(denoiser, networks, family):
    other = {"animatediff": "unet3d", "unet3d": "animatediff"}[family]
    with pytest.raises(kq.CheckpointError, match=f"family of the network, {family}, got {other}"):
        resolve(denoiser, make_lora(networks[other], other))
    lora = make_lora(networks[family], family)
    first = next(iter(lora.down))
    elsewhere = first.replace("_blocks.0", "_blocks.9").replace(
        "transformer_in", "transformer_in.x"
    )
    with pytest.raises(kq.CheckpointError, match=r"must be in the network, got .*, which is not"):
        resolve(
            denoiser,
            attrs.evolve(lora, down={elsewhere: lora.down[first]}, up={elsewhere: lora.up[first]}),
        )
    for matrix, changed in (
        ("down", {"down": {first: torch.ones(2, 5)}, "up": {first: lora.up[first]}}),
        ("up", {"down": {first: lora.down[first]}, "up": {first: torch.ones(5, 2)}}),
    ):
        with pytest.raises(kq.CheckpointError, match=f"{matrix} of .* wide, .*, got 5"):
            resolve(denoiser, attrs.evolve(lora, **changed))


def test_resolves_to_data(denoiser, networks, family):
    lora = make_lora(networks[family], family, until=0.4, halves="cond", highway="all", beta=1.2)
    got = resolve(denoiser, lora, steps=10)
    assert got.steps == 4
    assert got.conditional_only
    assert got.key == lora.fingerprint
    assert set(got.banks) == set(lora.down)
    behind = [skip.temporal is not None for skip in denoiser.skips]
    assert got.highway.source == tuple(map(float, behind))
    assert got.highway.gain == tuple(1.2 if one else 1.0 for one in behind)
    assert resolve(denoiser, attrs.evolve(lora, highway=None, beta=None)).highway is None
    usual = resolve(denoiser, attrs.evolve(lora, beta=None)).highway
    assert usual.gain == tuple(1.1 if one else 1.0 for one in behind)
    half = resolve(EagerDenoiser(copy.deepcopy(networks[family]).half()), lora)
    assert {bank.up.dtype for bank in half.banks.values()} == {torch.float16}


# ---- arithmetic


def test_arithmetic_is_that_of_the_changes(denoiser, networks, family):
    network, given = networks[family], sample(rows=1)
    one = make_lora(network, family, "k", rank=2, seed=1, scale=0.5)
    two = make_lora(network, family, "k_out", rank=3, seed=2)

    def run(lora):
        return predict(denoiser, given, [resolve(denoiser, lora)])

    stock = {
        "sum": ((one, 0.5), (two, 1.0)),
        "weighted": ((one, 0.5 * 0.3), (two, -0.7)),
        "negated": ((one, -0.5),),
    }
    wanted = {
        name: predict_stock(merged(stock_network(network), *terms), family, *given)
        for name, terms in stock.items()
    }
    assert_equal(run(one + two), wanted["sum"])
    assert_equal(run(0.3 * one - two * 0.7), wanted["weighted"])
    assert_equal(run(-one), wanted["negated"])
    joined = one + two
    to_out = next(path for path in two.down if path.endswith("to_out.0"))
    both = next(iter(one.down))
    assert joined.scale == 1.0
    assert joined.down[both].shape[0] == 5
    assert torch.equal(joined.down[to_out], two.down[to_out])
    assert run(one - one).sub(denoiser.predict(*given)).abs().max() <= 1e-4 * run(one).abs().max()


def stock_network(network):
    """What our modules are in, as the stock classes have it: its weights are the same ones."""
    build = {"UNetMotionModel": tiny.tiny_animatediff, "UNet3DConditionModel": tiny.tiny_unet3d}
    return build[type(network).__name__]()


def noisy(lora, value, shape=(4, FRAMES, 8, 8), **changes):
    return attrs.evolve(lora, noise=torch.full(shape, value), **changes)


def test_noise_in_sums_has_the_weight_of_its_term(networks):
    lora = make_lora(networks["unet3d"], "unet3d")
    one, two = noisy(lora, 1.0), noisy(lora, 10.0)
    assert torch.equal((0.5 * one + 0.25 * two).noise, torch.full((4, FRAMES, 8, 8), 3.0))
    assert (-one).noise is None
    assert (0 * one).noise is None
    assert torch.equal((two - one).noise, two.noise)
    assert torch.equal((lora + one).noise, one.noise)
    wider = attrs.evolve(
        lora, noise=3 * torch.randn(4, FRAMES, 16, 8, generator=torch.Generator().manual_seed(0))
    )
    summed = (attrs.evolve(lora, noise=torch.zeros(4, FRAMES, 8, 8)) + wider).noise
    assert summed.shape == (4, FRAMES, 8, 8)
    torch.testing.assert_close(summed.std(correction=0), wider.noise.std(correction=0))


def test_a_sum_says_what_both_terms_say(networks):
    network = networks["unet3d"]
    one = make_lora(network, "unet3d", seed=1)
    two = attrs.evolve(one, info=attrs.evolve(one.info, prompt="a dog", height=4))
    assert (one + two).info == attrs.evolve(one.info, prompt="", rank=4)
    assert (one + noisy(two, 1.0)).info.height == 4  # the noise's size
    assert (2 * two).info == two.info


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"until": 0.5}, kq.RequestError, "must have the same until, got 1.0 and 0.5"),
        ({"highway": "all"}, kq.RequestError, "must have the same highway, got None and 'all'"),
        ({"halves": "cond"}, kq.RequestError, "must have the same halves"),
    ],
)
def test_terms_must_be_used_alike(networks, change, error, words):
    lora = make_lora(networks["unet3d"], "unet3d")
    with pytest.raises(error, match=words):
        lora + attrs.evolve(lora, **change)


def test_terms_must_be_of_one_network(networks):
    lora = make_lora(networks["unet3d"], "unet3d")
    with pytest.raises(kq.RequestError, match="of one family, got unet3d and animatediff"):
        lora + make_lora(networks["animatediff"], "animatediff")
    first = next(iter(lora.down))
    other = attrs.evolve(lora, down={first: torch.ones(2, 5)}, up={first: torch.ones(7, 2)})
    with pytest.raises(kq.ShapeError, match=r"of one network, got .* and from 5 to 7"):
        lora + other
    with pytest.raises(kq.ShapeError, match="the same channels, got 4 and 3"):
        noisy(lora, 1.0) + noisy(lora, 1.0, (3, FRAMES, 8, 8))
    with pytest.raises(kq.RequestError, match="a factor must be a finite number, got nan"):
        lora * float("nan")
    with pytest.raises(TypeError):
        lora + 1
    with pytest.raises(TypeError):
        lora * "2"


# ---- what it is


@pytest.mark.parametrize("target", TARGETS)
def test_its_info_says_what_its_matrices_are(networks, family, target):
    lora = make_lora(networks[family], family, target, rank=3)
    blocks = {path.partition(".attn")[0].partition(".ff")[0] for path in lora.down}
    assert (lora.info.target, lora.info.rank) == (target, 3)
    assert lora.info.sites == tuple(sorted(blocks))
    if target == "all":
        keys = make_lora(networks[family], family, "v", rank=5)
        assert (keys + make_lora(networks[family], family, "q")).info.target == ""
        assert (lora + keys).info.rank == 8


def test_equality_is_of_content_and_switches(networks):
    network = networks["unet3d"]
    one, again = (make_lora(network, "unet3d", seed=1) for _ in range(2))
    assert one == again
    assert hash(one) == hash(again)
    assert one != make_lora(network, "unet3d", seed=2)
    changed = attrs.evolve(one, scale=0.5)
    assert one != changed
    assert one.fingerprint == changed.fingerprint
    assert one != "lora"


def test_what_was_given_can_change_without_changing_it():
    given = torch.ones(1, 4)
    lora = MotionLora({TO_K: given}, {TO_K: torch.ones(4, 1)}, info=info())
    given.zero_()
    assert torch.equal(lora.down[TO_K], torch.ones(1, 4))


MATRICES = {"down": {TO_K: torch.ones(1, 4)}, "up": {TO_K: torch.ones(4, 1)}}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"scale": float("inf")}, kq.RequestError, "scale: must be a finite number, got inf"),
        ({"scale": True}, kq.RequestError, "scale: must be a finite number"),
        ({"until": 1.5}, kq.RequestError, "until: must be a number from 0 to 1, got 1.5"),
        ({"highway": "some"}, kq.RequestError, "highway: must be None, 'all', 'released', got 'so"),
        ({"beta": -1.0}, kq.RequestError, "beta: must be at least 0, got -1.0"),
        ({"beta": "1"}, kq.RequestError, "beta: must be a finite number, got '1'"),
        ({"beta": 1.2}, kq.RequestError, "beta: acts with a highway, got 1.2 without one; choose"),
        ({"noise_prior": -0.1}, kq.RequestError, "noise_prior: must be a number from 0 to 1"),
        ({"noise_prior": 0.1}, kq.RequestError, "noise_prior: must be 0 or left out where a motio"),
        ({"halves": "uncond"}, kq.RequestError, "halves: must be one of 'both', 'cond'"),
        ({"noise": torch.ones(2, 3)}, kq.ShapeError, r"must be \[channels, frames, h, w\], got"),
        ({"up": {TO_K: torch.ones(4, 2)}}, kq.ShapeError, r"got \[1, 4\] and \[4, 2\]"),
        ({"up": {}}, kq.RequestError, "each projection must have down and up"),
        ({"up": {}, "down": {}}, kq.RequestError, "must hold at least one tensor"),
        ({"up": {TO_K: torch.full((4, 1), float("nan"))}}, kq.RequestError, "must be finite"),
        ({"up": [1]}, kq.RequestError, "must hold tensors by name"),
    ],
)
def test_says_what_is_wrong(change, error, words):
    with pytest.raises(error, match=words):
        MotionLora(**({**MATRICES, "info": info()} | change))


@pytest.mark.parametrize(
    ("path", "family"),
    [
        (TO_K.replace("to_k", "norm1"), "animatediff"),
        (TO_K.replace("motion_modules", "attentions"), "animatediff"),
        (TO_K, "unet3d"),
    ],
)
def test_only_temporal_projections_can_be_adapted(path, family):
    with pytest.raises(kq.RequestError, match=f"got {path!r}, which is none in the family"):
        MotionLora({path: torch.ones(1, 4)}, {path: torch.ones(4, 1)}, info=info(family))


# ---- files


def test_a_file_gives_the_lora_back_and_what_is_said_at_use_wins(networks, tmp_path, family):
    switches = {"scale": 0.5, "highway": "all", "beta": 1.3, "noise_prior": 0.4}
    lora = noisy(make_lora(networks[family], family, "all"), 2.0, **switches)
    path = tmp_path / "m.safetensors"
    lora.write(path)
    got = MotionLora.read(path)
    assert got == lora
    assert torch.equal(got.noise, lora.noise)
    assert MotionLora.read(path, beta=1.0) == attrs.evolve(lora, beta=1.0)
    # What is left without a meaning is no longer chosen.
    plain = MotionLora.read(path, highway=None)
    assert (plain.highway, plain.beta, plain.scale) == (None, None, 0.5)
    assert MotionLora.read(path, scale=-1.0).noise_share == 0
    with pytest.raises(kq.RequestError, match=r"beta: acts with a highway, got 1\.3 without one"):
        MotionLora.read(path, highway=None, beta=1.3)
    with pytest.raises(kq.RequestError, match=r"switches must be among scale, until, .* 'debias'"):
        MotionLora.read(path, debias="mean")


def test_wrong_switches_in_a_file_say_which_it_is(networks, tmp_path):
    lora, path = make_lora(networks["unet3d"], "unet3d"), tmp_path / "m.safetensors"
    for switches, words in (({"scale": "x"}, "scale: must be a finite"), ({"a": 1}, "got 'a'")):
        write_motion(path, lora._tensors, lora.info, switches)
        with pytest.raises(kq.CheckpointError, match=f"read: .*m.safetensors: .*{words}"):
            MotionLora.read(path)
    write_motion(path, lora._tensors, attrs.evolve(lora.info, rank=7))
    with pytest.raises(kq.CheckpointError, match="what its tensors are: rank 2, got 7"):
        MotionLora.read(path)


def test_a_damaged_file_says_which_it_is(tmp_path):
    path = tmp_path / "m.safetensors"
    write_motion(path, {f"down.{TO_K}": torch.ones(1, 4), f"up.{TO_K}": torch.ones(4, 2)}, info())
    with pytest.raises(kq.CheckpointError, match=r"m.safetensors: MotionLora: .* must have down"):
        MotionLora.read(path)
    write_motion(path, {"weight": torch.ones(1)}, info())
    with pytest.raises(kq.CheckpointError, match="must be named down, up, noise, got 'weight'"):
        MotionLora.read(path)


def load_as_diffusers(folder, name):
    """What diffusers makes of a LoRA file before PEFT: tensors by name, and PEFT's settings."""
    from diffusers import AnimateDiffPipeline
    from diffusers.utils.peft_utils import get_peft_kwargs
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    state, alphas, metadata = AnimateDiffPipeline.lora_state_dict(
        folder, weight_name=name, local_files_only=True, return_lora_metadata=True
    )
    assert alphas is None
    assert metadata is None
    prefix = f"{AnimateDiffPipeline.unet_name}."
    assert all(key.startswith(prefix) and "lora" in key for key in state)
    state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    if "lora_A" not in next(iter(state)):
        state = convert_unet_state_dict_to_peft(state)
    ranks = {f"^{key}": tensor.shape[1] for key, tensor in state.items() if "lora_B" in key}
    return state, get_peft_kwargs(ranks, None, peft_state_dict=state)


def test_diffusers_reads_the_peft_layout_and_computes_the_same(tiny_folder, tmp_path):
    """Up to where diffusers hands over to PEFT, and by PEFT's rule, W + alpha / r B A, from there."""
    folder, given = tiny_folder("animatediff"), sample()
    stock = load_stock(folder, "animatediff").unet
    lora = make_lora(stock, "animatediff", "k", rank=2, seed=1) + make_lora(
        stock, "animatediff", "all", rank=3, seed=2
    )  # ranks 5 and 3: a file of both must not depend on what a reader takes for alpha
    lora.write_peft(tmp_path / "lora.safetensors")
    denoiser = EagerDenoiser(copy.deepcopy(stock)).attach()
    wanted = predict(denoiser, given, [resolve(denoiser, lora)] * 2)
    base = predict_stock(stock, "animatediff", *given)

    state, settings = load_as_diffusers(tmp_path, "lora.safetensors")
    assert settings["r"] == settings["lora_alpha"] == 5
    assert not settings["rank_pattern"]
    assert not settings["alpha_pattern"]
    assert set(settings["target_modules"]) == set(lora.down)
    modules = dict(stock.named_modules())
    for path in settings["target_modules"]:
        low, high = state.pop(f"{path}.lora_A.weight"), state.pop(f"{path}.lora_B.weight")
        modules[path].weight.data += settings["lora_alpha"] / settings["r"] * high @ low
    assert not state  # PEFT would warn of keys that it does not expect
    got = predict_stock(stock, "animatediff", *given)
    assert_equal(got, wanted)
    assert_differs(got, base)


def test_the_peft_layout_comes_back(networks, tmp_path, family):
    lora = make_lora(networks[family], family, "all", rank=3)
    lora.write_peft(tmp_path / "lora.safetensors")
    assert MotionLora.read_peft(tmp_path / "lora.safetensors", lora.info) == lora
    with pytest.raises(kq.RequestError, match=r"must end in .safetensors"):
        lora.write_peft(tmp_path / "lora.bin")


BLOCK = "down_blocks.0.motion_modules.1.transformer_blocks.0"
ORIGINAL = "down_blocks.0.motion_modules.1.temporal_transformer.transformer_blocks.0"
OUT = "attn2.to_out.0"
LAYOUTS = {
    "PEFT": (f"unet.{BLOCK}.{OUT}.lora_A.weight", f"unet.{BLOCK}.{OUT}.lora_B.weight"),
    "PEFT with the adapter's name": (
        f"base_model.model.{BLOCK}.{OUT}.lora_A.default.weight",
        f"base_model.model.{BLOCK}.{OUT}.lora_B.default.weight",
    ),
    "diffusers": (f"unet.{BLOCK}.{OUT}.lora.down.weight", f"unet.{BLOCK}.{OUT}.lora.up.weight"),
    "diffusers, older": (
        f"unet.{BLOCK}.attn2.processor.to_out_lora.down.weight",
        f"unet.{BLOCK}.attn2.processor.to_out_lora.up.weight",
    ),
    "AnimateDiff": (
        f"{ORIGINAL}.attention_blocks.1.processor.to_out_lora.down.weight",
        f"{ORIGINAL}.attention_blocks.1.processor.to_out_lora.up.weight",
    ),
    "AnimateDiff-MotionDirector": (
        f"{ORIGINAL}.attention_blocks.1.to_out.processor.0_lora.down.weight",
        f"{ORIGINAL}.attention_blocks.1.to_out.processor.0_lora.up.weight",
    ),
    "a wrapped layer": (f"{BLOCK}.{OUT}.lora_down.weight", f"{BLOCK}.{OUT}.lora_up.weight"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_public_names_are_understood(layout):
    down, up = torch.ones(2, 8), 3 * torch.ones(8, 2)
    low, high = LAYOUTS[layout]
    got = parse_public("read", {low: down, high: up}, {})
    assert list(got[0]) == list(got[1]) == [f"{BLOCK}.{OUT}"]
    assert torch.equal(got[0][f"{BLOCK}.{OUT}"], down)
    assert torch.equal(got[1][f"{BLOCK}.{OUT}"], up)


def test_alpha_goes_into_up():
    low, high = LAYOUTS["diffusers"]
    tensors = {low: torch.ones(4, 8), high: torch.ones(8, 4)}
    alone = {f"unet.{BLOCK}.{OUT}.alpha": torch.tensor(1.0)}
    assert parse_public("read", tensors | alone, {})[1][f"{BLOCK}.{OUT}"].unique().item() == 0.25

    def said(**settings):
        known = {f"unet.{name}": value for name, value in settings.items()}
        metadata = {"lora_adapter_metadata": json.dumps(known)}
        return parse_public("read", tensors, metadata)[1][f"{BLOCK}.{OUT}"].unique().item()

    assert said(r=4, lora_alpha=8) == 2.0
    assert said(r=4, lora_alpha=8, use_rslora=True) == 4.0
    assert said(lora_alpha=8, alpha_pattern={"attn2.to_out.0": 4}) == 1.0
    assert said(lora_alpha=8, alpha_pattern={"attn1.to_out.0": 4}) == 2.0
    with pytest.raises(kq.CheckpointError, match="must be a plain LoRA, got DoRA"):
        said(use_dora=True)
    with pytest.raises(kq.CheckpointError, match="must be the settings of a LoRA as JSON"):
        parse_public("read", tensors, {"lora_adapter_metadata": "["})


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "must hold both matrices of each projection, got none"),
        ({f"unet.{BLOCK}.{OUT}.lora_A.weight": torch.ones(2, 8)}, f"got one of {BLOCK}.{OUT}"),
        ({f"unet.{BLOCK}.{OUT}.weight": torch.ones(2, 8)}, "such as .*lora_A.weight .*, got 'unet"),
        (
            {name: torch.ones(2, 8, 1, 1) for name in LAYOUTS["PEFT"]},
            "must have matrices of a linear layer",
        ),
    ],
)
def test_other_content_of_a_public_file_is_refused(tmp_path, tensors, words):
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(kq.CheckpointError, match=words):
        MotionLora.read_peft(tmp_path / "lora.safetensors", info())


def test_a_spatial_lora_is_no_motion(tmp_path):
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
    save_file(
        {f"{path}.lora_A.weight": torch.ones(1, 4), f"{path}.lora_B.weight": torch.ones(4, 1)},
        tmp_path / "lora.safetensors",
    )
    with pytest.raises(kq.CheckpointError, match="linear layers of temporal transformers, got 'do"):
        MotionLora.read_peft(tmp_path / "lora.safetensors", info())
    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    with pytest.raises(kq.CheckpointError, match="must be a whole safetensors file"):
        MotionLora.read_peft(tmp_path / "damaged.safetensors", info())


@pytest.mark.parametrize("name", ["lora.pt", "lora.safetensors"])
def test_a_pickle_is_refused_with_what_converts_it(tmp_path, name):
    torch.save([torch.ones(2)], tmp_path / name)
    with pytest.raises(
        kq.CheckpointError, match=f"is a pickle, .*: kinetiq convert .*{name} --out"
    ):
        MotionLora.read_peft(tmp_path / name, info())


def test_the_peft_file_has_the_permissions_of_any_new_file(tmp_path, file_mode):
    path = tmp_path / "peft.safetensors"
    kq.MotionLora(**MATRICES, info=info()).write_peft(path)
    assert stat.S_IMODE(path.stat().st_mode) == file_mode


def test_the_peft_file_is_plain(networks, tmp_path):
    lora = make_lora(networks["animatediff"], "animatediff")
    noisy(lora, 1.0).write_peft(tmp_path / "lora.safetensors")
    assert len(load_file(tmp_path / "lora.safetensors")) == 2 * len(lora.down)
