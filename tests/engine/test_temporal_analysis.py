"""Attention maps over frames against plain hooks on the stock network, and what is made of them."""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import attrs
import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from PIL import Image
from stock import predict_stock, record_projections, replaced_projections

import kinetiq as kq
from kinetiq import temporal_analysis
from kinetiq.__main__ import _parse_sites, main
from kinetiq.clip import Clip
from kinetiq.errors import CheckpointError, ClipError, NonFiniteError, RequestError
from kinetiq.families import Site, SiteKind
from kinetiq.motion_embedding import MotionEmbedding, debias, site_size
from kinetiq.motion_file import MotionInfo
from kinetiq.motion_lora import MotionLora
from kinetiq.motion_training import block_of, choose_blocks
from kinetiq.temporal_analysis import (
    SiteMaps,
    analyze_temporal,
    as_json,
    attention_maps,
    describe,
    observed,
    propose_sites,
)
from kinetiq.text import encode_prompts

FAMILIES = ("animatediff", "unet3d")
FRAMES, PIXELS, LATENTS = 3, 16, 8
TOLERANCE = 1e-4  # of the largest value: the project's word for "equal" in float32
BUILD = {"animatediff": tiny.tiny_animatediff, "unet3d": tiny.tiny_unet3d}


@pytest.fixture(scope="module", params=FAMILIES)
def engine(tiny_folder, request):
    with kq.Engine.load(tiny_folder(request.param)) as loaded:
        yield loaded


@pytest.fixture
def own_engine(tiny_folder):
    """One whose weights a test may change."""
    with kq.Engine.load(tiny_folder()) as loaded:
        yield loaded


def temporal_sites(engine):
    return [site for site in engine.denoiser.sites if site.kind is SiteKind.TEMPORAL]


def clip_of(frames=5):
    array = np.zeros((frames, PIXELS, PIXELS, 3), np.uint8)
    for index in range(frames):
        array[index, 4:10, index : index + 6] = (255, 120, 0)
    return Clip(array, 8)


def motion_of(engine, size=0.5, place="up", **changes):
    """An embedding at the sites of a place, of tensors with this deviation."""
    rng = torch.Generator().manual_seed(7)
    query_key, value = {}, {}
    for site in temporal_sites(engine):
        if site.place != place:
            continue
        height, width = site_size(engine.checkpoint.unet, site.name, (LATENTS, LATENTS))
        value[site.name] = size * torch.randn(FRAMES, height, width, site.width, generator=rng)
        name = block_of(site.name)
        if name not in query_key:
            query_key[name] = size * torch.randn(FRAMES, site.width, generator=rng)
    info = MotionInfo(
        kind="embedding", family=engine.family.name, frames=FRAMES, height=LATENTS, width=LATENTS
    )
    return MotionEmbedding(query_key=query_key, value=value, info=info, **changes)


def analyze(engine, *given, **options):
    return analyze_temporal(engine, *given, **{"frames": FRAMES, **options})


def added_by(network, sites, motion):
    """By projection, what an embedding adds to its output, [positions or 1, frames, channels]."""
    added = {}
    for site in sites:
        attention = network.get_submodule(site.name)
        query_key = motion.query_key.get(block_of(site.name))
        if query_key is None:
            continue
        added[f"{site.name}.to_q"] = motion.scale * (query_key @ attention.to_q.weight.T)[None]
        added[f"{site.name}.to_k"] = motion.scale * (query_key @ attention.to_k.weight.T)[None]
        value = debias(motion.value_scale * motion.value[site.name], motion.debias)
        value = value.flatten(1, 2).transpose(0, 1)
        added[f"{site.name}.to_v"] = motion.scale * (value @ attention.to_v.weight.T)
    return added


def plain_maps(query, key, heads):
    """Maps [positions, heads, frames, frames] of the stock [positions, frames, channels]."""
    wide = query.shape[-1] // heads
    maps = []
    for head in range(heads):
        part = slice(head * wide, (head + 1) * wide)
        logits = query.double()[..., part] @ key.double()[..., part].transpose(1, 2)
        maps.append(torch.softmax(logits / math.sqrt(wide), -1))
    return torch.stack(maps, 1)


def plain_analysis(engine, clean, text, motion, step=1):
    """The figures of each site, with the stock network and all maps kept."""
    network, sites = BUILD[engine.family.name](), temporal_sites(engine)
    projections = [f"{site.name}.{name}" for site in sites for name in ("to_q", "to_k")]
    added = added_by(network, sites, motion)
    alphas = tiny.tiny_scheduler().alphas_cumprod
    rng = torch.Generator().manual_seed(0)
    figures = {site.name: [] for site in sites}
    for timestep in (200, 400, 600, 800):
        noise = torch.randn(4, FRAMES, LATENTS, LATENTS, generator=rng)
        given = alphas[timestep].sqrt() * clean + (1 - alphas[timestep]).sqrt() * noise

        def run(given=given, timestep=timestep):
            with torch.no_grad():
                predict_stock(network, engine.family.name, given[None], timestep, text)

        without = record_projections(network, projections, run)
        with replaced_projections(network, added, lambda name, out: out + added[name]):
            changed = record_projections(network, projections, run)
        for site in sites:
            heads = network.get_submodule(site.name).heads
            names = (f"{site.name}.to_q", f"{site.name}.to_k")
            mine = plain_maps(*(without[name] for name in names), heads)
            other = plain_maps(*(changed[name] for name in names), heads)[::step]
            held = plain_maps(*(without[n] + added.get(n, 0.0) for n in names), heads)[::step]
            figures[site.name].append(
                {
                    "mean": mine.mean((0, 1)),
                    "entropy": (-mine * mine.log()).sum(-1).mean() / math.log(FRAMES),
                    "discrepancy": (other - mine[::step]).abs().sum(-1).mean() / 2,
                    "direct": (held - mine[::step]).abs().sum(-1).mean() / 2,
                }
            )
    return {
        name: {key: sum(one[key] for one in found) / len(found) for key in found[0]}
        for name, found in figures.items()
    }


@pytest.mark.parametrize("compared", [256, 16])
def test_figures_are_those_of_hooks_on_the_stock_network(engine, monkeypatch, compared):
    monkeypatch.setattr(temporal_analysis, "_COMPARED", compared)
    monkeypatch.setattr(temporal_analysis, "_ELEMENTS", 300)  # so that maps come in parts
    motion = motion_of(engine, scale=0.7, value_scale=1.3)
    reference, prompt = clip_of(), "a red circle"
    found = analyze(engine, reference, prompt, motion)
    clean = engine.encode(reference.resample(FRAMES).resize(PIXELS, PIXELS)).clone()
    text = encode_prompts(engine.checkpoint, [prompt])
    if compared == 256:
        wanted = plain_analysis(engine, clean, text, motion)
    else:  # every 4th of 64 positions, and all of fewer
        wanted = plain_analysis(engine, clean, text, motion, step=4)
    assert [one.site for one in found.sites] == temporal_sites(engine)
    frame = torch.arange(FRAMES)
    for one in found.sites:
        plain = wanted[one.site.name]
        assert (one.mean - plain["mean"]).abs().max() <= TOLERANCE, one.site.name
        assert one.entropy == pytest.approx(float(plain["entropy"]), abs=TOLERANCE)
        distance = (frame[:, None] - frame).abs()
        reach = float((plain["mean"] * distance).sum() / FRAMES)
        assert one.reach == pytest.approx(reach, abs=TOLERANCE * FRAMES)
        assert one.own_share == pytest.approx(float(plain["mean"].trace() / FRAMES), abs=TOLERANCE)
        if compared == 256 or one.positions == 64:
            assert one.discrepancy == pytest.approx(float(plain["discrepancy"]), abs=TOLERANCE)
            assert one.direct == pytest.approx(float(plain["direct"]), abs=TOLERANCE)
    trained = [one for one in found.sites if one.site.name in motion.value]
    assert all(one.direct > 0.01 for one in trained)
    assert all(one.direct == 0.0 for one in found.sites if one not in trained)
    assert trained[0].discrepancy == trained[0].direct  # nothing changed before the first
    assert trained[-1].discrepancy != trained[-1].direct
    assert found.reference == reference.fingerprint and found.motion == motion.fingerprint


def test_without_a_reference_the_network_is_given_noise_of_the_seed(engine):
    seen = []

    def keep(_, given):
        seen.append(given[0].clone())

    handle = engine.checkpoint.unet.conv_in.register_forward_pre_hook(keep)
    try:
        found = analyze(engine, seed=3)
    finally:
        handle.remove()
    rng = torch.Generator().manual_seed(3)
    assert found.timesteps == (200, 400, 600, 800) and len(seen) == 4
    for given in seen:
        noise = torch.randn(4, FRAMES, LATENTS, LATENTS, generator=rng)
        assert torch.equal(given, noise.transpose(0, 1))
    assert found.reference == found.motion == ""
    assert all(one.discrepancy is None and one.direct is None for one in found.sites)
    assert (found.frames, found.height, found.width) == (FRAMES, LATENTS, LATENTS)


@pytest.mark.parametrize("frames", [2, 5])
def test_without_queries_and_keys_maps_are_uniform(own_engine, frames):
    for site in temporal_sites(own_engine):
        attention = own_engine.checkpoint.unet.get_submodule(site.name)
        attention.to_q.weight.zero_()
        attention.to_k.weight.zero_()
    found = analyze(own_engine, frames=frames)
    reach = (frames**2 - 1) / (3 * frames)
    assert found.uniform_reach == pytest.approx(reach)
    for one in found.sites:
        assert one.reach == pytest.approx(reach, rel=1e-6)
        assert one.entropy == pytest.approx(1.0, rel=1e-6)
        assert one.own_share == pytest.approx(1 / frames, rel=1e-6)


def test_maps_of_wide_queries_are_wide_and_exact():
    query = torch.tensor([[[[2.0, 0.0]], [[0.0, 0.0]]]])  # [1, 2 frames, 1 position, 2 channels]
    key = torch.tensor([[[[3.0, 9.0]], [[1.0, 0.0]]]])
    maps = attention_maps(query.double(), key.double(), 1)
    assert maps.shape == (1, 1, 1, 2, 2) and maps.dtype is torch.float64
    first = 1 / (1 + math.exp(-4 / math.sqrt(2)))
    assert maps.flatten().tolist() == pytest.approx([first, 1 - first, 0.5, 0.5], abs=1e-15)
    assert attention_maps(query.bfloat16(), key.bfloat16(), 2).dtype is torch.float32


def test_an_embedding_of_zeros_changes_nothing_at_all(engine):
    found = analyze(engine, clip_of(), "a circle", motion_of(engine, size=0.0))
    assert all(one.discrepancy == 0.0 and one.direct == 0.0 for one in found.sites)
    plain = analyze(engine, clip_of(), "a circle")
    assert found.proposal == plain.proposal  # a motion that changes nothing is as none
    for one, other in zip(found.sites, plain.sites, strict=True):
        assert torch.equal(one.mean, other.mean)


def predict(engine):
    rng = torch.Generator().manual_seed(1)
    given = torch.randn(1, 4, FRAMES, LATENTS, LATENTS, generator=rng)
    text = encode_prompts(engine.checkpoint, ["a ring"])
    with torch.inference_mode():
        return engine.denoiser.predict(given, torch.tensor([300.0]), text)


def hooks(network):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def test_leaves_the_network_as_it_was(engine):
    before, listening = predict(engine), hooks(engine.checkpoint.unet)
    weights = {name: one.clone() for name, one in engine.checkpoint.unet.state_dict().items()}
    analyze(engine, clip_of(), "a circle", motion_of(engine))
    assert torch.equal(predict(engine), before)

    def fail(*_):
        raise KeyError("in the middle")

    with pytest.raises(KeyError), observed(engine.denoiser, fail):
        predict(engine)
    assert torch.equal(predict(engine), before)
    assert hooks(engine.checkpoint.unet) == listening
    for name, one in engine.checkpoint.unet.state_dict().items():
        assert torch.equal(one, weights[name])


def maps_of(name, reach=0.0, discrepancy=None, width=32):
    """A site whose maps reach so far, of two frames."""
    place = {"d": "down", "m": "mid", "u": "up"}[name[0]]
    mean = torch.tensor([[1 - reach, reach], [reach, 1 - reach]], dtype=torch.float64)
    site = Site(name, SiteKind.TEMPORAL, place, width)
    return SiteMaps(site, 4, mean, 0.5, discrepancy, discrepancy)


def test_proposes_blocks_that_reach_far():
    sites = [
        maps_of("down.0.attn1", 0.9, width=16),
        maps_of("down.0.attn2", 0.0, width=16),  # the mean of a block counts: 0.45
        maps_of("down.1.attn1", 0.5),
        maps_of("up.0.attn1", 0.6),
        maps_of("up.1.attn1", 0.1),
        maps_of("mid.0.attn1", 0.2),
    ]
    found = propose_sites(sites)
    assert found.blocks == ("down.0", "down.1", "up.0")
    # The whole of a place at a width is named as such; a part of one by its blocks.
    assert found.sites == (("down", 16), ("down", 32), "up.0")
    assert found.words == "down:16,down:32,up.0"
    assert "median" in found.rule


def test_proposes_the_fewest_blocks_that_carry_half_of_the_change():
    sites = [
        maps_of("down.0.attn1", 0.9, 0.02),
        maps_of("down.1.attn1", 0.9, 0.20),
        maps_of("mid.0.attn1", 0.9, 0.00),
        maps_of("up.0.attn1", 0.0, 0.10),
        maps_of("up.0.attn2", 0.0, 0.15),
        maps_of("up.1.attn1", 0.9, 0.35),
    ]  # 0.82 in all: up.1 and up.0 carry 0.60, up.1 alone too little
    found = propose_sites(sites)
    assert found.blocks == ("up.0", "up.1") and found.words == "up:32"
    assert "50%" in found.rule
    alone = dataclasses.replace(sites[-1], discrepancy=0.47)
    assert propose_sites([*sites[:-1], alone]).blocks == ("up.1",)


@pytest.mark.parametrize("moved", [False, True])
def test_the_proposal_is_what_training_takes(engine, moved):
    found = analyze(engine, None, "", motion_of(engine) if moved else None).proposal
    assert found.blocks
    assert choose_blocks(engine.denoiser.sites, found.sites) == found.blocks
    assert _parse_sites(found.words) == found.sites


def test_says_what_is_wrong_with_what_it_is_given(engine, monkeypatch):
    with pytest.raises(RequestError, match=r"analyze: frames must be at least 2 .* got 1"):
        analyze(engine, frames=1)
    with pytest.raises(RequestError, match=r"analyze: frames must be at least 2 .* got 1"):
        analyze(engine, None, "", motion_of(engine), frames=1)
    with pytest.raises(ClipError, match="reference must have at least 2 frames, got a still"):
        analyze(engine, clip_of(1))
    with pytest.raises(RequestError, match="height: must be a multiple of"):
        analyze(engine, height=17)
    with pytest.raises(RequestError, match="must be a MotionEmbedding, got str"):
        analyze(engine, None, "", "dance.safetensors")
    motion = motion_of(engine)
    other = next(name for name in FAMILIES if name != engine.family.name)
    foreign = attrs.evolve(motion, info=attrs.evolve(motion.info, family=other))
    with pytest.raises(CheckpointError, match=f"family of the network, .*got {other}"):
        analyze(engine, None, "", foreign)
    monkeypatch.setattr(engine, "denoiser", SimpleNamespace(sites=engine.denoiser.sites))
    with pytest.raises(RequestError, match="back end 'eager', got SimpleNamespace"):
        analyze(engine)


def test_maps_that_are_not_finite_are_refused(own_engine):
    site = temporal_sites(own_engine)[1]
    own_engine.checkpoint.unet.get_submodule(site.name).to_k.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=f"finite, got NaN or infinity at {site.name}; try"):
        analyze(own_engine)


class TestCommand:
    """`kinetiq analyze temporal`, in the folder of a tiny model."""

    @pytest.fixture
    def run(self, monkeypatch, tmp_path, tiny_folder):
        monkeypatch.chdir(tmp_path)
        model = str(tiny_folder())

        def invoke(*words):
            given = ("analyze", "temporal", "--model", model, "--frames", "3", *words)
            result = CliRunner().invoke(main, given)
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise result.exception
            return result

        return invoke

    @pytest.fixture
    def dance(self, tmp_path, tiny_folder):
        with kq.Engine.load(tiny_folder()) as engine:
            motion_of(engine).write(tmp_path / "dance.safetensors")

    def test_prints_a_table_and_what_to_train(self, run):
        result = run()
        lines = result.stdout.splitlines()
        assert result.exit_code == 0
        assert "over 3 frames; noise at timesteps 200, 400, 600, 800" in lines[0]
        assert "discrepancy" not in result.stdout
        proposed = [line.split() for line in lines if line.startswith("*  ")]
        assert proposed and all(line[2].endswith(("attn1", "attn2")) for line in proposed)
        assert float(proposed[0][4]) <= 2.0  # the reach, behind the kind
        assert "uniform attention: reach 0.89 frames, own 0.33, entropy 1" in lines
        words = lines[-1].removeprefix("kinetiq train embedding --sites ")
        assert _parse_sites(words) and words != lines[-1]

    @pytest.mark.usefixtures("dance")
    def test_prints_json_of_a_reference_and_a_motion(self, run, tmp_path):
        clip_of().write(tmp_path / "clip.gif")
        result = run(
            "--reference",
            "clip.gif",
            "--prompt",
            "a ring",
            "--json",
            "--out",
            "made",
            "--motion",
            "0.5*dance.safetensors",
        )
        said = json.loads(result.stdout)
        assert json.loads((tmp_path / "made" / "temporal.json").read_text()) == said
        assert said["prompt"] == "a ring" and said["reference"] and said["motion"]
        assert said["frames"] == 3 and said["latent_height"] == LATENTS
        changed = [one["discrepancy"] for one in said["sites"] if one["place"] == "up"]
        assert all(0.0 < one < 1.0 for one in changed)
        assert _parse_sites(said["proposal"]["sites"])
        with Image.open(tmp_path / "made" / "temporal.png") as picture:
            assert picture.format == "PNG" and min(picture.size) > 400
            colours = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)
        assert len(colours) > 100
        assert {path.name for path in (tmp_path / "made").iterdir()} == {
            "temporal.json",
            "temporal.png",
        }

    def test_a_picture_that_fails_half_way_leaves_the_old_one(self, run, tmp_path, monkeypatch):
        from matplotlib.figure import Figure

        def fail(_, path, **__):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Figure, "savefig", fail)
        (tmp_path / "temporal.png").write_bytes(b"old")
        result = run("--out", ".")
        assert result.exit_code == 2
        assert "temporal.png cannot be written (No space left on device)" in result.stderr
        assert (tmp_path / "temporal.png").read_bytes() == b"old"
        assert not list(tmp_path.glob(".kinetiq-*"))

    @pytest.mark.usefixtures("dance")
    @pytest.mark.parametrize(
        ("words", "status", "said"),
        [
            (("--fit", "crop"), 2, "--fit needs --reference"),
            (("--frames", "0"), 2, "frames: must be"),
            (("--size", "16"), 2, "analyze: --size must be HEIGHTxWIDTH"),
            (("--reference", "still.png"), 2, "still.png must have at least 2 frames, got 1"),
            (("--motion", "lora.safetensors"), 2, "must be a motion embedding, got a motion LoRA"),
            (("--motion", "none.safetensors"), 2, "none.safetensors must be a motion's file"),
            (("--out", "still.png"), 2, "analyze: still.png must be a folder"),
            (("--out", "plots"), 1, 'install it with pip install ".[plots]"'),
        ],
    )
    def test_refuses_in_words_before_a_model_loads(
        self, run, tmp_path, monkeypatch, words, status, said
    ):
        def load(*_, **__):
            raise AssertionError("a model was loaded")

        clip_of(1).write(tmp_path / "still.png")
        tensors = {"up_blocks.1.motion_modules.0.transformer_blocks.0.attn1.to_k": torch.ones(2, 2)}
        info = MotionInfo(kind="lora", family="animatediff", frames=3, height=8, width=8)
        MotionLora(tensors, tensors, info=info).write(tmp_path / "lora.safetensors")
        monkeypatch.setattr(kq.Engine, "load", load)
        if "plots" in said:
            monkeypatch.setitem(sys.modules, "matplotlib", None)
        result = run(*words)
        assert result.exit_code == status
        assert said in result.stderr and result.stderr.count("\n") == 1
        assert not (tmp_path / "plots").exists()


def test_the_table_and_json_say_the_same(engine):
    found = analyze(engine, None, "", motion_of(engine))
    said, lines = as_json(found), describe(found).splitlines()
    rows = [
        line.lstrip("* ").split() for line in lines if ".attn" in line and "--sites" not in line
    ]
    assert len(rows) == len(said["sites"]) == len(found.sites)
    for number, (row, one) in enumerate(zip(rows, said["sites"], strict=True), start=1):
        kind = f"{one['place']}:{one['width']}"
        figures = ("reach", "own_share", "entropy", "discrepancy", "direct")
        digits = (2, 2, 2, 4, 4)
        wanted = [f"{one[name]:.{n}f}" for name, n in zip(figures, digits, strict=True)]
        assert row == [str(number), one["name"], kind, *wanted]
    starred = [line.split()[2] for line in lines if line.startswith("*  ")]
    assert {block_of(name) for name in starred} == set(said["proposal"]["blocks"])
    assert json.loads(json.dumps(said)) == said
