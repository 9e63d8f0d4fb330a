import numpy as np

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
