"""How clips and their sources become rows, and what the control tensors say of them."""

import dataclasses

import pytest
import torch

from kinetiq.controls import ResolvedControls
from kinetiq.motion_injection import ResolvedMotionInjection
from kinetiq.query_injection import ResolvedQueryInjection
from kinetiq.rows import ClipState, SourceLevel, build_batch
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
