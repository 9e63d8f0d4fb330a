"""Query attention against its formula in float64, and what must hold of it whatever the input."""

import importlib
import math

import pytest
import torch
from closeness import assert_as_good_as
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import kinetiq as kq
from kinetiq.kernels import query_attention

operator = importlib.import_module("kinetiq.kernels.query_attention")  # not the function

SHAPES = [  # rows, frames, frames of the keys, tokens, keys, heads, d
    pytest.param((1, 1, 1, 1, 1, 1, 1), id="smallest"),
    pytest.param((3, 2, 2, 7, 5, 2, 3), id="odd"),
    pytest.param((2, 3, 1, 6, 77, 2, 8), id="a prompt shared by the frames"),
    pytest.param((2, 2, 2, 36, 36, 8, 40), id="head dim 40 of SD 1.5"),
    pytest.param((2, 1, 1, 129, 131, 2, 40), id="one past the fused kernel's threshold"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The exp of PyTorch's fused kernel for CPUs is a polynomial, with which a weight of float32 was seen
# to err by a third more than with its ordinary one. Our own kernels, on a GPU, have to do without.
FUSED_SLACK = 2.0 * 4 / 3


def sample(shape, dtype, device, rng):
    rows, frames, key_frames, tokens, keys, heads, d = shape
    make = lambda *size: torch.randn(*size, heads * d, generator=rng, device=device).to(dtype)
    query = make(rows, frames, tokens)
    key, value = make(rows, key_frames, keys), make(rows, key_frames, keys)
    return query, 2 * key, value  # logits with a standard deviation of two: far from uniform


def plain(query, key, value, heads, row=None, blend=None):
    """The formula, one row, frame and head at a time, in the type of the input."""
    if row is not None:
        share = torch.ones(len(row)) if blend is None else blend
        share = share.to(query).reshape(share.shape + (1,) * (4 - share.ndim))
        query = query + share * (query[row] - query)
    out = torch.empty_like(query)
    d = query.shape[-1] // heads
    for r in range(query.shape[0]):
        for f in range(query.shape[1]):
            for h in range(heads):
                part = slice(h * d, (h + 1) * d)
                keys, values = (t[r, f % t.shape[1], :, part] for t in (key, value))
                weights = (query[r, f, :, part] @ keys.T / d**0.5).softmax(-1)
                out[r, f, :, part] = weights @ values
    return out


def controls(kind, shape, device, rng):
    rows, frames, _, tokens, *_ = shape
    if kind == "none":
        return None, None
    row = torch.arange(rows, device=device).roll(1)
    sizes = {"row": None, "blend": (rows,), "blend of tokens": (rows, frames, tokens)}
    size = sizes[kind]
    return row, None if size is None else torch.rand(size, generator=rng, device=device)


@pytest.mark.parametrize("kind", ["none", "row", "blend", "blend of tokens"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(shape, dtype, kind, device, rng):
    inputs, heads = sample(shape, dtype, device, rng), shape[-2]
    row, blend = controls(kind, shape, device, rng)
    exact = plain(*(t.double() for t in inputs), heads, row, blend)
    naive = plain(*inputs, heads, row, blend)
    got = query_attention(*inputs, heads=heads, query_row=row, query_blend=blend)
    assert got.dtype == dtype
    assert got.is_contiguous()
    fused = device == "cpu" and dtype == torch.float32 and shape[4] >= operator._LANES
    assert_as_good_as(got, naive, exact, slack=FUSED_SLACK if fused else 2.0)
    reference = operator.query_attention_reference(
        *inputs, heads=heads, query_row=row, query_blend=blend
    )
    assert reference.dtype == dtype
    assert_as_good_as(reference, naive, exact, name="reference")


def test_reads_any_strides(device, rng):
    shape = (2, 3, 3, 5, 5, 2, 4)
    inputs = [t.transpose(0, 2).contiguous() for t in sample(shape, torch.float32, device, rng)]
    strided = [torch.stack([t, t], -1)[..., 0].transpose(0, 2) for t in inputs]
    assert not any(t.is_contiguous() for t in strided)
    exact = plain(*(t.double() for t in strided), 2)
    assert_as_good_as(query_attention(*strided, heads=2), plain(*strided, 2), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("further", [False, True])
@pytest.mark.parametrize("keys", [1, 5, 15, 16, 17, 140])
def test_nan_does_not_vanish(keys, further, dtype, device, rng):
    """A query that is NaN, or whose every key is, has no answer; the others keep theirs."""
    query, key, value = sample((2, 1, 1, 140, keys, 1, 8), dtype, device, rng)
    options = {"heads": 1}
    if further:
        options["key_rows"] = torch.tensor([[1], [1]], device=device)
    query[0, 0, 1] = math.nan
    got = query_attention(query, key, value, **options).isnan()
    assert got[0, 0, 1].all()
    assert got.sum() == 8
    key[1] = math.nan
    lost = query_attention(query.nan_to_num(), key, value, **options).isnan()
    assert lost[1].all()
    assert lost[0].all() == further


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "keys"), [(8, 8), (200, 77), (200, 200)])
@pytest.mark.parametrize("case", ["beyond float16", "all equal", "others masked out"])
def test_bears_extreme_values(case, tokens, keys, dtype, recorded, device, rng):
    query, key, value = sample((2, 1, 1, tokens, keys, 1, 64), dtype, device, rng)
    further = {}
    if case == "beyond float16":  # scores of 72,200 and of less, by steps that leave no doubt
        query = torch.full_like(query, 95)
        key = torch.full_like(key, 90)
        key[:, :, 3] = 95
    elif case == "all equal":
        key = key[:, :, :1].expand_as(key)
    else:
        further["key_rows"] = torch.tensor([[1], [0]], device=device)
        further["key_log_mask"] = torch.full((2, 1, keys), -math.inf, device=device)
    exact = plain(*(t.double() for t in (query, key, value)), 1)
    query.requires_grad_(recorded)
    got = query_attention(query, key, value, heads=1, **further)
    assert_as_good_as(got.detach(), exact.to(dtype), exact, slack=4)


def test_a_blend_of_one_is_a_gather_and_of_zero_is_none_bit_for_bit(device, rng):
    shape = (3, 2, 2, 4, 4, 2, 4)
    inputs = sample(shape, torch.float32, device, rng)
    row = torch.tensor([2, 0, 2], device=device)

    def run(**options):
        return query_attention(*inputs, heads=2, **options)

    gathered, own = run(query_row=row), run()
    assert not torch.equal(gathered[:2], own[:2])
    assert torch.equal(gathered[2], own[2])  # reads itself
    for size in ((3,), (3, 2, 4)):
        one, zero = torch.ones(size, device=device), torch.zeros(size, device=device)
        assert torch.equal(run(query_row=row, query_blend=one), gathered)
        assert torch.equal(run(query_row=row, query_blend=zero), own)
    assert torch.equal(run(query_row=torch.arange(3, device=device)), own)


@pytest.mark.parametrize("tokens", [4, 200])
def test_autocast_does_not_change_the_type(tokens):
    query = torch.randn(2, 1, tokens, 8)
    options = {"query_row": torch.tensor([1, 1]), "query_blend": torch.tensor([0.5, 0.5])}
    expected = query_attention(query, query, query, heads=2, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = query_attention(query, query, query, heads=2, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("keys", [3, 4])
def test_gradient(device, rng, keys):
    if device == "cuda":
        pytest.skip("the kernel computes in float32; finite differences need float64")
    shape = (2, 2, 2 if keys == 3 else 1, 3, keys, 2, 2)
    inputs = [t.requires_grad_() for t in sample(shape, torch.float64, device, rng)]
    row = torch.tensor([1, 1], device=device)
    blend = torch.rand(2, 2, 3, generator=rng, device=device, dtype=torch.float64)

    def run(query, key, value, blend):
        return query_attention(query, key, value, heads=2, query_row=row, query_blend=blend)

    assert torch.autograd.gradcheck(run, (*inputs, blend.requires_grad_()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [9, 130])
def test_gradient_in_every_type(dtype, tokens, device, rng):
    inputs = sample((1, 1, 1, tokens, tokens, 1, 8), dtype, device, rng)
    direction = torch.randn(inputs[0].shape, generator=rng, device=device).to(dtype)

    def gradients(function, tensors):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        (function(*leaves) * direction.to(leaves[0])).sum().backward()
        return [leaf.grad for leaf in leaves]

    formula = lambda q, k, v: (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
    got = gradients(lambda q, k, v: query_attention(q, k, v, heads=1), inputs)
    naive = gradients(formula, inputs)
    exact = gradients(formula, [t.double() for t in inputs])
    for name, *three in zip("qkv", got, naive, exact, strict=True):
        assert_as_good_as(*three, slack=3.0, name=name)


@pytest.mark.parametrize("tokens", [20, 200])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *((torch.float32, size) for size in (1.0, 1.3, 7.0, 70.0, 7e2, 4e4)),
        *((torch.bfloat16, size) for size in (7.0, 90.0, 300.0, 4e4)),
        (torch.float16, 40.0),
    ],
    ids=str,
)
def test_gradients_bear_large_equal_scores(dtype, size, tokens, device, rng):
    """Scores up to 8e9; half of the keys are equal and share all the weight.

    A gradient that takes weights from the logarithm of their sum has the rounding of that number in
    all of them: two percent of a weight at a score of 2e5, and no number at 8e9.
    """
    near = lambda n: size * (1 + torch.randn(1, 1, n, 8, generator=rng, device=device).abs() / 4)
    few = lambda n: torch.randn(1, 1, n, 8, generator=rng, device=device).to(dtype) / 16
    query, one = near(tokens).to(dtype), near(1).expand(1, 1, tokens // 2, 8).to(dtype)
    given, grad = (query, torch.cat([one, -one], 2), few(tokens)), few(tokens)

    def gradients(function, kind):
        leaves = [t.detach().to(kind).requires_grad_() for t in given]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(kind))

    formula = lambda q, k, v: (q @ k.mT / 8**0.5).softmax(-1) @ v
    exact, naive = gradients(formula, torch.float64), gradients(formula, dtype)
    _, *got = gradients(lambda *t: query_attention(*t, heads=1), dtype)  # a query's is rounding
    for name, *three in zip("kv", got, naive[1:], exact[1:], strict=True):
        assert_as_good_as(*three, slack=3.0, name=f"gradient of {name}")


def test_a_gradient_is_the_same_whether_scores_are_mild_or_not(cpu_rng, monkeypatch):
    """By the fused kernel and by our own, of some lines and sequences at a time, with a mask."""
    query, key, value = sample((3, 2, 2, 130, 140, 2, 8), torch.float32, "cpu", cpu_rng)
    mask = torch.randn(3, 2, 140, generator=cpu_rng)
    mask[:, :, ::3] = -math.inf
    further = {"key_rows": torch.tensor([[1], [2], [2]]), "key_log_mask": mask}
    leaves = [t.requires_grad_() for t in (query / 4, key / 4, value)]
    grad = torch.randn(query.shape, generator=cpu_rng)
    own = operator._differentiate_on_cpu
    used = []
    monkeypatch.setattr(operator, "_differentiate_on_cpu", lambda *t: used.append(t) or own(*t))
    results = []
    for mild in (1e9, 0.0):
        monkeypatch.setattr(operator, "_mild", lambda _, most=mild: most)
        monkeypatch.setattr(operator, "_KEPT", 2 * 130 * 280)
        out = query_attention(*leaves, heads=2, **further)
        results.append(torch.autograd.grad(out, leaves, grad, retain_graph=True))
        assert bool(used) == (mild == 0)
    monkeypatch.setattr(operator, "_KEPT", 1)
    results.append(torch.autograd.grad(out, leaves, grad))
    for got, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(other, got, rtol=1e-4, atol=1e-5)


def test_many_tokens_can_be_differentiated_twice_and_in_batches(cpu_rng):
    inputs = sample((1, 1, 1, 128, 130, 2, 2), torch.float64, "cpu", cpu_rng)
    leaves = [t.requires_grad_() for t in inputs]
    run = lambda *t: query_attention(*t, heads=2)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    one = torch.func.grad(lambda q, k: run(q, k, inputs[2]).square().sum(), argnums=(0, 1))
    queries = torch.stack([inputs[0].detach(), 2 * inputs[0].detach()])
    batched = torch.func.vmap(one, in_dims=(0, None))(queries, inputs[1])
    for got, *wanted in zip(batched, *(one(q, inputs[1]) for q in queries), strict=True):
        torch.testing.assert_close(got, torch.stack(wanted))


@pytest.mark.parametrize("size", [1, 30], ids=["mild", "large"])
def test_autocast_does_not_change_a_gradient(size, cpu_rng):
    """That is our own: PyTorch's would be of the type of autocast, where it runs there as well."""
    inputs = sample((1, 1, 1, 130, 130, 2, 8), torch.float32, "cpu", cpu_rng)
    leaves = [(size * t).requires_grad_() for t in inputs]

    def gradients():
        return torch.autograd.grad(query_attention(*leaves, heads=2).square().sum(), leaves)

    wanted = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients()
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("keys", [5, 130])
@pytest.mark.parametrize("size", [(0, 2, 130), (2, 2, 0)], ids=["no rows", "no tokens"])
def test_nothing_to_attend_for_is_nothing(size, keys, device):
    """As in the other operators; the gradient of keys that nobody looks at is zero."""
    query = torch.zeros(*size, 8, device=device, requires_grad=True)
    key = torch.ones(size[0], 2, keys, 8, device=device, requires_grad=True)
    row = torch.zeros(size[0], dtype=torch.int64, device=device)
    options = {"query_row": row, "query_blend": row.to(query.dtype), "key_rows": row[:, None]}
    with torch.no_grad():
        assert query_attention(query, key, key, heads=2).shape == query.shape
    registered = lambda: torch.ops.kinetiq.query_attention(query, key, key, *[None] * 4, 2)
    for run in (registered, lambda: query_attention(query, key, key, heads=2, **options)):
        out = run()
        of_query, of_key = torch.autograd.grad(out.sum(), (query, key))
        assert out.shape == of_query.shape == query.shape
        assert of_key.shape == key.shape and not of_key.any()


@pytest.mark.parametrize("tokens", [1, 9, 130])
def test_heads_of_one_channel_are_contiguous_too(tokens, device, rng):
    inputs = sample((2, 1, 1, tokens, tokens, 3, 1), torch.float32, device, rng)
    for recorded in (False, True):
        out = query_attention(inputs[0].requires_grad_(recorded), *inputs[1:], heads=3)
        assert out.is_contiguous()
    assert torch.ops.kinetiq.query_attention(*inputs, *[None] * 4, 3).is_contiguous()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(0, 2**31))
def test_permutations_and_offsets(rows, frames, tokens, seed):
    """Symmetries of attention, which need no reference."""
    rng = torch.Generator().manual_seed(seed)
    shape = (rows, frames, frames, tokens, tokens, 2, 3)
    query, key, value = sample(shape, torch.float64, "cpu", rng)
    row = torch.randint(rows, (rows,), generator=rng)
    blend = torch.rand(rows, frames, tokens, generator=rng)
    offset = torch.randn(rows, frames, 1, 6, generator=rng, dtype=torch.float64)

    def run(q, k, v, r=row, b=blend):
        return query_attention(q, k, v, heads=2, query_row=r, query_blend=b)

    base = run(query, key, value)
    place = torch.randperm(tokens, generator=rng)
    close = torch.testing.assert_close
    close(run(query[:, :, place], key, value, b=blend[:, :, place]), base[:, :, place])
    close(run(query, key[:, :, place], value[:, :, place]), base)
    order = torch.randperm(rows, generator=rng)
    moved = (t[order] for t in (query, key, value))
    close(run(*moved, r=order.argsort()[row[order]], b=blend[order]), base[order])
    close(run(query, key + offset, value), base)  # softmax ignores what all keys share
    close(run(query, key, value + offset), base + offset)  # the weights sum to one


def test_the_leak_reduced_query_is_the_other_rows_motion_on_the_own_mean(device, rng):
    query = torch.randn(3, 4, 2, 6, generator=rng, device=device, dtype=torch.float64)
    row = torch.tensor([2, 2, 0], device=device)
    reduced = torch.tensor([True, False, True], device=device)
    got = operator.reduce_leak(query, row, reduced)
    assert torch.equal(got[1], query[2])
    for target, source in ((0, 2), (2, 0)):
        torch.testing.assert_close(got[target].mean(0), query[target].mean(0))
        torch.testing.assert_close(got[target].diff(dim=0), query[source].diff(dim=0))
    static = torch.randn(1, 2, 6, generator=rng, device=device, dtype=torch.float64)
    query[2] += static  # what the source shows all along does not reach a reduced row
    torch.testing.assert_close(operator.reduce_leak(query, row, reduced)[0], got[0])


ZEROS = torch.zeros(2, 3, 4, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 4, 6)}, r"query must be .* with heads = 2, got \[2, 4, 6\]"),
        ({"heads": 4}, r"with heads = 4, got \[2, 3, 4, 6\]"),
        ({"heads": 0}, "heads must be an int above 0, got 0"),
        ({"heads": 2.0}, "heads must be an int above 0, got 2.0"),
        ({"query_row": [0, 1]}, r"query_row must be a tensor, got \[0, 1\]"),
        (
            {"key": ZEROS[:1]},
            r"key must be \[rows = 2, frames or 1, keys, 6\] .* got \[1, 3, 4, 6\]",
        ),
        ({"value": ZEROS[..., :4]}, r"value must be .* got \[2, 3, 4, 4\]"),
        ({"key": ZEROS[:, :2]}, "key must have 3 frames or 1, got 2"),
        ({"key": ZEROS[:, :1]}, r"one shape, got \[2, 1, 4, 6\] and \[2, 3, 4, 6\]"),
        (
            {"key": ZEROS.half()},
            "key must be torch.float32 on cpu like query, got torch.float16 on",
        ),
        ({"query_row": torch.zeros(3, dtype=torch.int64)}, r"int64 \[rows = 2\], got .* \[3\]"),
        ({"query_row": torch.zeros(2)}, r"query_row must be int64 .* got torch.float32 \[2\]"),
        (
            {"query_row": torch.zeros(2, dtype=torch.int64), "query_blend": torch.ones(2, 3)},
            r"query_blend must be \[rows\] or .* = \[2, 3, 4\], got \[2, 3\]",
        ),
        ({"query_blend": torch.ones(2)}, "query_blend needs query_row, got query_blend alone"),
    ],
)
def test_says_what_is_wrong(change, message):
    given_ = {"query": ZEROS, "key": ZEROS, "value": ZEROS, "heads": 2} | change
    with pytest.raises(kq.ShapeError, match="^query_attention: .*" + message):
        query_attention(**given_)


def test_an_index_that_vmap_batches_is_refused_in_words():
    rows = torch.tensor([[0, 1], [1, 0]])
    attend = lambda row: query_attention(ZEROS, ZEROS, ZEROS, heads=2, query_row=row)
    with pytest.raises(kq.ShapeError, match=r"query_row must hold numbers .* vmap batches"):
        torch.vmap(attend)(rows)


def test_a_trace_does_not_look_at_the_values_of_an_index():
    row = torch.tensor([1, 0])
    attend = lambda *given: query_attention(*given[:3], heads=2, query_row=given[3])
    given = (*(torch.randn(2, 3, 4, 6) for _ in range(3)), row)
    traced = make_fx(attend, tracing_mode="fake")(*given)
    assert torch.equal(traced(*given), attend(*given))
