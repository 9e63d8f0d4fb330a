import dataclasses

import numpy as np
import pytest

from kinetiq.errors import RequestError
from kinetiq.sprites import cases, world
from kinetiq.sprites.reading import read_clips


def test_prompts_of_a_pair_conflict_with_the_reference_and_say_nothing_of_motion():
    pairs = cases.transfer_pairs(64)
    assert len(pairs) == 64
    for pair in pairs:
        mention = pair.caption.mentions[0]
        assert mention.motion is None
        assert mention.shape not in (None, pair.sprite.shape)
        assert mention.texture not in (None, pair.sprite.texture)
        assert world.hue_distance(world.COLOURS[mention.colour], pair.sprite.hue) > 15
        ground = world.COLOURS[pair.caption.background]
        assert world.hue_distance(ground, pair.scene.background_hue) > 15
    assert {pair.sprite.path.motion for pair in pairs} == set(world.MOTIONS)
    assert len({pair.seed for pair in pairs}) == 64


def test_pairs_are_the_same_for_the_same_seed_alone():
    texts = [[p.caption.text for p in cases.transfer_pairs(8, seed=s)] for s in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_prompt_captions_are_held_out_or_not():
    for held_out in (False, True):
        for caption in cases.prompt_captions(32, held_out=held_out):
            mention = caption.mentions[0]
            assert world.is_held_out(mention.shape, mention.colour, mention.motion) is held_out


def test_both_halves_differ_in_how_words_are_combined_and_in_nothing_else():
    halves = [cases.prompt_captions(128, held_out=held_out) for held_out in (True, False)]
    for attribute in ("shape", "colour", "texture", "motion"):
        words = [sorted(getattr(c.mentions[0], attribute) for c in half) for half in halves]
        assert words[0] == words[1]
    assert [c.background for c in halves[0]] == [c.background for c in halves[1]]
    assert halves[1] == cases.prompt_captions(128, held_out=False)
    with pytest.raises(RequestError, match="rearranged into trained ones, got 1; ask for 16"):
        cases.prompt_captions(1, held_out=False)


def test_a_copy_beside_a_perfect_clip_leaks_and_leaves_the_rest_right():
    pair = next(p for p in cases.transfer_pairs(32) if p.sprite.path.motion == "still")
    mention = pair.caption.mentions[0]
    path = world.Path("still", centre=(0.27, 0.5))
    own = world.Sprite(mention.shape, world.COLOURS[mention.colour], path, mention.texture, 0.18)
    beside = dataclasses.replace(
        pair.sprite, radius=0.22, path=dataclasses.replace(path, centre=(0.73, 0.5))
    )
    ground = world.COLOURS[pair.caption.background]
    clips = [
        cases.render_clip(world.Scene(sprites, background_hue=ground))
        for sprites in ((own,), (own, beside))
    ]

    class Engine:
        def generate_many(self, requests, **_):
            assert [request.seed for request in requests] == [pair.seed] * 2
            return iter(clips)

    pairs = [pair, pair]
    scores = cases.score_transfer(cases.transfer(Engine(), pairs, lambda _: None), pairs)
    assert scores.leaks == (False, True)
    assert scores.identity_leak.mean == 0.5
    assert scores.colours_right == (True, True)
    assert scores.fidelities == (1.0, 1.0)


def test_a_perfect_model_scores_perfectly_and_a_copying_one_leaks():
    """Clips rendered as the prompts ask, moving as the references do; then the references."""
    pairs = cases.transfer_pairs(16)
    ideal = []
    for pair in pairs:
        mention = pair.caption.mentions[0]
        sprite = world.Sprite(
            mention.shape,
            world.COLOURS[mention.colour],
            pair.sprite.path,
            texture=mention.texture,
        )
        ground = world.COLOURS[pair.caption.background]
        ideal.append(cases.render_clip(world.Scene((sprite,), background_hue=ground)).frames)
    scores = cases.score_transfer(read_clips(np.stack(ideal)), pairs)
    assert scores.motion_fidelity.mean > 0.97
    assert scores.identity_leak.mean == 0
    assert scores.colour_accuracy.mean == 1
    assert scores.background_accuracy.mean == 1
    copies = np.stack([pair.reference().frames for pair in pairs])
    scores = cases.score_transfer(read_clips(copies), pairs)
    assert scores.motion_fidelity.mean > 0.97
    assert scores.identity_leak.mean == 1
    assert scores.colour_accuracy.mean == 0


def test_groups_are_several_conflicting_prompts_for_each_reference():
    groups = cases.transfer_groups(8, 4)
    assert [len(group) for group in groups] == [4] * 8
    assert {group[0].sprite.path.motion for group in groups} == set(world.MOTIONS)
    assert len({pair.seed for group in groups for pair in group}) == 32
    for group in groups:
        assert len({pair.scene for pair in group}) == 1
        assert len({pair.caption.text for pair in group}) > 1
        for pair in group:
            mention = pair.caption.mentions[0]
            assert mention.motion is None and mention.shape != pair.sprite.shape
            assert world.hue_distance(world.COLOURS[mention.colour], pair.sprite.hue) > 15
