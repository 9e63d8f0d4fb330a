"""Frame attention against its formula in float64, and what must hold of it whatever the input."""

import importlib

import pytest
import torch
from closeness import assert_as_good_as
from hypothesis import given, settings
from hypothesis import strategies as st

import kinetiq as kq
from kinetiq.kernels import frame_attention
from kinetiq.kernels.frame_attention import frame_attention_with_motion

operator = importlib.import_module("kinetiq.kernels.frame_attention")  # not the function

SHAPES = [  # rows, frames, tokens, heads, d
    pytest.param((1, 1, 1, 1, 1), id="smallest"),
    pytest.param((3, 5, 7, 2, 3), id="odd"),
    pytest.param((2, 16, 6, 8, 40), id="head dim 40 of SD 1.5's motion modules"),
    pytest.param((2, 33, 2, 1, 5), id="one past the frames of a motion adapter"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ["none", "query", "deviation", "deviation of regions and parts", "both"]


def sample(shape, dtype, device, rng):
    *size, heads, d = shape
    make = lambda: torch.randn(*size, heads * d, generator=rng, device=device).to(dtype)
    return make(), 2 * make(), make()


def controls(kind, shape, device, rng):
    rows, frames, tokens, *_ = shape
    row = torch.arange(rows, device=device).roll(1)
    share = lambda *size: torch.rand(size, generator=rng, device=device)
    chosen = {}
    if kind in ("query", "both"):
        chosen |= {"query_row": row, "query_blend": share(rows, frames, tokens)}
    if kind in ("deviation", "both"):
        chosen |= {"deviation_row": row.flip(0), "deviation_blend": share(rows)}
    if kind == "deviation of regions and parts":
        chosen |= {
            "deviation_row": row,
            "deviation_blend": share(rows, frames, tokens),
            "deviation_parts": share(rows, 3),
        }
    return chosen


def widen(share):
    return share.reshape(share.shape + (1,) * (4 - share.ndim))


def plain(
    query,
    key,
    value,
    heads,
    *,
    query_row=None,
    query_blend=None,
    deviation_row=None,
    deviation_blend=None,
    deviation_parts=None,
):
    """The formula, one row, position and head at a time, in the type of the input."""
    tensors = [query, key, value]
    if deviation_row is not None:
        for index, own in enumerate(tensors):
            mean = own.mean(1, keepdim=True)
            share = torch.ones(len(own)) if deviation_blend is None else deviation_blend
            share = widen(share.to(own))
            if deviation_parts is not None:
                share = share * widen(deviation_parts[:, index].to(own))
            other = own[deviation_row] - own[deviation_row].mean(1, keepdim=True)
            tensors[index] = own + share * (mean + other - own)
    query, key, value = tensors
    if query_row is not None:
        query = query + widen(query_blend.to(query)) * (query[query_row] - query)
    out = torch.empty_like(query)
    d = query.shape[-1] // heads
    for r in range(query.shape[0]):
        for p in range(query.shape[2]):
            for h in range(heads):
                q, k, v = (t[r, :, p, h * d : (h + 1) * d] for t in (query, key, value))
                out[r, :, p, h * d : (h + 1) * d] = (q @ k.T / d**0.5).softmax(-1) @ v
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(shape, dtype, kind, device, rng):
    inputs, heads = sample(shape, dtype, device, rng), shape[-2]
    chosen = controls(kind, shape, device, rng)
    wide = {
        name: tensor if tensor.dtype == torch.int64 else tensor.to(dtype).double()
        for name, tensor in chosen.items()
    }
    exact = plain(*(t.double() for t in inputs), heads, **wide)
    naive = plain(*inputs, heads, **chosen)
    got = frame_attention(*inputs, heads=heads, **chosen)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert_as_good_as(got, naive, exact)
    reference = operator.frame_attention_reference(*inputs, heads=heads, **chosen)
    assert reference.dtype == dtype
    assert_as_good_as(reference, naive, exact, name="reference")


def test_reads_any_strides(device, rng):
    inputs = sample((4, 3, 2, 2, 4), torch.float32, device, rng)
    strided = [torch.stack([t, t], -1)[..., 0].transpose(0, 2) for t in inputs]
    assert not any(t.is_contiguous() for t in strided)
    exact = plain(*(t.double() for t in strided), 2)
    assert_as_good_as(frame_attention(*strided, heads=2), plain(*strided, 2), exact)


def test_gradient(device, rng):
    if device == "cuda":
        pytest.skip("the kernel computes in float32; finite differences need float64")
    inputs = [t.requires_grad_() for t in sample((2, 3, 2, 2, 2), torch.float64, device, rng)]
    chosen = controls("both", (2, 3, 2), device, rng)
    shares = [chosen.pop(name).double() for name in ("query_blend", "deviation_blend")]

    def run(query, key, value, query_blend, deviation_blend):
        return frame_attention(
            query,
            key,
            value,
            heads=2,
            query_blend=query_blend,
            deviation_blend=deviation_blend,
            **chosen,
        )

    assert torch.autograd.gradcheck(run, (*inputs, *(s.requires_grad_() for s in shares)))


def test_no_share_is_no_injection_and_a_full_one_is_the_default_bit_for_bit(device, rng):
    inputs = sample((3, 4, 2, 2, 3), torch.float32, device, rng)
    row = torch.tensor([1, 2, 2], device=device)

    def run(**options):
        return frame_attention(*inputs, heads=2, **options)

    own, moved = run(), run(deviation_row=row)
    assert not torch.equal(own[:2], moved[:2])
    zeros, ones = (
        (lambda *s: torch.zeros(s, device=device)),
        (lambda *s: torch.ones(s, device=device)),
    )
    for size in ((3,), (3, 4, 2)):
        assert torch.equal(run(deviation_row=row, deviation_blend=zeros(*size)), own)
        assert torch.equal(run(deviation_row=row, deviation_blend=ones(*size)), moved)
    assert torch.equal(run(deviation_row=row, deviation_parts=zeros(3, 3)), own)
    assert torch.equal(run(deviation_row=row, deviation_parts=ones(3, 3)), moved)
    assert torch.equal(run(query_row=row, query_blend=zeros(3)), own)
    assert torch.equal(run(query_row=torch.arange(3, device=device)), own)


@pytest.mark.parametrize("frames", [4, 16])
def test_autocast_does_not_change_the_type(frames, cpu_rng):
    shape = (2, frames, 3, 2, 8)
    inputs = sample(shape, torch.float32, "cpu", cpu_rng)
    chosen = controls("both", shape, "cpu", cpu_rng)
    projection = torch.randn(16, 3, generator=cpu_rng)

    def run():
        out, motion = frame_attention_with_motion(*inputs, projection, heads=2, **chosen)
        return frame_attention(*inputs, heads=2, **chosen), out, motion

    def differentiate():
        """Backward may run under autocast too; an operator's own is nobody else's to guard."""
        leaves = [t.detach().requires_grad_() for t in (*inputs, projection)]
        order = [chosen.get(name) for name in operator.CONTROLS]
        outs = (
            *torch.ops.kinetiq.frame_attention_with_motion(*leaves, *order, 2),
            torch.ops.kinetiq.frame_attention(*leaves[:3], *order, 2),
        )
        recorded = frame_attention(*leaves[:3], heads=2, **chosen)
        return (
            *torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs]),
            *torch.autograd.grad(recorded.square().sum(), leaves[:3]),
        )

    wanted = (*run(), *differentiate())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = (*run(), *differentiate())
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("part", range(3))
def test_parts_choose_among_q_k_and_v(part, device, rng):
    tensors = sample((2, 3, 2, 1, 4), torch.float64, device, rng)
    parts = torch.zeros(2, 3, device=device)
    parts[0, part] = 1
    row = torch.tensor([1, 1], device=device)
    moved = operator.move_deviations(tensors, row, None, parts)
    whole = operator.move_deviations(tensors, row)
    for index in range(3):
        wanted = whole if index == part else tensors
        torch.testing.assert_close(moved[index][0], wanted[index][0])
        assert torch.equal(moved[index][1], tensors[index][1])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_permutations_means_and_offsets(rows, frames, tokens, seed):
    """Symmetries of the operator, which need no reference."""
    rng = torch.Generator().manual_seed(seed)
    inputs = sample((rows, frames, tokens, 2, 3), torch.float64, "cpu", rng)
    row, blend = torch.randint(rows, (rows,), generator=rng), torch.rand(rows, generator=rng)
    close = torch.testing.assert_close

    def run(tensors, row=row, blend=blend):
        return frame_attention(*tensors, heads=2, deviation_row=row, deviation_blend=blend)

    base = run(inputs)
    place = torch.randperm(tokens, generator=rng)
    close(run([t[:, :, place] for t in inputs]), base[:, :, place])
    time = torch.randperm(frames, generator=rng)
    close(run([t[:, time] for t in inputs]), base[:, time])
    order = torch.randperm(rows, generator=rng)
    close(run([t[order] for t in inputs], order.argsort()[row[order]], blend[order]), base[order])
    close(run(inputs, torch.arange(rows)), frame_attention(*inputs, heads=2))

    for moved, own in zip(operator.move_deviations(inputs, row), inputs, strict=True):
        close(moved.mean(1), own.mean(1))  # what a row shows stays its own
        close(moved.diff(dim=1), own[row].diff(dim=1))  # how it changes is the other row's

    last = rows - 1  # what the other row shows all along does not reach those that read it
    static = torch.randn(1, tokens, 6, generator=rng, dtype=torch.float64)
    shifted = [torch.cat([t[:last], t[last:] + static]) for t in inputs]
    readers = torch.full((rows,), last)
    close(run(shifted, readers)[:last], run(inputs, readers)[:last])


def test_one_frame_has_no_deviation_and_attends_to_itself(device, rng):
    inputs = sample((2, 1, 3, 2, 3), torch.float32, device, rng)
    row = torch.tensor([1, 0], device=device)
    assert torch.equal(frame_attention(*inputs, heads=2, deviation_row=row), inputs[2])


ZEROS = torch.zeros(2, 3, 4, 6)
ROW = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 4, 6)}, r"query must be .* with heads = 2, got \[2, 4, 6\]"),
        ({"heads": 4}, r"with heads = 4, got \[2, 3, 4, 6\]"),
        ({"heads": 0}, "heads must be an int above 0, got 0"),
        (
            dict.fromkeys(("query", "key", "value"), ZEROS.long()),
            r"query must be float32, float16, bfloat16 or float64, got torch.int64$",
        ),
        (
            {"key": ZEROS[:, :1]},
            r"key must have the shape of query \[2, 3, 4, 6\], got \[2, 1, 4, 6\]",
        ),
        ({"value": ZEROS[:1]}, r"value must have the shape of query .* got \[1, 3, 4, 6\]"),
        ({"value": ZEROS.bfloat16()}, "value must be torch.float32 on cpu .* got torch.bfloat16"),
        ({"query_row": ROW[:1]}, r"query_row must be int64 \[rows = 2\], got torch.int64 \[1\]"),
        ({"deviation_row": ROW.int()}, "deviation_row must be int64 .* got torch.int32"),
        ({"query_row": ROW, "query_blend": ZEROS}, r"query_blend must be .* got \[2, 3, 4, 6\]"),
        (
            {"deviation_row": ROW, "deviation_blend": torch.ones(3)},
            r"deviation_blend must be \[rows\] or .* = \[2, 3, 4\], got \[3\]",
        ),
        (
            {"deviation_row": ROW, "deviation_parts": torch.ones(3)},
            r"deviation_parts must be \[rows = 2, 3\], got \[3\]",
        ),
        ({"query_blend": torch.ones(2)}, "query_blend needs query_row, got query_blend alone"),
        ({"deviation_blend": torch.ones(2)}, "deviation_parts need deviation_row, got none"),
        ({"deviation_parts": torch.ones(2, 3)}, "deviation_parts need deviation_row, got none"),
    ],
)
def test_says_what_is_wrong(change, message):
    given_ = {"query": ZEROS, "key": ZEROS, "value": ZEROS, "heads": 2} | change
    with pytest.raises(kq.ShapeError, match="^frame_attention: .*" + message):
        frame_attention(**given_)


@pytest.mark.parametrize(("frames", "d", "fused"), [(64, 8, True), (64, 40, False), (16, 8, False)])
def test_many_frames_of_few_channels_write_no_scores_on_a_cpu(frames, d, fused, cpu_rng):
    given = [torch.randn(2, frames, 3, 2 * d, generator=cpu_rng) for _ in range(3)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        operator.frame_attention(*given, heads=2)
    called = {event.key for event in profiler.key_averages()}
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert (flash in called) is fused
    assert "aten::_scaled_dot_product_attention_math" not in called
