"""Query flow, refinement and shared keys against slow definitions in float64."""

import math

import pytest
import torch
from closeness import assert_as_good_as

from kinetiq.attention import Signal, SpatialProcessor
from kinetiq.control_tensors import (
    ControlTensors,
    FlowControl,
    PatchMatches,
    PreserveControl,
    QueryControl,
    RefineControl,
    SharedKeyControl,
)
from kinetiq.patch_matching import best_matches, levels, resized
from kinetiq.query_flow import find_flow, flow_at_levels, flow_queries, place_key_frames
from kinetiq.refinement import find_patches, other_shots, patches_at_levels, refine_outputs

ROWS, FRAMES, TOKENS, WIDTH = 6, 7, 12, 8


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cosine(one, other):
    return float(one @ other / (one.norm() * other.norm()))


def nearest(patch, patches):
    return max(range(len(patches)), key=lambda place: cosine(patch, patches[place]))


# ---- key frames


@pytest.mark.parametrize("spacing", [1, 2, 3, 6, 100])
@pytest.mark.parametrize("frames", [1, 2, 7, 8])
def test_key_frames_enclose_every_frame(frames, spacing):
    placed = place_key_frames(frames, spacing, "symmetric")
    keys = {*range(0, frames, spacing), frames - 1}
    rows = zip(placed.before.tolist(), placed.after.tolist(), placed.share.tolist(), strict=True)
    for frame, (before, after, share) in enumerate(rows):
        assert {before, after} <= keys
        assert before <= frame <= after
        assert not any(before < key < after for key in keys)
        wanted = 1.0 if frame in keys else (after - frame) / (after - before)
        assert share == pytest.approx(wanted)


def test_the_weight_of_the_paper_is_never_below_a_half():
    placed = place_key_frames(5, 4, "paper")
    wanted = [1.0, *(1 / (1 + math.exp(-(4 - frame) / 4)) for frame in (1, 2, 3)), 1.0]
    assert placed.share.tolist() == pytest.approx(wanted)
    assert min(wanted) > 0.5


# ---- matches


def test_the_best_match_has_the_highest_cosine():
    patches, others = draw(3, 5, WIDTH), draw(3, 9, WIDTH, seed=1)
    others[0, 4] = others[0, 7] = 100 * patches[0, 2]  # long, and twice: the first is taken
    token, found = best_matches(patches, others)
    assert token[0, 2] == 4
    for n in range(3):
        for place in range(5):
            if (n, place) != (0, 2):
                assert token[n, place] == nearest(patches[n, place].double(), others[n].double())
            wanted = cosine(patches[n, place].double(), others[n, token[n, place]].double())
            assert found[n, place] == pytest.approx(wanted, abs=1e-6)


def test_only_candidates_are_matched():
    patches, others = draw(2, 5, WIDTH), draw(2, 6, WIDTH, seed=1)
    candidates = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    token, _ = best_matches(patches, others, candidates)
    assert set(token[0].tolist()) <= {1, 4}
    assert token[1].tolist() == [5] * 5


def test_large_matches_are_found_in_parts(monkeypatch):
    patches, others = draw(5, 4, WIDTH), draw(5, 6, WIDTH, seed=1)
    whole = best_matches(patches, others)
    monkeypatch.setattr("kinetiq.patch_matching._PRODUCTS", 2 * 4 * 6)
    parts = best_matches(patches, others)
    assert torch.equal(whole[0], parts[0])
    assert torch.allclose(whole[1], parts[1], rtol=0, atol=1e-6)


def test_levels_are_those_of_a_network():
    assert levels(10, 6) == [(10, 6), (5, 3), (3, 2), (2, 1), (1, 1)]


def test_maps_are_averaged_where_smaller():
    maps = draw(2, 3, 5, 4, 4)
    small = resized(maps, (2, 2))
    assert torch.allclose(small[1, 2, 3, 0, 1], maps[1, 2, 3, :2, 2:].mean())
    assert resized(maps, (8, 8)).shape == (2, 3, 5, 8, 8)
    assert resized(maps, (4, 4)) is maps


# ---- flow


def slow_flow(query, guide, frame, spacing):
    """[tokens, width] of one row and frame, in float64."""
    keys = sorted({*range(0, FRAMES, spacing), FRAMES - 1})
    if frame in keys:
        return query[frame]
    a, b = max(k for k in keys if k < frame), min(k for k in keys if k > frame)
    share = (b - frame) / (b - a)
    return torch.stack(
        [
            share * query[a, nearest(guide[frame, x], guide[a])]
            + (1 - share) * query[b, nearest(guide[frame, x], guide[b])]
            for x in range(TOKENS)
        ]
    )


def flow_control(spacing, dtype=torch.float32, matches=None):
    key_frames = place_key_frames(FRAMES, spacing, "symmetric")
    return FlowControl(
        readers=torch.tensor([1, 4]),
        guides=None if matches is not None else torch.tensor([0, 5]),
        before=key_frames.before,
        after=key_frames.after,
        share=key_frames.share.to(dtype),
        matches=matches,
    )


@pytest.mark.parametrize("spacing", [2, 3, 4])
def test_flow_agrees_with_its_definition(spacing):
    query = draw(ROWS, FRAMES, TOKENS, WIDTH, dtype=torch.float64)
    moved = flow_queries(query, flow_control(spacing, torch.float64))
    for reader, guide in ((1, 0), (4, 5)):
        for frame in range(FRAMES):
            wanted = slow_flow(query[reader], query[guide], frame, spacing)
            bound = 4 * torch.finfo(torch.float32).eps * query.abs().max()  # shares are float32
            assert (moved[reader, frame] - wanted).abs().max() <= bound
    for row in (0, 2, 3, 5):
        assert torch.equal(moved[row], query[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_flow_is_as_good_as_its_type(dtype):
    query = draw(ROWS, FRAMES, TOKENS, WIDTH, dtype=dtype)
    exact = flow_queries(query.double(), flow_control(3, torch.float64))
    control = flow_control(3)
    moved = flow_queries(query, control)
    match = find_flow(query[control.guides], control.before, control.after)
    own, share = query[control.readers], control.share.to(dtype)[:, None, None]
    naive = query.clone()
    for n, reader in enumerate(control.readers):
        for f in range(FRAMES):
            first = own[n, control.before[f]][match[n, 0, f]]
            second = own[n, control.after[f]][match[n, 1, f]]
            naive[reader, f] = share[f] * first + (1 - share[f]) * second
    assert_as_good_as(moved, naive, exact)


def test_flow_between_all_frames_changes_nothing():
    query = draw(ROWS, FRAMES, TOKENS, WIDTH)
    assert torch.equal(flow_queries(query, flow_control(1)), query)


def test_what_stands_still_stays():
    """Where the guide's frames are equal, each token is found at its own place."""
    query = draw(ROWS, FRAMES, TOKENS, WIDTH)
    query[[0, 5]] = query[[0, 5], :1]
    query[[1, 4]] = query[[1, 4], :1]
    moved = flow_queries(query, flow_control(3))
    assert torch.allclose(moved, query, rtol=0, atol=1e-6)


def test_flow_follows_what_moves():
    """A guide whose tokens move by one a frame carries the queries of the key frame along."""
    query = draw(ROWS, FRAMES, TOKENS, WIDTH)
    first = draw(TOKENS, WIDTH, seed=3)
    for frame in range(FRAMES):
        query[[0, 5], frame] = first.roll(frame, 0)
    control = flow_control(6)
    moved = flow_queries(query, control)
    for frame in range(FRAMES):
        share = 1 - frame / 6
        wanted = share * query[1, 0].roll(frame, 0) + (1 - share) * query[1, 6].roll(frame - 6, 0)
        assert torch.allclose(moved[1, frame], wanted, rtol=0, atol=1e-6)


def test_flow_by_given_matches_equals_flow_by_rows_of_the_same_matches():
    query = draw(ROWS, FRAMES, TOKENS, WIDTH)
    control = flow_control(3)
    found = find_flow(query[control.guides], control.before, control.after)
    given = flow_queries(query, flow_control(3, matches={TOKENS: found}))
    assert torch.equal(given, flow_queries(query, control))


def test_flow_in_a_map_is_found_at_every_size():
    features = draw(2, FRAMES, 5, 4, 6)
    key_frames = place_key_frames(FRAMES, 3, "symmetric")
    found = flow_at_levels(features, key_frames)
    assert {tokens: match.shape for tokens, match in found.items()} == {
        tokens: (2, 2, FRAMES, tokens) for tokens in (24, 6, 2, 1)
    }
    guide = resized(features, (2, 3)).flatten(3).transpose(2, 3).double()
    frame, a, b = 4, 3, 6
    for place, key_frame in enumerate((a, b)):
        for x in range(6):
            assert found[6][1, place, frame, x] == nearest(guide[1, frame, x], guide[1, key_frame])


# ---- refinement


def test_other_shots_are_all_but_the_own():
    assert other_shots(3).tolist() == [[1, 2], [0, 2], [0, 1]]
    assert other_shots(2).tolist() == [[1], [0]]


def slow_otsu(values):
    cuts = sorted(set(values))[1:]
    if not cuts:
        return values[0]

    def between(cut):
        low, high = [v for v in values if v < cut], [v for v in values if v >= cut]
        return len(low) * len(high) * (sum(high) / len(high) - sum(low) / len(low)) ** 2

    return max(cuts, key=between)


def test_patches_agree_with_their_definition():
    shots, alpha = 3, 0.8
    features = draw(shots, 2, TOKENS, WIDTH)
    masks = (draw(shots, 2, TOKENS, seed=5) > 0).float()
    masks[2, 1] = 0.0  # a shot without a subject in a frame
    found = find_patches(features, masks, alpha)
    wide = features.double()
    for shot in range(shots):
        others = other_shots(shots)[shot].tolist()
        match, values = {}, []
        for place, other in enumerate(others):
            for frame in range(2):
                there = [y for y in range(TOKENS) if masks[other, frame, y]]
                if not there:
                    continue
                for x in range(TOKENS):
                    y = max(
                        there, key=lambda y: cosine(wide[shot, frame, x], wide[other, frame, y])
                    )
                    similarity = cosine(wide[shot, frame, x], wide[other, frame, y])
                    match[place, frame, x] = y, similarity
                    if masks[shot, frame, x]:
                        values.append(similarity)
        cut = slow_otsu(values)
        for frame in range(2):
            for x in range(TOKENS):
                good = [
                    place
                    for place in range(len(others))
                    if masks[shot, frame, x]
                    and (place, frame, x) in match
                    and match[place, frame, x][1] >= cut - 1e-6
                ]
                for place in range(len(others)):
                    wanted = alpha / len(good) if place in good else 0.0
                    assert found.share[shot, place, frame, x] == pytest.approx(wanted)
                    if place in good:
                        assert found.token[shot, place, frame, x] == match[place, frame, x][0]


def test_patches_of_no_subject_are_not_refined():
    features = draw(2, 2, 3, 4, 4)
    for patches in patches_at_levels(features, torch.zeros(2, 2, 4, 4), 0.8).values():
        assert not patches.share.any()


def test_patches_are_found_at_every_size():
    found = patches_at_levels(draw(2, 2, 3, 4, 6), torch.ones(2, 2, 4, 6), 0.8)
    assert {tokens: patches.share.shape for tokens, patches in found.items()} == {
        tokens: (2, 1, 2, tokens) for tokens in (24, 6, 2, 1)
    }
    assert all(patches.share.max() == pytest.approx(0.8) for patches in found.values())


def refine_control(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    token = torch.randint(TOKENS, (2, 2, FRAMES, TOKENS), generator=generator)
    share = torch.rand((2, 2, FRAMES, TOKENS), generator=generator, dtype=dtype) / 2
    readers, others = torch.tensor([1, 4]), torch.tensor([[2, 4], [2, 1]])
    return RefineControl(readers, others, {TOKENS: PatchMatches(token, share)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_refinement_agrees_with_its_definition(dtype):
    out = draw(ROWS, FRAMES, TOKENS, WIDTH, dtype=dtype)
    control = refine_control()
    refined = refine_outputs(out, control)
    matches = control.matches[TOKENS]

    def slow(out, share):
        result = out.clone()
        for n, reader in enumerate(control.readers):
            for f in range(FRAMES):
                for x in range(TOKENS):
                    value = out[reader, f, x] * (1 - share[n, :, f, x].sum())
                    for m, other in enumerate(control.others[n]):
                        theirs = out[other, f, matches.token[n, m, f, x]]
                        value = value + share[n, m, f, x] * theirs
                    result[reader, f, x] = value
        return result

    share = matches.share.to(dtype)
    assert_as_good_as(refined, slow(out, share), slow(out.double(), matches.share.double()))
    for row in (0, 2, 3, 5):
        assert torch.equal(refined[row], out[row])


# ---- what a spatial site does with them


class Attention(torch.nn.Module):
    """A plain attention module of diffusers' names, with projections that do nothing."""

    group_norm = spatial_norm = norm_q = None
    residual_connection, rescale_output_factor, heads = False, 1.0, 2

    def __init__(self):
        super().__init__()
        self.to_q = self.to_k = self.to_v = torch.nn.Identity()
        self.to_out = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])


def at_a_site(rows, controls, attention=None):
    signal = Signal(frames=rows.shape[1], controls=controls)
    out = SpatialProcessor(0, signal)(attention or Attention(), rows.flatten(0, 1))
    return out.unflatten(0, (-1, rows.shape[1]))


def slow_attention(query, keys, values, log_mask, heads=2):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (query, keys, values))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + log_mask
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def test_shared_keys_count_by_the_area_that_the_mask_covers():
    """A site of [2, 2] tokens under masks of [4, 4]: each key by the share of its four places."""
    rows = draw(4, 2, 4, WIDTH, dtype=torch.float64)
    mask = (draw(4, 2, 4, 4, seed=9) > 0.3).double()
    key_rows = torch.tensor([[2, 3], [1, 1], [0, 3], [0, 2]])
    readers, alone = torch.tensor([4, 0, 3, 1]), torch.tensor([2])  # row 2 sees itself alone
    batch = torch.empty(5, 2, 4, WIDTH, dtype=torch.float64)
    batch[readers], batch[2] = rows, draw(2, 4, WIDTH, seed=4, dtype=torch.float64)
    control = SharedKeyControl(readers, alone, key_rows, mask)
    out = at_a_site(batch, ControlTensors(shared_key=control))
    assert (out[2] - at_a_site(batch[2:3], ControlTensors())[0]).abs().max() <= 1e-12
    out = out[readers]
    share = mask.unflatten(-1, (2, 2)).unflatten(2, (2, 2)).mean((3, 5)).flatten(2)
    assert set(share.unique().tolist()) > {0.0, 1.0}
    for row in range(4):
        others = [other for other in key_rows[row].tolist() if other != row]
        for frame in range(2):
            keys = torch.cat([rows[row, frame], *(rows[other, frame] for other in others)])
            logs = [torch.zeros(4).double(), *(share[other, frame].log() for other in others)]
            wanted = slow_attention(rows[row, frame], keys, keys, torch.cat(logs))
            assert (out[row, frame] - wanted).abs().max() <= 1e-12


def test_shared_keys_under_masks_of_zeros_change_nothing():
    rows = draw(4, 2, 4, WIDTH)
    key_rows = torch.tensor([[2, 3], [1, 1], [0, 3], [0, 2]])
    everyone, nobody = torch.arange(4), torch.tensor([], dtype=torch.int64)
    control = SharedKeyControl(everyone, nobody, key_rows, torch.zeros(4, 2, 4, 4))
    plain = at_a_site(rows, ControlTensors())
    shared = at_a_site(rows, ControlTensors(shared_key=control))
    assert (shared - plain).abs().max() <= 8 * torch.finfo(torch.float32).eps * plain.abs().max()


class QueriesApart(Attention):
    """Keys and values are of the first half of the channels, queries of the second."""

    def __init__(self):
        super().__init__()
        self.to_q = torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
        self.to_q.weight = torch.nn.Parameter(torch.eye(WIDTH).double().roll(WIDTH // 2, 0), False)
        self.to_k = self.to_v = torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
        first = torch.arange(WIDTH) < WIDTH // 2
        self.to_k.weight = torch.nn.Parameter(first.double().diag(), False)


@pytest.mark.parametrize("region", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_preserved_queries_are_injected_as_those_that_they_are(share, reduced, region):
    """Row 2 has the keys of row 0 but other queries; row 3 is injected into both."""
    rows = draw(4, FRAMES, 4, WIDTH, dtype=torch.float64)
    rows[2, ..., : WIDTH // 2] = rows[0, ..., : WIDTH // 2]
    blend = torch.tensor([share, 1.0, share, 1.0], dtype=torch.float64)
    if region:
        places = torch.rand(FRAMES, 2, 2, generator=torch.Generator().manual_seed(3)).double()
        blend = blend[:, None, None, None] * places
    query = QueryControl(
        torch.tensor([[3, 1, 3, 3]]), blend, torch.tensor([True, False] * 2) if reduced else None
    )
    preserve = PreserveControl(torch.tensor([2]), torch.tensor([0]))
    injected = at_a_site(rows, ControlTensors(query=query), QueriesApart())
    got = at_a_site(rows, ControlTensors(query=query, preserve=preserve), QueriesApart())
    assert (got[2] - injected[0]).abs().max() <= 1e-12
    assert torch.equal(got[[0, 1, 3]], injected[[0, 1, 3]])
    if share < 1 or reduced or region:
        assert (injected[2] - injected[0]).abs().max() > 1e-3


def test_preserved_queries_are_those_of_another_row():
    rows = draw(3, FRAMES, 4, WIDTH, dtype=torch.float64)
    preserve = PreserveControl(torch.tensor([2, 1]), torch.tensor([0, 2]))
    got = at_a_site(rows, ControlTensors(preserve=preserve))
    for row, guide in ((0, 0), (1, 2), (2, 0)):
        for frame in range(FRAMES):
            own = rows[row, frame]
            wanted = slow_attention(rows[guide, frame], own, own, torch.zeros(4))
            assert (got[row, frame] - wanted).abs().max() <= 1e-12


def test_a_site_flows_attends_and_refines_in_this_order():
    rows = draw(ROWS, FRAMES, TOKENS, WIDTH)
    flow, refine = flow_control(3), refine_control()
    out = at_a_site(rows, ControlTensors(flow=(flow,), refine=(refine,)))
    query = flow_queries(rows, flow)
    attended = torch.stack(
        [
            torch.stack(
                [
                    slow_attention(query[r, f], rows[r, f], rows[r, f], torch.zeros(TOKENS))
                    for f in range(FRAMES)
                ]
            )
            for r in range(ROWS)
        ]
    )
    wanted = refine_outputs(attended, refine)
    assert (out - wanted).abs().max() <= 1e-5 * wanted.abs().max()
