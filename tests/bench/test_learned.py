"""The benches of learned motions: what they keep, and what their figures mean."""

import dataclasses

import pytest
import torch

from kinetiq.bench import embedding, learned, lora, mixed_motion, training_cost
from kinetiq.engine import Engine
from kinetiq.errors import WorkError
from kinetiq.motion_training import EmbeddingOptions
from kinetiq.request import Request
from kinetiq.sprites import cases, world
from kinetiq.sprites.metrics import Interval
from kinetiq.sprites.reading import read_clips


@pytest.fixture(scope="module")
def engine():
    with Engine.load("sprites") as loaded:
        yield loaded


def test_a_motion_is_learned_once_for_a_model_a_reference_and_options(
    engine, tmp_path, monkeypatch
):
    trained = []

    def train(engine_, reference, prompt, path, options):
        trained.append((prompt, path))
        motion = mixed_motion.random_motion(engine_, seed=len(trained))
        motion.write(path)
        return motion

    monkeypatch.setattr(learned, "train_embedding", train)
    one, other = cases.transfer_pairs(2)
    folder = tmp_path / "cache" / "motions"  # not there before the first
    first, spent = learned.learn(engine, one, EmbeddingOptions(steps=3), folder)
    again, read = learned.learn(engine, one, EmbeddingOptions(steps=3), folder)
    assert first == again and len(trained) == 1
    assert spent > 0 and read is None
    assert trained[0][0] == learned.describe(one.scene)
    learned.learn(engine, one, EmbeddingOptions(steps=4), folder)
    learned.learn(engine, other, EmbeddingOptions(steps=3), folder)
    assert len({path for _, path in trained}) == 3
    weight = next(engine.checkpoint.unet.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
    learned.learn(engine, one, EmbeddingOptions(steps=3), folder)
    with torch.no_grad():
        weight.copy_(kept)
    assert len({path for _, path in trained}) == 4


def test_the_caption_of_a_reference_says_its_motion():
    pair = cases.transfer_pairs(1)[0]
    text = learned.describe(pair.scene)
    assert world.MOTION_PHRASES[pair.sprite.path.motion] in text and pair.sprite.shape in text


def shown(pairs, factor):
    """Clips that show what the prompts ask for and move `factor` times as the references do."""
    scenes = []
    for pair in pairs:
        mention, path = pair.caption.mentions[0], pair.sprite.path
        moved = dataclasses.replace(path, travel=factor * path.travel, centre=(0.5, 0.5))
        colour = world.COLOURS[mention.colour]
        sprite = world.Sprite(mention.shape, colour, moved, mention.texture)
        scenes.append(world.Scene((sprite,), world.COLOURS[pair.caption.background]))
    return read_clips(world.render(scenes, 8, 32).numpy())


def test_the_figures_of_embeddings_mean_what_they_say():
    pairs = [group[0] for group in cases.transfer_groups(4, 1)]  # the four directions
    as_asked, opposite, half = (shown(pairs, factor) for factor in (1.0, -1.0, 0.5))
    ways = ("difference", "none", "mean", "drop", "without_noise")
    readings = {**dict.fromkeys(ways, as_asked), "plain": opposite, "noise_only": opposite}
    figures = embedding.figures_of({**readings, "negated": opposite, "half": half}, pairs, 1)
    value = {name: figure.value for name, figure in figures.items()}
    assert value["embedding.motion_fidelity"] > 0.95
    assert value["embedding.noise_only_fidelity"] < -0.9
    assert value["embedding.gain_over_noise"] > 1.85
    assert value["embedding.camera_fidelity"] > 0.95
    assert value["embedding.negated_opposite_fidelity"] > 0.95
    assert value["embedding.half_scale_displacement"] == pytest.approx(0.5, abs=0.05)
    assert value["embedding.identity_leak"] == value["embedding.colour_drop"] == 0


def lora_scores(fidelity, leak):
    interval = Interval(fidelity, fidelity, fidelity, 8)
    return cases.TransferScores(
        motion_fidelity=interval,
        identity_leak=dataclasses.replace(interval, mean=leak),
        colour_accuracy=interval,
        shape_accuracy=interval,
        background_accuracy=interval,
        frame_consistency=interval,
        fidelities=(fidelity,) * 8,
        leaks=tuple(number < round(8 * leak) for number in range(8)),
        colours_right=(True,) * 8,
    )


def test_keys_are_compared_with_all_projections_where_both_move_alike():
    reached = {"all": (0.5, 0.6, 0.8, 0.9), "k": (0.2, 0.3, 0.59, 0.7)}
    scores = {"plain": lora_scores(0.0, 0.0), "noise_only": lora_scores(0.1, 0.0)}
    for variant in lora.VARIANTS:
        values = reached.get(variant.name, (0.4,) * 4)
        for scale, fidelity in zip(lora.SCALES, values, strict=True):
            name = f"{variant.name}.scale_{round(100 * scale):03d}"
            scores[name] = lora_scores(fidelity, 0.5 if variant.name == "all" else 0.25)
    assert lora.settings_to_compare(scores, "k", "all") == ("k.scale_100", "all.scale_075")
    figures = lora.figures_of(scores, prompts=4)
    assert figures["lora.k.motion_fidelity"].value == 0.59
    assert figures["lora.k_leak_saved"].value == 0.25
    assert figures["lora.k_fidelity_gap_where_compared"].value == pytest.approx(0.01)
    assert figures["lora.k_fidelity_where_compared"].value == 0.59
    assert figures["lora.k_other_scale_where_compared"].value == 0.75
    assert figures["lora.k_leak_saved"].n == figures["lora.k.motion_fidelity"].n == 2  # references
    assert figures["lora.k_highway_leak_saved"].value == 0


@pytest.mark.parametrize(
    ("reached", "compared"),
    [
        # Where both hardly move a pair may be nearer, which says nothing of a LoRA that moves.
        ({"all": (0.2, 0.62), "k": (0.2, 0.6)}, ("k.scale_100", "all.scale_100")),
        ({"all": (0.2, 0.9), "k": (0.3, 0.5)}, ("k.scale_050", "all.scale_050")),
    ],
)
def test_loras_are_compared_where_they_move_and_where_none_are_equal_at_the_nearest(
    reached, compared
):
    scores = {
        f"{name}.scale_{scale}": lora_scores(fidelity, 0.5)
        for name, pair in reached.items()
        for scale, fidelity in zip(("050", "100"), pair, strict=True)
    }
    assert lora.settings_to_compare(scores, "k", "all") == compared


def test_random_motions_act_and_differ(engine):
    motions = [None, *(mixed_motion.random_motion(engine, seed) for seed in (0, 1))]
    requests = [Request("a red circle", motion, steps=1, seed=3) for motion in motions]
    plain, one, other = engine.generate_latents(requests)
    assert not torch.equal(plain, one) and not torch.equal(one, other)


def test_ways_that_disagree_are_not_compared():
    exact = [torch.tensor([1.0, -2.0])]
    usual = [torch.tensor([1.02, -2.0])]  # errs by 0.01 of the largest
    near, far = [torch.tensor([1.03, -2.0])], [torch.tensor([1.08, -2.0])]
    training_cost._require_agreement({"released": usual, "ours": near, "recompute": usual}, exact)
    wrong = {"released": usual, "ours": usual, "recompute": far}
    with pytest.raises(WorkError, match="gradients of recompute must be within"):
        training_cost._require_agreement(wrong, exact)
    wrong |= {"ours": [torch.tensor([float("nan"), 0.0])]}
    with pytest.raises(WorkError, match="gradients of ours must be within"):
        training_cost._require_agreement(wrong, exact)


def test_the_three_ways_of_training_compute_the_same_gradients():
    config = training_cost.ZEROSCOPE | {"block_out_channels": (32, 32, 32, 64)}
    config |= {"attention_head_dim": 8, "cross_attention_dim": 16, "norm_num_groups": 8}
    config |= {"layers_per_block": 1}
    exact = training_cost.run_released(
        training_cost.prepare("cpu", (2, 8, 8), config, torch.float32)
    )
    state = training_cost.prepare("cpu", (2, 8, 8), config)
    found = {
        "released": training_cost.run_released(state),
        "ours": training_cost.run_ours(state),
        "recompute": training_cost.run_ours(state, recompute=True),
    }
    training_cost._require_agreement(found, exact)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in found["released"])
    wide = training_cost.prepare("cpu", (2, 8, 8), config, torch.float64)
    same = [training_cost.run_ours(wide), training_cost.run_ours(wide, recompute=True)]
    for gradients in same:
        assert training_cost.worst_error(gradients, training_cost.run_released(wide)) < 1e-9


def test_a_motion_of_the_embedded_model_is_trained_for_the_clock():
    assert training_cost.train_embedded("cpu", quick=True) > 0


def test_intervals_count_references_and_not_clips():
    values = [0.0] * 4 + [1.0] * 4
    figure = learned.mean_by_reference(values, prompts=4, bounds=(0.0, 1.0))
    assert (figure.value, figure.n) == (0.5, 2)
