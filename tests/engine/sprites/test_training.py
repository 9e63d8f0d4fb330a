import contextlib
import dataclasses
import json
import stat

import numpy as np
import pytest
import torch
from safetensors import safe_open

import kinetiq as kq
from kinetiq.denoiser import EagerDenoiser
from kinetiq.sprites import components, training, world

OPTIONS = training.TrainingOptions(steps=2, vae_steps=2, batch=2, save_every=1, warmup_steps=1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A network of the same build in miniature, so that a step takes a fraction of a second."""
    monkeypatch.setitem(components.UNET, "block_out_channels", (16, 32, 32))
    monkeypatch.setitem(components.UNET, "num_attention_heads", (1, 2, 2))
    monkeypatch.setitem(components.UNET, "motion_num_attention_heads", (1, 2, 2))
    monkeypatch.setitem(components.UNET, "norm_num_groups", 8)
    monkeypatch.setitem(components.VAE, "block_out_channels", (8, 8))


def weights(folder):
    with safe_open(folder / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_a_run_makes_a_checkpoint_that_the_engine_and_the_stock_pipeline_load(tmp_path):
    lines = []
    folder = training.train(tmp_path / "run", OPTIONS, report=lines.append)
    assert [line.step for line in lines if line.stage == "denoiser"] == [1, 2]
    with kq.Engine.load(folder) as engine:
        clip = engine.generate("a red circle", steps=2)
    assert clip.frames.shape == (components.FRAMES, components.SIZE, components.SIZE, 3)
    from diffusers import AnimateDiffPipeline

    pipeline = AnimateDiffPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline("a red circle", num_frames=8, num_inference_steps=2, output_type="np")
    assert out.frames.shape == (1, 8, 32, 32, 3)


def test_off_centre_taps_of_the_resnet_kernels_stay_zero_but_where_it_places_and_draws(tmp_path):
    tensors = weights(training.train(tmp_path / "run", OPTIONS))
    centre = torch.zeros(3, 3, dtype=torch.bool)
    centre[1, 1] = True
    ordinary = 0
    for name, kernel in tensors.items():
        if ".resnets." in name and name.endswith(("conv1.weight", "conv2.weight")):
            assert kernel[:, :, 1, 1].any()
            is_ordinary = name.startswith(components.ORDINARY_BLOCKS)
            assert bool(kernel[:, :, ~centre].any()) is is_ordinary
            ordinary += is_ordinary
    assert ordinary == 4


def test_a_killed_run_continues_to_the_same_weights(tmp_path):
    whole = training.train(tmp_path / "whole", OPTIONS)

    class Killed(Exception):  # noqa: N818  stands for a signal
        pass

    def kill(line):
        if line.stage == "denoiser":
            raise Killed

    with pytest.raises(Killed):
        training.train(tmp_path / "cut", OPTIONS, report=kill)
    resumed = []
    again = training.train(tmp_path / "cut", OPTIONS, report=resumed.append)
    assert [line.step for line in resumed if line.stage == "denoiser"] == [2]
    first, second = weights(whole), weights(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    log = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2]
    assert all(line["batch"] == OPTIONS.batch and "cpu" in line["machine"] for line in log)


@pytest.mark.parametrize("frames", [1, components.FRAMES])
def test_parts_of_a_batch_side_by_side_learn_what_the_whole_learns(frames, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    torch.manual_seed(0)
    unet, text_encoder = components.build_unet(), components.build_text_encoder(300, 299)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    denoiser = EagerDenoiser(unet, keep_zero_taps=True).attach()
    clean, tokens = torch.randn(3, 4, frames, 16, 16), torch.randint(0, 300, (3, 24))
    (loss, whole), (loss_of_parts, parts) = (
        training.Gradients(
            denoiser, text_encoder, parameters, dataclasses.replace(OPTIONS, shards=shards)
        )(clean, tokens, step=5)
        for shards in (1, 2)  # two is of two clips and of one
    )
    torch.testing.assert_close(loss_of_parts, loss)
    for mine, expected in zip(parts, whole, strict=True):
        assert (mine is None) == (expected is None)
        if expected is not None:
            assert (mine - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1e-4)


def test_single_frames_are_as_many_as_the_clips_have_and_say_nothing_of_motion(monkeypatch):
    vae = components.build_vae()
    rng = np.random.default_rng(3)
    words = {word for phrase in world.MOTION_PHRASES.values() for word in phrase.split()}
    clean, captions = training.sample_frames(rng, vae, 0.5, OPTIONS)
    assert clean.shape == (OPTIONS.batch * components.FRAMES, 4, 1, 16, 16)
    assert len(set(captions)) > OPTIONS.batch  # a scene each
    assert not words & {word for caption in captions for word in caption.split()}
    drawn = []
    still = torch.zeros(len(captions), 1, components.SIZE, components.SIZE, 3)
    with monkeypatch.context() as blank:
        blank.setattr(world, "render", lambda *given: drawn.append(given) or still)
        training.sample_frames(rng, vae, 0.5, OPTIONS)
    moments = drawn[0][3]
    assert min(moments) < 0.3 and max(moments) > 0.7  # of all the path, not its beginning
    clean, captions = training.sample_clips(rng, vae, 0.5, OPTIONS)
    assert clean.shape == (OPTIONS.batch, 4, components.FRAMES, 16, 16)
    assert len(captions) == OPTIONS.batch


def test_clips_widen_as_training_goes_on(monkeypatch):
    options = dataclasses.replace(OPTIONS, widening_steps=10)
    assert [training.scene_variety(step, options) for step in (0, 5, 10, 99)] == [0, 0.5, 1, 1]
    assert training.scene_variety(0, dataclasses.replace(OPTIONS, widening_steps=0)) == 1
    drawn = []
    real = world.sample_scene
    monkeypatch.setattr(
        world, "sample_scene", lambda *a, **given: drawn.append(given) or real(*a, **given)
    )
    vae = components.build_vae()
    training.sample_clips(np.random.default_rng(0), vae, 0.5, options, 0.25)
    assert [given["variety"] for given in drawn] == [0.25] * options.batch


def test_the_log_tells_the_losses_of_clips_and_of_frames_apart(tmp_path):
    lines = []
    options = dataclasses.replace(OPTIONS, steps=6, save_every=2)
    training.train(tmp_path / "run", options, report=lines.append)
    kinds = [
        bool(np.random.default_rng([OPTIONS.seed, step]).uniform() < options.frame_share)
        for step in range(6)
    ]
    told = [line for line in lines if line.stage == "denoiser"]
    for line, pair in zip(told, zip(kinds[::2], kinds[1::2], strict=True), strict=True):
        assert (line.frame_loss is not None, line.loss is not None) == (any(pair), not all(pair))


def test_kernels_that_were_kept_at_zero_learn_once_their_block_is_ordinary(tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(components, "ORDINARY_BLOCKS", (components.DRAWING_BLOCK,))
        folder = training.train(tmp_path / "first", OPTIONS)
    name = components.PLACING_BLOCK + ".conv1.weight"
    assert not weights(folder)[name][:, :, 0, 0].any()
    fast = dataclasses.replace(OPTIONS, decay_steps=1)
    again = training.train(tmp_path / "second", fast, start_from=folder)
    assert weights(again)[name][:, :, 0, 0].abs().max() > 1e-4


@pytest.mark.parametrize("file_mode", [0o022], indirect=True, ids=["umask 022"])
def test_a_run_starts_from_a_finished_checkpoint_alone(tmp_path, file_mode):
    folder = training.train(tmp_path / "first", OPTIONS)
    still = dataclasses.replace(OPTIONS, learning_rate=0.0)  # what is trained stays as it was
    again = training.train(tmp_path / "second", still, start_from=folder)
    first, second = weights(folder), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    files = list((tmp_path / "first").rglob("*.safetensors"))
    assert len(files) == 5  # of the state, of the VAE, and three of the checkpoint
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {file_mode}


def test_an_interrupted_write_keeps_the_former_checkpoint_whole(tmp_path, monkeypatch):
    folder = training.train(tmp_path / "run", OPTIONS)
    before = weights(folder)

    def break_off(*_, **__):
        raise OSError("no space left")

    from diffusers import AnimateDiffPipeline

    monkeypatch.setattr(AnimateDiffPipeline, "save_pretrained", break_off)
    more = dataclasses.replace(OPTIONS, steps=3)
    with pytest.raises(OSError, match="no space left"):
        training.train(tmp_path / "run", more)
    after = weights(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_configuration_is_refused(tmp_path, monkeypatch):
    training.train(tmp_path / "run", OPTIONS)
    monkeypatch.setitem(components.UNET, "block_out_channels", (16, 16, 32))
    with pytest.raises(kq.CheckpointError, match="must hold a run of this configuration"):
        training.train(tmp_path / "run", dataclasses.replace(OPTIONS, steps=3))
    with pytest.raises(kq.CheckpointError, match="must have the shapes of this configuration"):
        training.train(tmp_path / "new", OPTIONS, start_from=tmp_path / "run" / "checkpoint")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 9},
        {"batch": 3},
        {"noise_shift": 1.5},
        {"caption_dropout": 0.2},
        {"frame_share": 0.9},
    ],
)
def test_a_run_is_continued_with_its_own_options_alone(tmp_path, change):
    training.train(tmp_path / "run", OPTIONS)
    before = (tmp_path / "run" / "options.json").read_text()
    with pytest.raises(kq.CheckpointError, match=f"holds a run with {next(iter(change))} "):
        training.train(tmp_path / "run", dataclasses.replace(OPTIONS, **change))
    with pytest.raises(kq.CheckpointError, match="holds a run with start_from None"):
        training.train(tmp_path / "run", OPTIONS, start_from=tmp_path / "run" / "checkpoint")
    assert (tmp_path / "run" / "options.json").read_text() == before


def test_a_run_may_go_on_with_another_learning_rate_and_from_a_checkpoint_that_moved(tmp_path):
    folder = training.train(tmp_path / "first", OPTIONS)
    training.train(tmp_path / "second", OPTIONS, start_from=folder)
    moved = folder.rename(tmp_path / "moved")
    slower = dataclasses.replace(OPTIONS, steps=3, learning_rate=1e-5)
    lines = []
    training.train(tmp_path / "second", slower, start_from=moved, report=lines.append)
    assert [line.step for line in lines] == [3]


def test_what_is_no_finished_checkpoint_is_refused(tmp_path):
    (tmp_path / "unet").mkdir()
    with pytest.raises(kq.CheckpointError, match="and lacks vae, text_encoder"):
        training.train(tmp_path / "run", OPTIONS, start_from=tmp_path)


def test_a_checkpoint_names_no_path(tmp_path):
    folder = training.train(tmp_path / "run", dataclasses.replace(OPTIONS, vae_steps=1))
    training.train(tmp_path / "run", dataclasses.replace(OPTIONS, vae_steps=1, steps=3))
    for path in folder.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path


def saved_values(run):
    with safe_open(run / "state.safetensors", "pt") as file:
        return [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118


@pytest.mark.parametrize(("what", "wild"), [("loss", "velocity"), ("gradient", "gradients")])
def test_what_is_not_finite_stops_with_its_step_and_never_reaches_a_save(
    tmp_path, monkeypatch, what, wild
):
    training.train(tmp_path / "run", OPTIONS)
    learn = training.Gradients.__call__

    def break_down(self, clean, tokens, step):
        loss, gradients = learn(self, clean, tokens, step)
        if wild == "velocity":
            return loss * torch.nan, gradients
        gradients[0] = torch.full_like(gradients[0], torch.inf)
        return loss, gradients

    monkeypatch.setattr(training.Gradients, "__call__", break_down)
    with pytest.raises(kq.TrainingError, match=rf"the {what} must be finite, got \w+ at step 2;"):
        training.train(tmp_path / "run", dataclasses.replace(OPTIONS, steps=4))
    assert all(value.isfinite().all() for value in saved_values(tmp_path / "run"))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    wild = dataclasses.replace(OPTIONS, learning_rate=float("inf"))
    with pytest.raises(kq.TrainingError, match=r"must be finite, got \w+ at step 1; continue from"):
        training.train(tmp_path / "run", wild)
    assert not (tmp_path / "run" / "state.safetensors").exists()


def test_a_run_that_was_killed_after_its_vae_continues_to_the_same_weights(tmp_path):
    whole = training.train(tmp_path / "whole", OPTIONS)
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole" / "vae").rename(tmp_path / "cut" / "vae")
    again = training.train(tmp_path / "cut", OPTIONS)
    first, second = weights(whole), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_checkpoint_survives_a_kill_while_it_is_replaced(tmp_path):
    folder = training.train(tmp_path / "run", OPTIONS)
    before = weights(folder)
    folder.rename(folder.with_name("checkpoint.former"))  # between the two renames
    unwritable = dataclasses.replace(OPTIONS, seed=OPTIONS.seed + 1)
    with pytest.raises(kq.CheckpointError, match="holds a run with seed"):
        training.train(tmp_path / "run", unwritable)
    after = weights(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_largest_seed_trains(tmp_path):
    training.train(tmp_path / "run", dataclasses.replace(OPTIONS, seed=2**63 - 1, steps=1))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(kq.OutputError, match="must be a folder that can be written"):
        training.train(tmp_path / "file", OPTIONS)


def test_the_learning_rate_rises_stays_and_falls():
    options = training.TrainingOptions(steps=100, warmup_steps=10, decay_steps=20)
    shares = [training.learning_rate_share(step, options) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9:81] == [1.0] * 72
    assert shares[-1] == pytest.approx(0.05)


def test_a_shift_leans_to_noise_and_keeps_the_ends():
    uniform = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(training.shift_noise(uniform, 1.0), uniform)
    shifted = training.shift_noise(uniform, 3.0)
    assert (shifted[0], shifted[-1]) == (0, 1)
    assert shifted[5] == 0.75  # 3 * 0.5 / (1 + 2 * 0.5)
    assert (shifted.diff() > 0).all()


def test_velocity_is_a_rotation_of_sample_and_noise():
    clean, noise = torch.randn(2, 4, 8, 4, 4), torch.randn(2, 4, 8, 4, 4)
    shares = torch.linspace(0.99, 0.01, 10)
    timesteps = torch.tensor([0, 9])
    noised, velocity = training.velocity_pair(clean, noise, timesteps, shares)
    signal = shares[timesteps].sqrt().view(-1, 1, 1, 1, 1)
    spread = (1 - shares[timesteps]).sqrt().view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(signal * noised - spread * velocity, clean)
    torch.testing.assert_close(spread * noised + signal * velocity, noise)
