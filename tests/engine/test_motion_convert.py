"""Public files of motions, made here as their authors' code makes them, become ours."""

import json
from collections import OrderedDict

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

import kinetiq as kq
from kinetiq.__main__ import main
from kinetiq.families import FAMILIES
from kinetiq.motion_convert import PublicMotion, convert_motion, default_motion_target
from kinetiq.motion_embedding import MotionEmbedding
from kinetiq.motion_lora import MotionLora, lora_paths

FRAMES, SLOTS = 6, 32
SIZE = {"family": "unet3d", "frames": FRAMES, "height": 64, "width": 40}  # latents of 8x5


@pytest.fixture(scope="module")
def network():
    return tiny.tiny_unet3d()


@pytest.fixture(scope="module")
def base(network, tmp_path_factory):
    """A model's folder; only its configuration is needed."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "unet").mkdir()
    network.save_config(folder / "unet")
    return str(folder)


def motion_embed(network, frames=FRAMES, latent=(8, 5)):
    """What `save_motion_embeddings` writes of the blocks of the second level, after training."""
    rng = torch.Generator().manual_seed(0)
    height, width = (latent[0] + 1) // 2, (latent[1] + 1) // 2
    written = {}

    def parameter(positions, channels):
        embed = torch.zeros(positions, SLOTS, channels)
        embed[:, :frames] = torch.randn(positions, frames, channels, generator=rng)
        return nn.Parameter(embed)

    for name, module in network.named_modules():
        parts = name.split(".")
        if parts[1:3] == ["1", "temp_attentions"] and parts[4:] == ["transformer_blocks", "0"]:
            channels = module.norm1.normalized_shape[0]
            written[f"{name}.pos_embed"] = parameter(1, channels)
            written[f"{name}.attn1.vSpatial"] = parameter(height * width, channels)
            written[f"{name}.attn2.vSpatial"] = parameter(height * width, channels)
    return written


def low_rank(network, target, rank=2):
    """What a trained LoRA of these layers holds, by module path: (up, down)."""
    rng = torch.Generator().manual_seed(0)
    pairs = OrderedDict()
    for path in lora_paths(network, FAMILIES["unet3d"], target):
        linear = network.get_submodule(path)
        pairs[path] = (
            torch.randn(linear.out_features, rank, generator=rng),
            torch.randn(rank, linear.in_features, generator=rng),
        )
    return pairs


def flat(pairs):
    return [tensor for pair in pairs.values() for tensor in pair]


def convert(tmp_path, content, **said):
    source, out = tmp_path / "public.pt", tmp_path / "ours.safetensors"
    if not source.exists():
        torch.save(content, source)
    convert_motion(source, out, PublicMotion(**said))
    return out


# ---- MotionInversion


def test_a_motion_embedding(tmp_path, network, base):
    content = motion_embed(network)
    got = MotionEmbedding.read(convert(tmp_path, content, **SIZE, base=base))
    blocks = [name.removesuffix(".pos_embed") for name in content if name.endswith("pos_embed")]
    assert len(blocks) == 3  # one down, two up
    assert set(got.query_key) == set(blocks)
    assert got.info.shape == (FRAMES, 8, 5)
    assert got.info.family == "unet3d"
    assert got.noise is None
    for block in blocks:
        assert torch.equal(got.query_key[block], content[f"{block}.pos_embed"][0, :FRAMES])
        for name in ("attn1", "attn2"):
            value, stored = got.value[f"{block}.{name}"], content[f"{block}.{name}.vSpatial"]
            assert value.shape == (FRAMES, 4, 3, stored.shape[2])
            # tokens are in rows of the picture, as the temporal transformer flattens them
            assert torch.equal(value[2, 3, 1], stored[3 * 3 + 1, 2])


def test_the_embedding_steers_its_network(tmp_path, network, tiny_folder):
    """End to end: what was converted is generated with, at another number of frames."""
    content = motion_embed(network)
    motion = MotionEmbedding.read(convert(tmp_path, content, **SIZE), scale=2.0)
    options = {"frames": 3, "steps": 2, "height": 16, "width": 8}
    with kq.Engine.load(tiny_folder("unet3d")) as engine:
        plain = next(engine.generate_latents([kq.Request("a ring", **options)]))
        steered = next(engine.generate_latents([kq.Request("a ring", motion, **options)]))
    assert (steered - plain).abs().max() > 0.01 * plain.abs().max()


@pytest.mark.parametrize("missing", SIZE)
def test_what_the_file_does_not_say_must_be_said(tmp_path, network, missing):
    said = {name: value for name, value in SIZE.items() if name != missing}
    with pytest.raises(kq.RequestError, match="say --family, --frames, --height and --width"):
        convert(tmp_path, motion_embed(network), **said)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": 5}, "was trained on 6 frames, since its slots .*, got --frames 5"),
        ({"frames": 8}, "was trained on 6 frames, .* got --frames 8"),
        ({"frames": 40}, "has 32 slots, fewer than --frames 40"),
        (
            {"width": 64},
            r"vSpatial of .* has 12 positions, and latents of 8x8 halved become 2x2",
        ),
        ({"family": "animatediff"}, "is no part of a network of family animatediff"),
    ],
)
def test_what_is_said_is_checked(tmp_path, network, change, words):
    with pytest.raises(kq.CheckpointError, match=words):
        convert(tmp_path, motion_embed(network), **(SIZE | change))


def test_a_base_is_checked_against(tmp_path, network):
    wider = tmp_path / "wider"
    wider.mkdir()
    tiny.tiny_unet3d(block_out_channels=(16, 64, 32)).save_config(wider)
    with pytest.raises(kq.CheckpointError, match="must be 64 wide, as the network is, got 32"):
        convert(tmp_path, motion_embed(network), **SIZE, base=str(wider))


def test_an_embedding_of_the_first_version(tmp_path, network):
    content = {n: t for n, t in motion_embed(network).items() if n.endswith("pos_embed")}
    with pytest.raises(kq.CheckpointError, match="without, it is of the method's first version"):
        convert(tmp_path, content, **SIZE)


def test_parameters_of_other_shapes(tmp_path, network):
    content = motion_embed(network)
    name = next(iter(content))
    with pytest.raises(kq.CheckpointError, match=r"must hold pos_embed \[1, slots, channels\]"):
        convert(tmp_path, content | {name: content[name].repeat(2, 1, 1)}, **SIZE)
    (tmp_path / "public.pt").unlink()
    with pytest.raises(kq.CheckpointError, match="must have 3 dimensions"):
        convert(tmp_path, content | {name: content[name][0]}, **SIZE)


# ---- MotionDirector


@pytest.mark.parametrize("target", ["all", "k_out"])
def test_a_list_without_names(tmp_path, network, base, target):
    pairs = low_rank(network, target)
    got = MotionLora.read(convert(tmp_path, flat(pairs), base=base, target=target))
    assert set(got.down) == set(pairs)
    for path, (up, down) in pairs.items():
        assert torch.equal(got.up[path], up)
        assert torch.equal(got.down[path], down)
    assert got.info.family == "unet3d"
    assert got.info.checkpoint == base


def test_the_order_of_a_list_is_that_of_the_trainers_filter(network):
    """MotionDirector walks each temporal transformer, and keeps linear layers of attn1, attn2, ff."""
    walked = [
        f"{name}.{inner}"
        for name, module in network.named_modules()
        if type(module).__name__ == "TransformerTemporalModel"
        for inner, linear in module.named_modules()
        if type(linear) is nn.Linear and any(word in inner for word in ("attn1", "attn2", "ff"))
    ]
    assert list(lora_paths(network, FAMILIES["unet3d"], "all")) == walked


def test_the_public_models_have_the_layers_of_the_public_files():
    """Of ZeroScope: 17 temporal transformers, with the parameters that are told of its LoRAs."""
    from kinetiq.motion_convert import _skeleton

    network = _skeleton("unet3d")
    counts = {}
    for target in ("k", "k_out", "all"):
        paths = lora_paths(network, FAMILIES["unet3d"], target)
        linears = [network.get_submodule(path) for path in paths]
        counts[target] = len(paths), 32 * sum(x.in_features + x.out_features for x in linears)
    assert {target: count for target, (count, _) in counts.items()} == {
        "k": 34,
        "k_out": 68,
        "all": 170,
    }
    assert [round(size / 1e6, 2) for _, size in counts.values()] == [1.66, 3.33, 12.47]


@pytest.mark.parametrize("said", [{"target": "all"}, {"base": "unet3d"}, {}])
def test_a_list_needs_its_network_and_its_layers(tmp_path, network, base, said):
    said = said | ({"base": base} if "base" in said else {})
    with pytest.raises(kq.RequestError, match="is a list without names: say --base"):
        convert(tmp_path, flat(low_rank(network, "all")), **said)


def test_a_list_of_other_layers(tmp_path, network, base):
    pairs = flat(low_rank(network, "k_out"))
    with pytest.raises(kq.CheckpointError, match=r"for --target all .*; --target k_out would fit"):
        convert(tmp_path, pairs, base=base, target="all")
    with pytest.raises(kq.CheckpointError, match=r"must hold 16 pairs for --target ff"):
        convert(tmp_path, pairs, base=base, target="ff")
    with pytest.raises(kq.CheckpointError, match="is of family unet3d, got --family animatediff"):
        convert(tmp_path, pairs, base=base, target="k_out", family="animatediff")
    (tmp_path / "public.pt").unlink()
    one_wrong = [torch.ones(7, 2), *pairs[1:]]
    with pytest.raises(kq.CheckpointError, match=r"pair of .*attn1.to_k must be .*, got \[7, 2\]"):
        convert(tmp_path, one_wrong, base=base, target="k_out")
    (tmp_path / "public.pt").unlink()
    swapped = [
        tensor for up, down in zip(pairs[0::2], pairs[1::2], strict=True) for tensor in (down, up)
    ]
    with pytest.raises(kq.CheckpointError, match=r"must be \[.*, rank\] and \[rank, .*\], got"):
        convert(tmp_path, swapped, base=base, target="k_out")


# ---- LoRAs by name

ATTENTION = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0"


def motion_lora(channels=16, rank=2, out="to_out_lora"):
    """The state dict that AnimateDiff's trainer saves, of one block."""
    rng = torch.Generator().manual_seed(0)
    state = {}
    for attention in (0, 1):
        for name in ("to_q_lora", "to_k_lora", "to_v_lora", out):
            stem = f"{ATTENTION}.attention_blocks.{attention}.processor.{name}"
            state[f"{stem}.down.weight"] = torch.randn(rank, channels, generator=rng)
            state[f"{stem}.up.weight"] = torch.randn(channels, rank, generator=rng)
    return state


@pytest.mark.parametrize("wrapped", [False, True])
def test_animatediff_motion_lora(tmp_path, wrapped):
    state = motion_lora()
    content = {"state_dict": state, "epoch": 3} if wrapped else state
    got = MotionLora.read(convert(tmp_path, content))
    block = ATTENTION.replace(".temporal_transformer", "")
    assert set(got.down) == {
        f"{block}.attn{number}.{name}"
        for number in (1, 2)
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    }
    stored = f"{ATTENTION}.attention_blocks.1.processor.to_out_lora"
    assert torch.equal(got.down[f"{block}.attn2.to_out.0"], state[f"{stored}.down.weight"])
    assert torch.equal(got.up[f"{block}.attn2.to_out.0"], state[f"{stored}.up.weight"])
    assert got.info.family == "animatediff"
    assert got.info.shape == (16, 64, 64)  # the public models'


def test_settings_beside_the_matrices_are_left_out_and_named(tmp_path):
    """As AnimateDiff publishes its motion LoRAs."""
    state = motion_lora()
    torch.save({"state_dict": {**state, "animatediff_config": ""}}, tmp_path / "public.ckpt")
    found = convert_motion(tmp_path / "public.ckpt", tmp_path / "m.safetensors", PublicMotion())
    assert found == "a LoRA of 8 projections, without animatediff_config"
    torch.save(state, tmp_path / "plain.ckpt")
    convert_motion(tmp_path / "plain.ckpt", tmp_path / "n.safetensors", PublicMotion())
    assert MotionLora.read(tmp_path / "m.safetensors") == MotionLora.read(
        tmp_path / "n.safetensors"
    )
    torch.save({"animatediff_config": ""}, tmp_path / "none.ckpt")
    with pytest.raises(kq.CheckpointError, match="must hold tensors by name"):
        convert_motion(tmp_path / "none.ckpt", tmp_path / "o.safetensors", PublicMotion())


@pytest.mark.parametrize("prefix", ["module.", "unet.", "base_model.model."])
def test_what_wraps_a_network_is_taken_off_names(tmp_path, prefix):
    state = motion_lora()
    plain = MotionLora.read(convert(tmp_path, state))
    (tmp_path / "public.pt").unlink()
    wrapped = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    assert MotionLora.read(convert(tmp_path, wrapped)) == plain


def test_paths_that_begin_elsewhere_are_refused(tmp_path):
    elsewhere = {f"other.{name}": tensor for name, tensor in motion_lora().items()}
    with pytest.raises(kq.CheckpointError, match=r"got 'other\.down_blocks.*which is none in the"):
        convert(tmp_path, elsewhere)


def test_what_is_said_of_a_lora_is_kept(tmp_path):
    said = {"frames": 24, "height": 256, "width": 384}
    assert MotionLora.read(convert(tmp_path, motion_lora(), **said)).info.shape == (24, 32, 48)


def test_a_lora_is_checked_against_a_base(tmp_path):
    tiny.tiny_animatediff().save_config(tmp_path / "unet")
    assert MotionLora.read(convert(tmp_path, motion_lora(), base=str(tmp_path))).down
    (tmp_path / "public.pt").unlink()
    with pytest.raises(kq.CheckpointError, match="must be 16 wide, as the network is, got 24"):
        convert(tmp_path, motion_lora(channels=24), base=str(tmp_path))
    with pytest.raises(kq.CheckpointError, match="is of family animatediff, got --family unet3d"):
        convert(tmp_path, motion_lora(), family="unet3d")


def test_the_layout_of_diffusers_in_safetensors(tmp_path):
    block = ATTENTION.replace(".temporal_transformer", "")
    stem = f"unet.{block}.attn1.to_k"
    down, up = torch.ones(2, 16), torch.ones(16, 2)
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    settings = json.dumps({"unet.r": 2, "unet.lora_alpha": 6})
    save_file(tensors, tmp_path / "p.safetensors", {"lora_adapter_metadata": settings})
    convert_motion(tmp_path / "p.safetensors", tmp_path / "m.safetensors", PublicMotion())
    got = MotionLora.read(tmp_path / "m.safetensors")
    assert torch.equal(got.up[f"{block}.attn1.to_k"], 3 * up)
    with pytest.raises(kq.RequestError, match="is a motion of kinetiq already"):
        convert_motion(tmp_path / "m.safetensors", tmp_path / "n.safetensors", PublicMotion())
    with pytest.raises(kq.RequestError, match="must not be converted to itself"):
        convert_motion(tmp_path / "p.safetensors", tmp_path / "p.safetensors", PublicMotion())


# ---- what is none of these


class Malicious:
    def __reduce__(self):
        return (print, ("code of a pickle ran",))


def test_code_in_a_pickle_does_not_run(tmp_path, capsys):
    with pytest.raises(kq.CheckpointError, match="must be a pickle of plain tensors"):
        convert(tmp_path, {"w": Malicious()})
    assert "code of a pickle ran" not in capsys.readouterr().out
    assert not (tmp_path / "ours.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": 1}, "must hold tensors by name, or a list of tensors"),
        ([1, 2], "must hold tensors by name, or a list of tensors"),
        ([], "must hold tensors by name, or a list of tensors"),
        (torch.ones(3), "must hold tensors by name, or a list of tensors"),
        (
            {"model.diffusion_model.out.2.weight": torch.ones(2)},
            "Known are .*; if it is a model, t",
        ),
        (
            {
                "unet.down_blocks.0.attentions.0.to_k.lora_A.weight": torch.ones(1, 2),
                "unet.down_blocks.0.attentions.0.to_k.lora_B.weight": torch.ones(2, 1),
            },
            "must change temporal transformers of one family",
        ),
        ({k: v.fill_(torch.nan) for k, v in motion_lora().items()}, "must be finite"),
    ],
)
def test_files_that_cannot_be_told_are_refused(tmp_path, content, words):
    with pytest.raises(kq.CheckpointError, match=words):
        convert(tmp_path, content)
    assert not (tmp_path / "ours.safetensors").exists()


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors"])
def test_a_damaged_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 no more of it")
    with pytest.raises(kq.CheckpointError, match=r"convert: .*broken.* must be a"):
        convert_motion(tmp_path / name, tmp_path / "m.safetensors", PublicMotion())


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"family": "unet4d"}, "--family must be one of animatediff, unet3d, got 'unet4d'"),
        ({"target": "keys"}, "--target must be one of k, k_out"),
        ({"frames": 0}, "--frames must be at least 1, got 0"),
        ({"height": 60}, "--height must be a multiple of 8 pixels, got 60"),
        ({"width": -8}, "--width must be a multiple of 8 pixels, got -8"),
    ],
)
def test_options_are_checked(said, words):
    with pytest.raises(kq.RequestError, match=words):
        PublicMotion(**said)


@pytest.mark.parametrize("config", [None, "{", "[]", '{"_class_name": "UNet2DConditionModel"}'])
def test_a_base_that_is_no_model(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(kq.CheckpointError, match=r"must be readable JSON|--base must be animatedi"):
        convert(tmp_path, motion_lora(), base=str(tmp_path))


# ---- the command


def run(*words):
    return CliRunner().invoke(main, ["convert", *map(str, words)])


def test_the_command(tmp_path, network, base):
    torch.save(motion_embed(network), tmp_path / "motion_embed.pt")
    words = [word for name, value in SIZE.items() for word in (f"--{name}", value)]
    result = run(tmp_path / "motion_embed.pt", *words, "--base", base)
    out = tmp_path / "motion_embed.safetensors"
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    assert result.stderr == "converting a motion embedding of 3 blocks\n"
    assert MotionEmbedding.read(out).info.frames == FRAMES
    torch.save(flat(low_rank(network, "k")), tmp_path / "lora.pt")
    made = tmp_path / "lora-k.safetensors"
    result = run(tmp_path / "lora.pt", "--out", made, "--base", base, "--target", "k")
    assert result.stderr == "converting a list of 16 LoRA pairs (target k)\n"
    assert len(MotionLora.read(made).down) == 16


def test_the_command_the_other_way(tmp_path):
    ours = convert(tmp_path, motion_lora())
    result = run(ours, "--peft")
    made = tmp_path / "ours-peft.safetensors"
    assert (result.exit_code, result.stdout) == (0, f"{made}\n")
    lora = MotionLora.read(ours)
    assert MotionLora.read_peft(made, lora.info) == lora
    refused = run(made, "--peft")
    assert refused.exit_code == 2
    before = ours.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(ours)
    for out in (ours, tmp_path / "link.safetensors"):
        result = run(ours, "--peft", "--out", out)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "must not be converted to itself; choose another --out" in result.stderr
        assert ours.read_bytes() == before
    assert "must be a motion that kinetiq wrote" in refused.stderr
    assert (
        "--frames is said of a public file, got --peft" in run(ours, "--peft", "--frames", 3).stderr
    )


def test_options_of_motions_are_refused_with_a_models_folder(tmp_path):
    result = run(tmp_path, "--frames", 3, "--target", "k")
    assert result.exit_code == 2
    assert "convert: --frames is said of a motion's file, got" in result.stderr


def test_where_a_motion_is_converted_to(tmp_path):
    assert default_motion_target(tmp_path / "m.pt") == tmp_path / "m.safetensors"
    made = default_motion_target(tmp_path / "m.safetensors")
    assert made == tmp_path / "m-motion.safetensors"
    made = default_motion_target(tmp_path / "m.safetensors", as_peft=True)
    assert made == tmp_path / "m-peft.safetensors"


def test_only_a_name_that_is_said_is_replaced(tmp_path):
    torch.save(motion_lora(), tmp_path / "keep.pt")
    kept, peft = tmp_path / "keep.safetensors", tmp_path / "ours-peft.safetensors"
    ours = convert(tmp_path, motion_lora())
    for path, words in ((kept, [tmp_path / "keep.pt"]), (peft, [ours, "--peft"])):
        path.write_bytes(b"mine")
        result = run(*words)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"convert: {path} must be a new name, and exists; name it by --out" in result.stderr
        assert path.read_bytes() == b"mine"
        assert run(*words, "--out", path).exit_code == 0
        assert path.read_bytes() != b"mine"
