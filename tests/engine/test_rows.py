"""How clips and their sources become rows, and what the control tensors say of them."""

import dataclasses

import pytest
import torch

from kinetiq.control_tensors import MotionBank, PatchMatches
from kinetiq.controls import ResolvedControls
from kinetiq.motion_embedding import ResolvedMotionEmbedding
from kinetiq.motion_injection import ResolvedMotionInjection
from kinetiq.query_flow import place_key_frames
from kinetiq.query_injection import ResolvedQueryInjection
from kinetiq.rows import (
    BoardState,
    ClipState,
    SourceLevel,
    build_batch,
    join_motions,
    remember_last,
)
from kinetiq.source import ResolvedSource

SHAPE = (4, 3, 2, 2)  # channels, frames, h, w
SITES = 3
SILENT = {"": torch.full((5, 6), -1.0), "a ring": torch.full((5, 6), -2.0)}
REGION = torch.rand(SHAPE[1:], generator=torch.Generator().manual_seed(9))


def source(key="a", prompt="", fresh=False):
    return ResolvedSource(torch.full(SHAPE, 2.0), prompt, fresh, seed=7, key=key)


def query(read=None, sites=(True, False, True), cond=False, blend=1.0, reduced=False):
    return ResolvedQueryInjection(read or source(), 5, 0, sites, cond, blend, reduced)


def motion(read=None, cond=False, blend=0.5, region=None, parts=(1.0, 1.0, 0.0)):
    sites = (False, True, False)
    return ResolvedMotionInjection(read or source(), 5, 0, sites, cond, blend, region, parts)


def clip(value, *, guided=True, timestep=10.0, scale=(0.6, 0.8), dtype=torch.float32, **controls):
    return ClipState(
        latents=torch.full(SHAPE, float(value), dtype=dtype),
        timestep=timestep,
        text=torch.full((5, 6), float(value), dtype=dtype),
        negative_text=torch.full((5, 6), value + 0.5, dtype=dtype) if guided else None,
        controls=ResolvedControls(**controls),
        query_level=SourceLevel(timestep, *scale),
        motion_level=SourceLevel(timestep, *scale),
    )


def first(tensor):
    return tensor.flatten(1)[:, 0].tolist()


def test_clips_come_first_conditional_before_unconditional():
    batch = build_batch([clip(1), clip(2, guided=False, timestep=20.0), clip(3)], {}, SITES)
    assert batch.latents.shape == (5, *SHAPE)
    assert first(batch.latents) == [1, 1, 2, 3, 3]
    assert first(batch.text) == [1, 1.5, 2, 3, 3.5]
    assert batch.timesteps.tolist() == [10, 10, 20, 10, 10]
    assert batch.timesteps.dtype == torch.float32
    assert batch.conditional.tolist() == [0, 2, 3]
    assert batch.unconditional.tolist() == [1, 2, 4]
    assert batch.controls.query is None  # a kind that no row uses costs nothing
    assert batch.controls.deviation is None


def test_the_source_follows_noised_to_the_step_of_its_reader():
    read = source()
    batch = build_batch([clip(1, query=query(read))], SILENT, SITES)
    assert len(batch.latents) == 3
    torch.testing.assert_close(batch.latents[2], 0.6 * read.latents + 0.8 * read.noise(10.0))
    assert batch.timesteps.tolist() == [10, 10, 10]
    assert torch.equal(batch.text[2], SILENT[""])
    assert batch.conditional.tolist() == [0]
    assert batch.unconditional.tolist() == [1]


def test_a_source_may_be_less_noised_than_its_reader_and_serve_several_steps():
    read, level = source(), SourceLevel(5.0, 0.9, 0.4)
    clips = [
        dataclasses.replace(clip(1, motion=motion(read)), motion_level=level),
        dataclasses.replace(clip(2, motion=motion(read), timestep=20.0), motion_level=level),
    ]
    batch = build_batch(clips, SILENT, SITES)
    assert batch.timesteps.tolist() == [10, 10, 20, 20, 5]
    torch.testing.assert_close(batch.latents[4], 0.9 * read.latents + 0.4 * read.noise(5.0))
    assert batch.controls.deviation.row[1].tolist() == [4, 4, 4, 4, 4]


def test_the_source_has_the_type_of_the_network():
    batch = build_batch([clip(1, dtype=torch.bfloat16, motion=motion())], SILENT, SITES)
    assert batch.latents.dtype == torch.bfloat16
    wanted = 0.6 * source().latents + 0.8 * source().noise(10.0)
    assert torch.equal(batch.latents[2], wanted.bfloat16())


def test_equal_sources_at_equal_steps_are_one_row():
    clips = [
        clip(1, query=query(source("a")), motion=motion(source("a"))),
        clip(2, query=query(source("a"))),
        clip(3, query=query(source("a")), timestep=20.0),
        clip(4, query=query(source("a")), scale=(1.0, 1.0)),
        clip(5, motion=motion(source("b", "a ring"))),
        clip(6),
    ]
    batch = build_batch(clips, SILENT, SITES)
    assert len(batch.latents) == 12 + 4
    assert batch.timesteps[12:].tolist() == [10, 20, 10, 10]
    assert first(batch.text[12:]) == [-1, -1, -1, -2]
    assert batch.controls.query.row[0].tolist() == [
        *(12, 12, 12, 12, 13, 13, 14, 14),
        *range(8, 16),
    ]
    assert batch.controls.deviation.row[1].tolist() == [
        12,
        12,
        *range(2, 8),
        15,
        15,
        *range(10, 16),
    ]


def test_only_the_chosen_sites_read():
    batch = build_batch([clip(1, query=query(), motion=motion())], SILENT, SITES)
    assert batch.controls.query.row.tolist() == [[2, 2, 2], [0, 1, 2], [2, 2, 2]]
    assert batch.controls.deviation.row.tolist() == [[0, 1, 2], [2, 2, 2], [0, 1, 2]]
    assert batch.controls.deviation.blend.tolist() == [[0, 0, 0], [0.5, 0.5, 0], [0, 0, 0]]


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("cond", [True, False])
def test_the_unconditional_half_reads_unless_it_is_left_out(guided, cond):
    state = clip(1, guided=guided, query=query(cond=cond), motion=motion(cond=cond))
    batch = build_batch([state], SILENT, SITES)
    source_row = 2 if guided else 1
    own = [] if not guided else [1 if cond else source_row]
    assert batch.controls.query.row[0].tolist() == [source_row, *own, source_row]
    assert batch.controls.deviation.row[1].tolist() == [source_row, *own, source_row]


def test_each_reader_has_its_own_blend_parts_and_mean():
    clips = [
        clip(1, guided=False, query=query(blend=0.3, reduced=True)),
        clip(2, guided=False, query=query(blend=0.7)),
        clip(3, guided=False, motion=motion(blend=0.2, parts=(0.0, 1.0, 1.0))),
    ]
    batch = build_batch(clips, SILENT, SITES)
    control, deviation = batch.controls.query, batch.controls.deviation
    torch.testing.assert_close(control.blend, torch.tensor([0.3, 0.7, 1.0, 1.0]))
    assert control.reduced.tolist() == [True, False, False, False]
    torch.testing.assert_close(deviation.blend[1], torch.tensor([0.0, 0.0, 0.2, 0.0]))
    assert deviation.parts.tolist() == [[1, 1, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1]]
    assert deviation.region is None


def test_no_reduced_row_is_no_tensor():
    assert build_batch([clip(1, query=query())], SILENT, SITES).controls.query.reduced is None


def test_a_region_spreads_over_the_readers_alone():
    clips = [
        clip(1, guided=False, query=query(blend=REGION), motion=motion(region=REGION)),
        clip(2, guided=False, query=query(blend=0.25), motion=motion()),
    ]
    controls = build_batch(clips, SILENT, SITES).controls
    ones = torch.ones(SHAPE[1:])
    assert torch.equal(controls.query.blend, torch.stack([REGION, 0.25 * ones, ones]))
    assert torch.equal(controls.deviation.region, torch.stack([REGION, ones, ones]))


# Three shots of a board, the same left alone, and a clip before them.

ALONE = {1: 7, 2: 8, 3: 9, 4: 10, 5: 11, 6: 12}  # rows of the shots, and of the same left alone


def board(**options):
    return BoardState((1, 2, 3), (4, 5, 6), **options)


def board_batch(*, first_shot=None, **options):
    shots = [first_shot or clip(1), clip(2), clip(3), clip(1), clip(2), clip(3)]
    clips = [clip(9, guided=False), *shots]
    return build_batch(clips, SILENT, SITES, boards=[board(**options)])


def seen_rows(control):
    """The rows that each row sees, by row."""
    listed = zip(control.readers.tolist(), control.readers[control.rows].tolist(), strict=True)
    return dict(listed)


def test_shots_see_the_same_half_of_the_others():
    masks = torch.rand(3, *SHAPE[1:], generator=torch.Generator().manual_seed(0))
    control = board_batch(masks=masks).controls.shared_key
    seen = seen_rows(control)
    assert seen == {1: [3, 5], 2: [4, 6], 3: [1, 5], 4: [2, 6], 5: [1, 3], 6: [2, 4]}
    assert control.alone.tolist() == [0, *range(7, 13)]
    for place, row in enumerate(control.readers.tolist()):
        assert torch.equal(control.mask[place], masks[(row - 1) // 2])


def test_boards_of_different_sizes_share_a_list_of_rows():
    clips = [clip(n, guided=False) for n in range(6)]
    boards = [
        BoardState((0, 1), masks=torch.ones(2, *SHAPE[1:])),
        BoardState((3, 4, 5), masks=torch.ones(3, *SHAPE[1:])),
    ]
    control = build_batch(clips, SILENT, SITES, boards=boards).controls.shared_key
    assert seen_rows(control) == {0: [1, 0], 1: [0, 1], 3: [4, 5], 4: [3, 5], 5: [3, 4]}
    assert control.alone.tolist() == [2]


def test_preserved_queries_are_those_of_the_shot_left_alone():
    control = board_batch(preserves=True).controls.preserve
    assert dict(zip(control.readers.tolist(), control.guides.tolist(), strict=True)) == ALONE
    control = board_batch(preserves=True, queries_conditional_only=True).controls.preserve
    assert control.readers.tolist() == [1, 3, 5]
    assert control.guides.tolist() == [7, 9, 11]


@pytest.mark.parametrize(
    "injection",
    [
        {"sites": (False, True, False)},
        {"blend": 0.5},
        {"blend": REGION},
        {"reduced": True},
        {"cond": True},
        {},
    ],
)
def test_an_injection_takes_no_shot_out_of_preservation_or_flow(injection):
    """It acts behind them, on the shot and on the same left alone by itself alike."""
    injected = clip(1, query=query(**injection))
    options = {"first_shot": injected, "key_frames": place_key_frames(3, 2, "symmetric")}
    controls = board_batch(preserves=True, **options).controls
    assert controls.preserve.readers.tolist() == list(ALONE)
    assert controls.flow[0].readers.tolist() == list(ALONE)
    alone = build_batch([clip(9, guided=False), injected], SILENT, SITES).controls.query
    reads = controls.query.row[:, :3] != torch.arange(3)
    assert torch.equal(reads, alone.row[:, :3] != torch.arange(3))
    assert torch.equal(controls.query.blend[:3], alone.blend[:3])


def test_flow_is_told_by_the_shot_left_alone():
    key_frames = place_key_frames(3, 2, "symmetric")
    (control,) = board_batch(key_frames=key_frames).controls.flow
    assert control.readers.tolist() == list(ALONE)
    assert control.guides.tolist() == list(ALONE.values())
    assert control.before.tolist() == [0, 0, 2]
    assert control.after.tolist() == [0, 2, 2]
    assert control.share.tolist() == [1.0, 0.5, 1.0]


def test_flow_may_be_told_by_a_map_of_each_shot():
    key_frames = place_key_frames(3, 2, "symmetric")
    matches = {4: torch.arange(3)[:, None, None, None].expand(3, 2, 3, 4)}
    clips = [clip(9, guided=False), clip(1), clip(2), clip(3)]
    state = BoardState(
        (1, 2, 3), key_frames=key_frames, flow=matches, queries_conditional_only=True
    )
    (control,) = build_batch(clips, SILENT, SITES, boards=[state]).controls.flow
    assert control.guides is None
    assert control.readers.tolist() == [1, 3, 5]
    assert control.matches[4][:, 0, 0, 0].tolist() == [0, 1, 2]


def test_refinement_takes_from_the_same_half_of_the_others():
    token = torch.zeros(3, 2, 3, 4, dtype=torch.int64) + torch.arange(3)[:, None, None, None]
    patches = {4: PatchMatches(token, torch.full((3, 2, 3, 4), 0.25))}
    (control,) = board_batch(refine=patches).controls.refine
    assert control.readers.tolist() == [1, 2, 3, 4, 5, 6]
    assert control.others.tolist() == [[3, 5], [4, 6], [1, 5], [2, 6], [1, 3], [2, 4]]
    assert control.matches[4].token[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    (half,) = board_batch(refine=patches, refine_conditional_only=True).controls.refine
    assert half.readers.tolist() == [1, 3, 5]


def test_a_board_that_does_nothing_adds_no_control():
    controls = board_batch().controls
    assert controls.query is None
    assert controls.preserve is None
    assert controls.shared_key is None
    assert controls.flow == controls.refine == ()


def embedding(key, value):
    """A learned motion of one site; another object at each call, as of another clip."""
    bank = MotionBank(projected_query=torch.full((1, 3, 4), value))
    return ResolvedMotionEmbedding(key, {1: bank}, dict, 1.0, 5, False)


def test_the_order_of_clips_makes_no_other_banks():
    calls = []

    def join(motions, raw):
        calls.append([one.key for one in motions])
        return join_motions(motions, raw)

    remembered = remember_last(join)
    for order in ("ab", "ba", "bab", "b", "ba"):
        clips = [
            clip(number, guided=False, embedding=embedding(key, float(ord(key))))
            for number, key in enumerate(order)
        ]
        control = build_batch(clips, SILENT, SITES, join_motions=remembered).controls.motion
        rows = control.banks[1].projected_query.index_select(0, control.slot)
        assert rows[:, 0, 0].tolist() == [float(ord(key)) for key in order]
        assert not control.banks[1].projected_query[0].any()
    assert calls == [["a", "b"], ["b"], ["a", "b"]]
