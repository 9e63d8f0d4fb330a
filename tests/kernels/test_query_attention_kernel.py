"""The query attention kernels themselves, compiled on a GPU and interpreted on a CPU.

Not in bfloat16, whose product the interpreter gets wrong.
"""

import importlib
import math

import pytest
import torch
from closeness import assert_as_good_as
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kinetiq as kq
from kinetiq.kernels import _compile, _launch, query_attention

operator = importlib.import_module("kinetiq.kernels.query_attention")  # not the function
TAIL = 64  # elements behind an output that must stay as they are


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16, so that few tokens are several tiles, the last of them not full."""
    tiles = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    whole = {"BLOCK": 256, "num_warps": 4}
    choose = lambda kernel, _="*": dict(whole if "return" in kernel else tiles)
    monkeypatch.setattr(operator, "settings", choose)


def plain(query, key, value, blend=None, *, heads, row=None, key_rows=None, mask=None):
    """The formula, a row at a time, in the type of the input."""
    results = []
    d = query.shape[-1] // heads
    split = lambda t: t.unflatten(-1, (heads, d)).transpose(1, 2)  # [frames, heads, tokens, d]
    for r in range(len(query)):
        q, seen = query[r], [r]
        if row is not None:
            share = q.new_ones(()) if blend is None else blend[r].to(q.dtype)
            share = share.reshape(share.shape + (1,) * (3 - share.ndim))
            q = q + share * (query[row[r]] - q)
        if key_rows is not None:
            seen += [s for s in key_rows[r].tolist() if s != r]
        k, v = (split(torch.cat([t[s] for s in seen], 1)) for t in (key, value))
        bias = q.new_zeros(key.shape[1:3])
        others = [bias if mask is None else mask[s].to(q.dtype) for s in seen[1:]]
        scores = split(q) @ k.transpose(-1, -2) / d**0.5
        weights = (scores + torch.cat([bias, *others], 1)[:, None, None]).softmax(-1)
        results.append((weights @ v).transpose(1, 2).flatten(-2))
    return torch.stack(results)


def among_nans(tensor):
    """The same values with no stride as in a contiguous tensor, and NaN wherever else memory is."""
    rows, frames, tokens, width = tensor.shape
    store = tensor.new_full((tokens + 1, rows, frames, 2 * width + 3), math.nan)
    view = store[:tokens, ..., 1 : 2 * width + 1 : 2].permute(1, 2, 0, 3)
    view.copy_(tensor)
    return view


class Outputs:
    """Tensors filled with NaN, each in front of a tail that must not be written."""

    def __init__(self):
        self._stores = []

    def like(self, tensor, dtype=None):
        return self.new(tensor.shape, dtype or tensor.dtype, tensor.device)

    def new(self, shape, dtype, device):
        size = math.prod(shape)
        store = torch.full((size + TAIL,), math.nan, dtype=dtype, device=device)
        store[size:] = 7
        self._stores.append(store)
        return store[:size].view(shape)

    def assert_tails_untouched(self):
        assert all((store[-TAIL:] == 7).all() for store in self._stores)


def collect(query, key, value, blend=None, *, heads, row=None, key_rows=None, mask=None):
    return operator.Inputs(query, key, value, row, blend, key_rows, mask, heads)


def run_forward(*tensors, **options):
    inputs, outputs = collect(*tensors, **options), Outputs()
    rows, frames, tokens, _ = inputs.query.shape
    out = outputs.like(inputs.query)
    size = (rows, frames, inputs.heads, 2, tokens)
    statistics = outputs.new(size, torch.float32, out.device)
    operator._launch_forward(inputs, out, statistics)
    outputs.assert_tails_untouched()
    return out, statistics


def run_backward(grad, out, statistics, *tensors, **options):
    """Gradients of query, key, value and, if there is one, blend."""
    inputs, outputs = collect(*tensors, **options), Outputs()
    query, key, _, row, blend, *_ = inputs
    chosen, dots = outputs.like(query), outputs.like(statistics[:, :, :, 0])
    share_grad = None if blend is None else outputs.like(dots)
    operator._launch_query_gradient(grad, out, statistics, inputs, chosen, dots, share_grad)
    query_grad = chosen
    if row is not None:
        query_grad = outputs.like(query)
        operator._launch_return_gradient(chosen, inputs, query_grad)
    size = (*query.shape[:2], *key.shape[2:])
    kind = torch.float32 if inputs.shares_keys else key.dtype
    key_grad, value_grad = (outputs.new(size, kind, key.device) for _ in range(2))
    operator._launch_key_gradient(grad, statistics, dots, inputs, key_grad, value_grad)
    outputs.assert_tails_untouched()
    if inputs.shares_keys:
        key_grad, value_grad = (
            t.sum(1, keepdim=True).to(key.dtype) for t in (key_grad, value_grad)
        )
    if share_grad is None:
        return query_grad, key_grad, value_grad
    blend_grad = share_grad.sum(2 if blend.ndim == 3 else (1, 2, 3)).to(blend.dtype)
    return query_grad, key_grad, value_grad, blend_grad


def sample(rows, frames, key_frames, tokens, keys, heads, d, dtype, device, rng):
    make = lambda *size: torch.randn(*size, heads * d, generator=rng, device=device).to(dtype)
    key, value = make(rows, key_frames, keys), make(rows, key_frames, keys)
    return make(rows, frames, tokens), 2 * key, value


def check(inputs, blend, options, rng):
    """Forward and backward against float64, each as good as plain PyTorch in the same type."""
    strided = [among_nans(t) for t in inputs]
    out, statistics = run_forward(*strided, blend, **options)
    grad = torch.randn(out.shape, generator=rng, device=out.device).to(out.dtype)
    trained = inputs if blend is None else [*inputs, blend]

    def differentiate(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in trained]
        result = plain(*leaves, **options)
        return result.detach(), torch.autograd.grad(result, leaves, grad.to(dtype))

    naive, naive_grads = differentiate(out.dtype)
    exact, exact_grads = differentiate(torch.float64)
    assert_as_good_as(out, naive, exact)
    got = run_backward(grad, out, statistics, *strided, blend, **options)
    names = ("query", "key", "value", "blend")[: len(trained)]
    for name, *three in zip(names, got, naive_grads, exact_grads, strict=True):
        assert_as_good_as(*three, slack=3.0, name=f"gradient of {name}")


@pytest.mark.parametrize("d", [3, 8, 16, 40, 64, 80, 96, 128, 160, 192, 256])
def test_kernels_agree_with_float64_at_every_head_dim(d, kernel_device, kernel_rng):
    check(
        sample(1, 1, 1, 17, 21, 1, d, torch.float16, kernel_device, kernel_rng),
        None,
        {"heads": 1},
        kernel_rng,
    )


def test_kernels_keep_heads_and_frames_apart(kernel_device, kernel_rng):
    check(
        sample(1, 2, 2, 17, 5, 2, 40, torch.float32, kernel_device, kernel_rng),
        None,
        {"heads": 2},
        kernel_rng,
    )


@pytest.mark.parametrize(
    ("dtype", "frames", "key_frames", "blend", "further"),
    [
        pytest.param(torch.float32, 1, 1, None, 0, id="row"),
        pytest.param(torch.float16, 2, 1, "rows", 0, id="blend, shared keys"),
        pytest.param(torch.float32, 1, 1, "tokens", 2, id="blend of tokens, further keys"),
        pytest.param(torch.float16, 2, 1, None, 1, id="shared further keys"),
    ],
)
def test_kernels_read_rows_by_index(
    dtype, frames, key_frames, blend, further, kernel_device, kernel_rng
):
    rows, tokens = 3, 17 if frames == 1 else 5
    inputs = sample(rows, frames, key_frames, tokens, 16, 1, 8, dtype, kernel_device, kernel_rng)
    sizes = {None: None, "rows": (rows,), "tokens": (rows, frames, tokens)}
    share = None
    if blend is not None:  # past one half and below, where the formula differs
        share = torch.rand(sizes[blend], generator=kernel_rng, device=kernel_device)
    options = {"heads": 1, "row": torch.tensor([2, 2, 1], device=kernel_device)}
    if further:  # the row itself, twice the same, and one from each of two
        options["key_rows"] = torch.tensor([[0, 1], [2, 2], [0, 1]], device=kernel_device)[
            :, :further
        ]
        mask = torch.randn(rows, key_frames, 16, generator=kernel_rng, device=kernel_device)
        mask[:, :, ::3] = -math.inf
        mask[1] = -math.inf  # nobody sees any of this row
        options["mask"] = mask
    check(inputs, share, options, kernel_rng)


def test_statistics_are_the_highest_score_and_the_logarithm_of_the_sum_behind_it(
    kernel_device, kernel_rng
):
    query, key, value = sample(1, 1, 1, 5, 21, 1, 8, torch.float32, kernel_device, kernel_rng)
    _, statistics = run_forward(query, key, value, heads=1)
    scores = query.double() @ key.double().transpose(-1, -2)
    high = scores.amax(-1)
    total = ((scores - high[..., None]) / 8**0.5).exp().sum(-1)
    exact = torch.stack([high, total.log2()], 2)[:, :, None]
    torch.testing.assert_close(statistics.double(), exact, rtol=0, atol=1e-5)


def spread(tensor, store, offset, strides):
    """The same values in `store`, with these strides."""
    view = store.as_strided(tensor.shape, strides, offset)
    return view.copy_(tensor)


def test_offsets_reach_beyond_2_to_the_31(kernel_device, kernel_rng):
    """Rows, keys and frames that far apart, in memory of which hardly a page is touched."""
    inputs = sample(3, 3, 3, 3, 3, 1, 8, torch.float16, kernel_device, kernel_rng)
    store = torch.empty(2**31 + 2**12, dtype=torch.float16, device=kernel_device)
    layouts = (0, (2**30, 128, 16, 1)), (1024, (256, 64, 2**30, 1)), (2048, (128, 2**30, 16, 1))
    apart = [spread(t, store, *layout) for t, layout in zip(inputs, layouts, strict=True)]
    results = []
    for tensors in (inputs, apart):
        out, statistics = run_forward(*tensors, heads=1)
        results.append((out, statistics, *run_backward(out, out, statistics, *tensors, heads=1)))
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far)


def test_programs_are_counted_on_the_axis_that_has_no_end_at_65535(monkeypatch):
    grids = {}

    class Caught:
        def __init__(self, name):
            self._name = name

        def __getitem__(self, grid):
            grids[self._name] = grid
            return lambda *_, **__: None

    for name in ("query_attention", "query_gradient", "key_gradient", "return_gradient"):
        monkeypatch.setattr(operator, f"_{name}_kernel", Caught(name))
    query = torch.empty(65_536, 3, 20, 16, device="meta")
    key, row = query[:, :, :16], torch.empty(65_536, device="meta", dtype=torch.int64)
    inputs = collect(query, key, key, heads=2, row=row)
    statistics = operator._empty_statistics(query, 2)
    operator._launch_forward(inputs, query, statistics)
    operator._differentiate(query, query, statistics, inputs, keys_needed=True, blend_needed=False)
    sequences = 65_536 * 3 * 2
    assert grids == {
        "query_attention": (sequences * 2,),  # tiles of 16 of 20 tokens
        "query_gradient": (sequences * 2,),
        "key_gradient": (sequences,),
        "return_gradient": (65_536 * 4,),  # of 256 of 960 elements
    }


@pytest.mark.parametrize("case", ["beyond float16", "all equal", "others masked out"])
def test_kernels_bear_extreme_values(case, kernel_device, kernel_rng):
    query, key, value = sample(2, 1, 1, 5, 20, 1, 8, torch.float16, kernel_device, kernel_rng)
    options = {}
    if case == "beyond float16":  # scores up to 1e10; the largest takes it all
        query, key = (t.clamp(-3, 3) * 2e4 for t in (query, key))
        value = value.sign() * 65504
    elif case == "all equal":
        key = key[:, :, :1].expand_as(key)
    else:
        options["key_rows"] = torch.tensor([[1], [0]], device=kernel_device)
        options["mask"] = torch.full((2, 1, 20), -math.inf, device=kernel_device)
    out, _ = run_forward(query, key, value, heads=1, **options)
    exact = plain(*(t.double() for t in (query, key, value)), heads=1)
    assert_as_good_as(out, exact.half(), exact)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, 7.0), (torch.float32, 7e2), (torch.float32, 4e4), (torch.float16, 6e4)],
    ids=str,
)
def test_gradients_bear_large_equal_scores(dtype, size, kernel_device, kernel_rng):
    """Scores from 400 to 3e10, in which eleven equal keys share all the weight."""
    make = lambda n: torch.randn(1, 1, n, 8, generator=kernel_rng, device=kernel_device).to(dtype)
    value, grad = make(20) / 16, make(5) / 16
    if dtype == torch.float16:  # numbers of four bits, whose products add up exactly in any order
        few = lambda n: (
            torch.randint(8, 16, (1, 1, n, 8), generator=kernel_rng, device=kernel_device) * 4096
        )
    else:
        few = lambda n: size * (1 + make(n).abs() / 4)
    query, one = few(5).to(dtype), few(1).to(dtype)
    key = torch.cat([one.expand(1, 1, 11, 8), -one.expand(1, 1, 9, 8)], 2)
    given = (query, key, value)
    out, statistics = run_forward(*given, heads=1)
    query_grad, *got = run_backward(grad, out, statistics, *given, heads=1)

    def differentiate(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in given]
        return torch.autograd.grad(plain(*leaves, heads=1), leaves, grad.to(dtype))[1:]

    exact = differentiate(torch.float64)
    # scores are beyond float16, so that plain PyTorch has nothing to say
    naive = differentiate(dtype) if dtype == torch.float32 else [t.half() for t in exact]
    for name, *three in zip(("key", "value"), got, naive, exact, strict=True):
        assert_as_good_as(*three, slack=3.0, name=f"gradient of {name}")
    # A query's is 0, but for the rounding of dot products of `d` numbers that cancel.
    terms = grad.double().abs() @ value.double().abs().transpose(-1, -2)
    rounding = 2 * 8 * torch.finfo(dtype).eps * terms.max() * one.double().abs().max() / 8**0.5
    assert query_grad.abs().max() <= rounding


def test_no_weight_is_above_one_in_gradients_whatever_the_rounding_of_scores(
    kernel_device, kernel_rng
):
    query, key, value = sample(1, 1, 1, 17, 20, 1, 8, torch.float16, kernel_device, kernel_rng)
    query, key, value = query.clamp(-3, 3) * 2e4, key.clamp(-3, 3) * 2e4, value / 16
    out, statistics = run_forward(query, key, value, heads=1)
    grad = torch.randn(out.shape, generator=kernel_rng, device=kernel_device).half() / 16
    *both, value_grad = run_backward(grad, out, statistics, query, key, value, heads=1)
    assert all(t.isfinite().all() for t in both)
    most = grad.abs().sum(2, keepdim=True)
    assert (value_grad.abs() <= most * (1 + 1e-3)).all()


# Each is one wrong line: the function that it is in, what the line says, and what it says instead.
MUTANTS = [
    ("_product", "if len(left) > 1", "if len(left) > 2"),
    ("_own_and_other", "tl.load(query_row_ptr + row)", "row"),
    ("_choose_part", "near + share * way", "near"),
    ("_choose_part", "far - (1.0 - share) * way", "far"),
    ("_entry", "masked & (seen == row)", "masked & (seen != row)"),
    ("_scores", "inside & masked", "inside"),
    ("_scores", "mask * (1.0 / SCALE)", "mask"),
    ("_scores", "if not EVEN", "if EVEN"),
    ("_see_keys", "total * fade", "total"),
    ("_see_keys", "_scaled(out, fade[:, None])", "out"),
    ("_query_attention_kernel", "1.0 / total[:, None]", "1.0"),
    ("_weights", "- log2_total", ""),
    ("_gather_from_keys", "- dots[:, None]", ""),
    ("_query_gradient_kernel", "_scaled(sums, SCALE)", "sums"),
    ("_query_gradient_kernel", "far - near", "far"),
    ("_gather_from_queries", "bias[:, None]", "0.0"),
    ("_gather_from_queries", "- dots[None, :]", ""),
    ("_key_gradient_kernel", "pair % entries != 0", "pair % entries != 1"),
    ("_return_gradient_kernel", "(1.0 - share) * grad", "grad"),
    ("_return_gradient_kernel", "grad *= share", "grad *= 1.0"),
]


@pytest.mark.parametrize(("function", "line", "instead"), [(None, "", ""), *MUTANTS])
def test_a_wrong_line_is_found(function, line, instead, kernel_device, kernel_rng, mutate):
    """The comparison holds for the kernels as they are, and for none that differs by a line."""
    inputs = sample(2, 1, 1, 5, 17, 1, 40, torch.float32, kernel_device, kernel_rng)
    options = {
        "heads": 1,
        "row": torch.tensor([1, 0], device=kernel_device),
        "key_rows": torch.tensor([[1], [1]], device=kernel_device),
        "mask": torch.randn(2, 1, 17, generator=kernel_rng, device=kernel_device),
    }
    blend = torch.rand(2, 1, 5, generator=kernel_rng, device=kernel_device)
    if function is None:
        check(inputs, blend, options, kernel_rng)
        return
    mutate(operator, function, line, instead)
    with pytest.raises(AssertionError):
        check(inputs, blend, options, kernel_rng)


def test_a_row_that_lists_itself_or_is_masked_out_sees_its_own_keys_alone(
    kernel_device, kernel_rng
):
    inputs = sample(2, 1, 1, 5, 20, 1, 8, torch.float32, kernel_device, kernel_rng)
    own, _ = run_forward(*inputs, heads=1)
    itself = torch.tensor([[0], [1]], device=kernel_device)
    assert torch.equal(run_forward(*inputs, heads=1, key_rows=itself)[0], own)
    hidden = torch.full((2, 1, 20), -math.inf, device=kernel_device)
    other = itself.flip(0)
    assert torch.equal(run_forward(*inputs, heads=1, key_rows=other, mask=hidden)[0], own)
    assert not torch.equal(run_forward(*inputs, heads=1, key_rows=other)[0], own)
    torch.testing.assert_close(query_attention(*inputs, heads=1, key_rows=itself), own)


def test_kernels_gather_exactly_at_the_ends_of_a_blend(kernel_device, kernel_rng):
    inputs = sample(2, 1, 1, 5, 7, 1, 8, torch.float16, kernel_device, kernel_rng)
    row = torch.tensor([1, 0], device=kernel_device)
    shares = torch.tensor([1.0, 0.0], device=kernel_device)
    blended, _ = run_forward(*inputs, shares.half(), heads=1, row=row)
    gathered, _ = run_forward(*inputs, heads=1, row=row)
    own, _ = run_forward(*inputs, heads=1)
    assert torch.equal(blended[0], gathered[0])
    assert torch.equal(blended[1], own[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "key_frames"), [(5, 2), (5, 1), (130, 2)])
def test_operator_with_further_keys_agrees_with_float64(tokens, key_frames, dtype, device, rng):
    inputs = sample(3, 2, key_frames, tokens, tokens, 2, 8, dtype, device, rng)
    key_rows = torch.tensor([[0, 1], [2, 2], [1, 0]], device=device)
    mask = torch.randn(3, key_frames, tokens, generator=rng, device=device)
    mask[:, :, 1::2] = -math.inf
    run = lambda f, t: f(*t, heads=2, key_rows=key_rows, key_log_mask=mask)
    own = {"heads": 2, "key_rows": key_rows, "mask": mask}
    naive, exact = plain(*inputs, **own), plain(*(t.double() for t in inputs), **own)
    got = run(query_attention, inputs)
    assert got.dtype == dtype and got.is_contiguous()
    assert_as_good_as(got, naive, exact)
    wide = torch.promote_types(dtype, torch.float32)
    reference = run(operator.query_attention_reference, [t.to(wide) for t in inputs])
    assert_as_good_as(reference.to(dtype), naive, exact, name="reference")


def arguments(device, rng, dtype=torch.float32):
    """Positional arguments of the operator with everything that it can be given."""
    inputs = sample(2, 2, 2, 3, 4, 1, 2, dtype, device, rng)
    row, key_rows = torch.tensor([1, 1], device=device), torch.tensor([[1], [0]], device=device)
    blend = torch.rand(2, 2, 3, generator=rng, device=device).to(dtype)
    mask = torch.randn(2, 2, 4, generator=rng, device=device)
    trained = [t.requires_grad_() for t in (*inputs, blend)]
    return *trained[:3], row, trained[3], key_rows, mask, 1


@pytest.mark.parametrize("everything", [False, True])
def test_is_a_well_formed_operator(everything, device, rng):
    given = arguments(device, rng)
    if not everything:
        given = (*given[:3], None, None, None, None, 1)
    torch.library.opcheck(torch.ops.kinetiq.query_attention.default, given)


def test_gradient_of_the_operator(device, rng):
    if device == "cuda":
        pytest.skip("the kernel computes in float32; finite differences need float64")
    query, key, value, row, blend, key_rows, mask, heads = arguments(device, rng, torch.float64)

    def run(query, key, value, blend):
        return torch.ops.kinetiq.query_attention(
            query, key, value, row, blend, key_rows, mask, heads
        )

    def public(query, key, value, blend):
        return query_attention(
            query, key, value, heads=heads, query_row=row, query_blend=blend,
            key_rows=key_rows, key_log_mask=mask,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (query, key, value, blend))
    assert torch.autograd.gradcheck(public, (query, key, value, blend))
    mask.requires_grad_()
    for function in (run, public):
        function(query, key, value, blend).sum().backward()
        assert mask.grad is None


def test_gradient_of_the_operator_twice(cpu_rng):
    *given, row, blend, key_rows, mask, heads = arguments("cpu", cpu_rng, torch.float64)

    def run(query, key, value, blend):
        return torch.ops.kinetiq.query_attention(
            query, key, value, row, blend, key_rows, mask, heads
        )

    assert torch.autograd.gradgradcheck(run, (*given, blend))


def test_autocast_does_not_change_the_gradient_of_the_operator(cpu_rng):
    *given, row, blend, key_rows, mask, heads = arguments("cpu", cpu_rng)
    leaves = (*given, blend)

    def gradients():
        out = torch.ops.kinetiq.query_attention(*given, row, blend, key_rows, mask, heads)
        return torch.autograd.grad(out.square().sum(), leaves)

    wanted = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients()
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def training(kernel_device):
    """The operator for training; on a CPU its kernels are interpreted, as they are nowhere else."""
    if kernel_device == "cpu":
        for op in (operator._query_attention_training, operator._query_attention_backward):
            op.register_kernel("cpu")(op._init_fn)
    return torch.ops.kinetiq.query_attention_training


@pytest.mark.parametrize("frames", [1, 2])
def test_gradient_of_the_operator_for_training(frames, training, kernel_device, kernel_rng):
    """Queries, blend and keys, which the frames share if there are two."""
    query, key, value = sample(2, frames, 1, 5, 7, 1, 8, torch.float32, kernel_device, kernel_rng)
    row, further = (
        torch.tensor([1, 0], device=kernel_device),
        torch.tensor([[1], [1]], device=kernel_device),
    )
    size = (2,) if frames == 1 else (2, frames, 5)
    blend = torch.rand(size, generator=kernel_rng, device=kernel_device)
    mask = torch.randn(2, 1, 7, generator=kernel_rng, device=kernel_device)
    direction = torch.randn(query.shape, generator=kernel_rng, device=kernel_device)

    def gradients(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (query, key, value, blend)]
        return torch.autograd.grad((function(*leaves) * direction.to(dtype)).sum(), leaves)

    formula = lambda *t: plain(*t, heads=1, row=row, key_rows=further, mask=mask)
    kernels = lambda q, k, v, b: training(q, k, v, row, b, further, mask, 1)[0]
    got = gradients(kernels, torch.float32)
    naive, exact = gradients(formula, torch.float32), gradients(formula, torch.float64)
    for name, *three in zip(("q", "k", "v", "blend"), got, naive, exact, strict=True):
        assert_as_good_as(*three, slack=3.0, name=name)


def test_gradients_that_nobody_needs_are_not_computed(
    training, kernel_device, kernel_rng, monkeypatch
):
    query, key, value = sample(1, 1, 1, 5, 7, 1, 8, torch.float32, kernel_device, kernel_rng)
    expected = training(query.requires_grad_(), key, value, None, None, None, None, 1)[0]
    every = [t.detach().requires_grad_() for t in (query, key, value)]
    whole = torch.autograd.grad(training(*every, None, None, None, None, 1)[0].sum(), every)
    monkeypatch.delattr(operator, "_launch_key_gradient")  # to call it would be an error
    (alone,) = torch.autograd.grad(expected.sum(), [query])
    assert torch.equal(alone, whole[0])


def test_is_a_well_formed_operator_for_training(training, kernel_device, kernel_rng):
    given = sample(1, 1, 1, 3, 4, 1, 8, torch.float32, kernel_device, kernel_rng)
    given = *(t.requires_grad_() for t in given), None, None, None, None, 1
    torch.library.opcheck(training.default, given)


@pytest.mark.parametrize("everything", [False, True])
def test_is_a_well_formed_operator_for_gradients(everything, training, kernel_device, kernel_rng):
    query, key, value, *controls, heads = arguments(kernel_device, kernel_rng)
    if not everything:
        controls = [None] * len(controls)
    given = [None if t is None else t.detach() for t in (query, key, value, *controls)]
    out, statistics = training(*given, heads)
    torch.library.opcheck(
        torch.ops.kinetiq.query_attention_backward.default,
        (out, out, statistics, *given, heads, True, everything),
        test_utils=("test_schema", "test_faketensor"),
    )


class Site(torch.nn.Module):
    def forward(self, query, key, value, row, blend=None, key_rows=None, mask=None):
        return query_attention(
            query, key, value, heads=2, query_row=row, query_blend=blend,
            key_rows=key_rows, key_log_mask=mask,
        )  # fmt: skip


@pytest.mark.parametrize("everything", [False, True])
def test_export_keeps_one_node(everything, device, rng):
    def given(rows, tokens):
        inputs = sample(rows, 2, 2, tokens, tokens, 2, 8, torch.float32, device, rng)
        row = torch.arange(rows, device=device).roll(1)
        if not everything:
            return *inputs, row
        blend = torch.rand(rows, 2, tokens, generator=rng, device=device)
        mask = torch.randn(rows, 2, tokens, generator=rng, device=device)
        return *inputs, row, blend, row[:, None], mask

    rows, tokens = torch.export.Dim("rows", min=2, max=9), torch.export.Dim("tokens", min=2)
    by_token = {0: rows, 2: tokens}
    sizes = (by_token, by_token, by_token, {0: rows}, by_token, {0: rows}, by_token)
    first = given(2, 6)
    program = torch.export.export(Site(), first, dynamic_shapes=sizes[: len(first)])
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.kinetiq.query_attention.default]
    other = given(3, 9)
    torch.testing.assert_close(program.module()(*other), Site()(*other))


def test_compiles_into_one_graph_with_its_gradient(device, rng):
    inputs = sample(2, 1, 1, 5, 5, 2, 8, torch.float32, device, rng)
    row = torch.tensor([1, 1], device=device)
    compiled = torch.compile(Site(), fullgraph=True, backend="aot_eager")

    def gradients(module):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = module(*leaves, row)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    for got, expected in zip(gradients(compiled), gradients(Site()), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_captured_graph_reads_the_rows_that_it_is_given_later(kernel_device, kernel_rng):
    if kernel_device == "cpu":
        pytest.skip("graphs are captured on a GPU")
    inputs = sample(3, 2, 2, 17, 21, 2, 40, torch.float16, kernel_device, kernel_rng)
    row = torch.tensor([1, 1, 2], device=kernel_device)
    kept = torch.ops.kinetiq.query_attention_training

    def run():
        out, total = kept(*inputs, row, None, None, None, 2)
        return out, *torch.ops.kinetiq.query_attention_backward(
            out, out, total, *inputs, row, None, None, None, 2, True, False
        )  # fmt: skip

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # which draws the inputs
    with torch.cuda.stream(side):
        run()  # kernels are compiled, which a capture does not allow
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    row.copy_(torch.tensor([2, 0, 0]))
    graph.replay()
    for replayed, expected in zip(captured, run(), strict=True):
        assert torch.equal(replayed, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_row": torch.zeros(2, dtype=torch.int64, device="meta")}, "query_row must be on cpu like query, got meta"),
        ({"key_rows": torch.zeros(2, 1, dtype=torch.int64, device="meta")}, "key_rows must be on cpu like query, got meta"),
        ({"query_row": torch.zeros(2, dtype=torch.int64), "query_blend": torch.ones(2, dtype=torch.int64)}, "query_blend must be float32, .* got torch.int64"),
        ({name: torch.zeros(2, 1, 3, 4, dtype=torch.int64) for name in ("query", "key", "value")}, "query must be float32, float16, bfloat16 or float64, got torch.int64"),
        ({name: torch.zeros(2, 1, 3, 4).to(torch.float8_e4m3fn) for name in ("query", "key", "value")}, "query must be float32, .* got torch.float8_e4m3fn"),
        *(({name: [1]}, rf"{name} must be a tensor, got \[1\]") for name in ("query", "key", "value")),
        ({"key_rows": torch.zeros(2, dtype=torch.int64)}, r"key_rows must be int64 \[rows = 2, n\], got torch.int64 \[2\]"),
        ({"key_rows": torch.zeros(2, 1)}, "key_rows must be int64 .* got torch.float32"),
        ({"key_rows": torch.tensor([[0], [2]])}, "key_rows must have values from 0 to 1, got 0 to 2"),
        ({"query_row": torch.tensor([-1, 1])}, "query_row must have values from 0 to 1, got -1 to 1"),
        ({"key_log_mask": torch.zeros(2, 1, 3)}, "key_log_mask needs key_rows, got key_log_mask alone"),
        (
            {"key_rows": torch.zeros(2, 1, dtype=torch.int64), "key_log_mask": torch.zeros(2, 3)},
            r"key_log_mask must be \[rows, frames, keys\] = \[2, 1, 3\] .* got \[2, 3\]",
        ),
        (
            {"key_rows": torch.zeros(2, 1, dtype=torch.int64), "key_log_mask": torch.zeros(2, 1, 3, dtype=torch.bool)},
            "key_log_mask must be float32, .* got torch.bool",
        ),
        ({"query": torch.zeros(2, 0, 3, 4)}, r"at least one frame, key and channel, got \[2, 0, 3, 4\] and \[2, 1, 3, 4\]"),
        ({name: torch.zeros(2, 1, 0, 4) for name in ("key", "value")}, r"at least one frame, key and channel, got .* and \[2, 1, 0, 4\]"),
        ({name: torch.zeros(2, 1, 3, 0) for name in ("query", "key", "value")}, r"channel, got \[2, 1, 3, 0\] and \[2, 1, 3, 0\]"),
    ],
)  # fmt: skip
def test_says_what_is_wrong(change, message):
    zeros = torch.zeros(2, 1, 3, 4)
    given = {"query": zeros, "key": zeros, "value": zeros, "heads": 2} | change
    with pytest.raises(kq.ShapeError, match="^query_attention: .*" + message):
        query_attention(**given)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (torch.empty(1, 1, 1, 514), r"d <= 256 on a GPU, got torch.float32 with d = 257"),
        (torch.empty(1, 1, 1, 16).double(), r"bfloat16 with d <= .* got torch.float64 with d = 8"),
    ],
)
def test_says_what_a_gpu_cannot_hold(query, message):
    with pytest.raises(kq.ShapeError, match="^query_attention: query must be .*" + message):
        operator._check_kernel(query, 2)
    operator._check_kernel(torch.empty(1, 1, 1, 512), 2)


@pytest.mark.gpu
@pytest.mark.parametrize("query", [torch.empty(1, 1, 1, 514), torch.empty(1, 1, 1, 16).double()])
def test_a_gpu_is_asked_for_no_more_than_it_holds(query):
    with pytest.raises(kq.ShapeError, match=r"d <= 256 on a GPU, got "):
        query_attention(*[query.cuda()] * 3, heads=2)


@pytest.mark.parametrize("index", [2, -1])
def test_a_graph_on_a_cpu_is_told_of_rows_that_are_not(index):
    zeros, row = torch.zeros(2, 1, 3, 4), torch.tensor([0, index])
    for name, rows in (("query_row", (row, None, None)), ("key_rows", (None, None, row[:, None]))):
        message = f"^query_attention: {name} must have values from 0 to 1, got "
        with pytest.raises(kq.ShapeError, match=message):
            torch.ops.kinetiq.query_attention(zeros, zeros, zeros, *rows, None, 2)


@pytest.mark.parametrize(
    ("d", "main", "tail"),
    [(1, 16, 0), (16, 16, 0), (17, 32, 0), (40, 32, 16), (64, 64, 0), (72, 64, 16), (80, 64, 16),
     (96, 64, 32), (112, 128, 0), (160, 128, 32), (192, 128, 64), (256, 256, 0)],
)  # fmt: skip
def test_head_dims_are_split_where_that_pads_less(d, main, tail):
    assert operator.split_head_dim(d) == (main, tail)


def test_cost_counts_each_tensor_once():
    forward = operator.cost((2, 3, 5, 8), (2, 1, 7, 8), itemsize=2)
    assert forward.bytes == 2 * (2 * 240 + 2 * 112)
    assert forward.flops == 4 * 240 * 7
    more = operator.cost((2, 3, 5, 8), (2, 1, 7, 8), 2, further_rows=2, backward=True)
    assert more.bytes == 2 * forward.bytes
    assert more.flops == 2.5 * 3 * forward.flops


@pytest.mark.parametrize("size", [(0, 1, 5, 8), (2, 1, 0, 8)], ids=["no rows", "no tokens"])
def test_kernels_without_rows_or_tokens_are_not_launched(size, kernel_device):
    """A grid without programs is an error of the driver."""
    query = torch.zeros(size, device=kernel_device)
    key = torch.ones(size[0], 1, 20, 8, device=kernel_device)
    row = torch.zeros(size[0], dtype=torch.int64, device=kernel_device)
    blend = torch.zeros(size[0], device=kernel_device)
    given, options = (query, key, key, blend), {"heads": 1, "row": row}
    out, statistics = run_forward(*given, **options)
    *of_queries, of_key, of_value, _ = run_backward(out, out, statistics, *given, **options)
    assert out.shape == of_queries[0].shape == size
    assert not of_key.any() and not of_value.any()


@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the device is always the same
)
@given(
    rows=st.integers(1, 3),
    frames=st.integers(1, 3),
    tokens=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_kernel_follows_permutations_and_offsets(rows, frames, tokens, seed, kernel_device):
    """Symmetries of attention, which need no reference."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=rng).to(kernel_device)
    permutation = lambda count: torch.randperm(count, generator=rng).to(kernel_device)
    query, key, value = (draw(rows, frames, tokens, 8) for _ in range(3))
    row = torch.randint(rows, (rows,), generator=rng).to(kernel_device)
    blend = torch.rand(rows, frames, tokens, generator=rng).to(kernel_device)
    offset = draw(rows, frames, 1, 8)

    def run(*tensors, row=row, blend=blend):
        return run_forward(*tensors, blend, heads=1, row=row)[0]

    # A score is rounded by its size, and its weight by as much; one of each side, query and key.
    size = 1 + (query.norm(dim=-1).max() * (key + offset).norm(dim=-1).max()).item() / 8**0.5
    error = 4 * torch.finfo(torch.float32).eps * size * (value + offset).abs().max().item()
    close = lambda got, wanted: torch.testing.assert_close(got, wanted, rtol=0, atol=error)
    base = run(query, key, value)
    place, order = permutation(tokens), permutation(rows)
    close(run(query[:, :, place], key, value, blend=blend[:, :, place]), base[:, :, place])
    close(run(query, key[:, :, place], value[:, :, place]), base)
    moved = (t[order] for t in (query, key, value))
    close(run(*moved, row=order.argsort()[row[order]], blend=blend[order]), base[order])
    close(run(query, key + offset, value), base)  # softmax ignores what all keys share
    close(run(query, key, value + offset), base + offset)  # the weights sum to one


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [40, 64, 80, 96, 128, 160, 192, 256])
def test_kernels_agree_with_float64_with_the_settings_of_the_gpu(d, dtype, monkeypatch):
    """Forward and backward, with tiles as they are launched, the last ones not full."""
    monkeypatch.setattr(operator, "settings", _launch.settings)
    rng = torch.Generator("cuda").manual_seed(0)
    inputs = sample(2, 2, 2, 150, 200, 2, d, dtype, "cuda", rng)
    check(inputs, None, {"heads": 2}, rng)
    blend = torch.rand(2, 2, 150, generator=rng, device="cuda")
    check(inputs, blend, {"heads": 2, "row": torch.tensor([1, 1], device="cuda")}, rng)


@pytest.mark.gpu
def test_more_sequences_than_a_grid_axis_has():
    """Forward and backward; the last rows as they are alone."""
    rng = torch.Generator("cuda").manual_seed(0)
    given = sample(70_000, 1, 1, 5, 7, 1, 8, torch.float16, "cuda", rng)
    last = [t[-3:].contiguous() for t in given]
    out, statistics = run_forward(*given, heads=1)
    alone, own = run_forward(*last, heads=1)
    assert torch.equal(out[-3:], alone)
    assert_as_good_as(alone, plain(*last, heads=1), plain(*(t.double() for t in last), heads=1))
    grads = run_backward(out, out, statistics, *given, heads=1)
    for got, wanted in zip(grads, run_backward(alone, alone, own, *last, heads=1), strict=True):
        assert torch.equal(got[-3:], wanted)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    """Of queries and output, and of keys, which have as many rows; the last row as it is alone."""
    rows = 2**31 // (64 * 256) + 1
    query = torch.randn(rows, 1, 64, 256, device="cuda", dtype=torch.float16)
    assert query.numel() > 2**31
    inputs = operator.Inputs(query, query, query, None, None, None, None, 4)
    last = [query[-1:].clone().requires_grad_() for _ in range(3)]
    wanted = query_attention(*last, heads=4)
    out, statistics = operator._query_attention_training(*inputs)
    assert torch.equal(out[-1:], wanted)
    grads = operator._query_attention_backward(out, out, statistics, *inputs, True, False)
    for got, alone in zip(grads, torch.autograd.grad(wanted, last, wanted), strict=False):
        assert torch.equal(got[-1:], alone)


@pytest.mark.slow
@pytest.mark.gpu
def test_touches_no_memory_but_its_own(memory_check):
    memory_check(__file__, "every_head_dim[40] or read_rows or gradient_of_the_operator_for")


def test_kernel_fits_the_targets():
    requests = [
        _compile.Request("query_attention", "animatediff_64x64", True, "fp16", target)
        for target in ("sm_80", "sm_90")
    ]
    requests += [
        _compile.Request("query_attention", shape, True, "bf16", "sm_90")
        for shape in ("animatediff_32x32", "animatediff_16x16_prompt", "zeroscope_40x72")
    ]
    for account in _compile.compile_apart(requests):
        target, d = account.request.target, 48 / 40 if "64x64" in account.request.shape else 1
        assert not account.error
        assert account.spill_bytes == 0
        assert account.dots > 0 and not account.misses_matrix_units
        assert account.shared_bytes <= _compile.SHARED_LIMITS[target]
        assert account.padded_head_dim == d
        if target == "sm_90":
            assert "HGMMA" in account.matrix_instructions
