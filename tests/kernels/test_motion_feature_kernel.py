"""Motion features, by the operator and by its kernels, against the formula in float64."""

import importlib

import pytest
import torch
from closeness import assert_as_good_as
from hypothesis import given, settings
from hypothesis import strategies as st

import kinetiq as kq
from kinetiq.kernels import _compile, motion_feature

operator = importlib.import_module("kinetiq.kernels.motion_feature")  # not the function

DTYPES = [torch.float32, torch.float16]
ALL_DTYPES = [*DTYPES, torch.bfloat16]
SHAPES = [  # rows, frames, tokens, channels
    pytest.param((1, 1, 1, 1), id="smallest"),
    pytest.param((2, 5, 7, 33), id="odd"),
    pytest.param((3, 16, 3, 40), id="a block's channels"),
    pytest.param((1, 24, 9, 20), id="frames of ZeroScope"),
]
KINDS = [
    "all",
    "channels",
    "projection",
    "region",
    "channels in a region",
    "projection in a region",
]


def sample(shape, kind, dtype, device, rng):
    """x, channels, projection and weights; activations are large and their changes small."""
    rows, _, tokens, width = shape
    make = lambda *size: torch.randn(size, generator=rng, device=device).to(dtype)
    x = 0.2 * make(*shape) + 4 * make(rows, 1, tokens, width)
    channels = projection = weights = None
    if "channels" in kind:
        channels = torch.randint(width, (min(width, 19),), generator=rng, device=device)
    if "projection" in kind:
        projection = make(width, 19 if width > 1 else 1)
    if "region" in kind:
        weights = operator._normalise(torch.rand(rows, tokens, generator=rng, device=device))
    return x, channels, projection, weights


def plain(x, channels, projection, weights):
    """The formula, frame by frame, in the type of the input."""
    frames = x.unbind(1)
    mean = sum(frames) / len(frames)
    results = []
    for frame in frames:
        y = frame - mean
        if channels is not None:
            y = torch.stack([y[..., c] for c in channels.tolist()], -1)
        if projection is not None:
            y = y @ projection
        if weights is not None:
            y = (y * weights.to(y.dtype)[..., None]).sum(1, keepdim=True)
        results.append(y)
    return torch.stack(results, 1)


def guarded(shape, dtype, device):
    """An output full of NaN, and the memory behind it, which no kernel may touch."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 64,), float("nan"), dtype=dtype, device=device)
    memory[size:] = 7
    return memory[:size].view(shape), memory[size:]


def run_operator(*inputs):
    return torch.ops.kinetiq.motion_feature(*inputs)


def run_kernel(x, channels, projection, weights):
    empty = operator._empty_result(x, channels, projection, weights)
    y, tail = guarded(empty.shape, x.dtype, x.device)
    operator._launch_forward(x, channels, projection, weights, y)
    assert (tail == 7).all()
    return y


def run_backward_kernel(grad, channels, projection, weights, shape):
    dx, tail = guarded(shape, grad.dtype, grad.device)
    operator._launch_backward(grad, channels, projection, weights, dx)
    assert (tail == 7).all()
    return dx


def gradient(x, grad, *rest):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(plain(x, *rest), x, grad)[0]


def double(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("run", [run_operator, run_kernel], ids=["operator", "kernel"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(run, shape, kind, dtype, device, rng):
    if run is run_kernel and dtype == torch.bfloat16 and "proj" in kind and device == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    inputs = sample(shape, kind, dtype, device, rng)
    got = run(*inputs)
    assert got.dtype == dtype and got.is_contiguous()
    assert_as_good_as(got, plain(*inputs), plain(*double(*inputs)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_kernel_agrees_with_float64(shape, kind, dtype, device, rng):
    inputs = x, *rest = sample(shape, kind, dtype, device, rng)
    grad = torch.randn(plain(*inputs).shape, generator=rng, device=device).to(dtype)
    got = run_backward_kernel(grad, *rest, x.shape)
    naive = gradient(x, grad, *rest)
    exact = gradient(*double(x, grad, *rest))
    assert_as_good_as(got, naive, exact, slack=3.0, name="gradient of x")
    through = torch.ops.kinetiq.motion_feature_backward(grad, *rest, *x.shape[2:])
    assert_as_good_as(through, naive, exact, slack=3.0, name="gradient of x by the operator")


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_read_any_strides(kind, device, rng):
    x, channels, projection, weights = sample((2, 5, 7, 33), kind, torch.float32, device, rng)
    y = run_kernel(x, channels, projection, weights)
    grad = torch.randn(y.shape, generator=rng, device=device)
    dx = run_backward_kernel(grad, channels, projection, weights, x.shape)
    strided = x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    wide = torch.full((2, 5, 7, 40), float("nan"), device=device)
    wide[..., :33] = x
    turned = projection if projection is None else projection.T.contiguous().T
    one = weights if weights is None else weights[:1].expand(2, -1)
    for other in (strided, wide[..., :33]):
        torch.testing.assert_close(run_kernel(other, channels, turned, weights), y)
    if one is not None:  # a region that the rows share is stored once
        torch.testing.assert_close(
            run_kernel(x, channels, projection, weights[:1]),
            run_kernel(x, channels, projection, one.contiguous()),
        )
    turned_grad = grad.transpose(1, 3).contiguous().transpose(1, 3)
    torch.testing.assert_close(
        run_backward_kernel(turned_grad, channels, turned, weights, x.shape), dx
    )


def test_a_long_region_is_split_over_programs(device, rng):
    x, _, _, weights = sample((1, 4, 3000, 5), "region", torch.float32, device, rng)
    inputs = (x, None, None, weights)
    assert_as_good_as(run_kernel(*inputs), plain(*inputs), plain(*double(*inputs)))


@pytest.mark.parametrize("frames", [2, 128])
def test_extreme_values(frames, device, rng):
    """The sum of 128 frames near the end of float16 does not fit into float16."""
    x = torch.full((1, frames, 3, 40), 65000.0, dtype=torch.float16, device=device)
    assert not run_kernel(x, None, None, None).any()
    x[:, 0] = 0.0
    got = run_kernel(x[..., :4], None, None, None)
    exact = operator.motion_feature_reference(x[..., :4].double())
    assert torch.equal(got, exact.to(torch.float16))


def test_an_empty_region_is_zero_and_an_absent_batch_is_empty(device, rng):
    x = torch.randn(2, 3, 4, 5, generator=rng, device=device)
    region = torch.tensor([[0.0, 0, 0, 0], [0, 1, 0, 0]], device=device)
    got = motion_feature(x, region=region)
    assert not got[0].any()
    torch.testing.assert_close(got[1], motion_feature(x)[1, :, 1:2])
    weights = operator._normalise(region)
    torch.testing.assert_close(run_kernel(x, None, None, weights), got)
    assert run_kernel(x[:0], None, None, None).shape == (0, 3, 4, 5)


def test_an_unknown_channel_never_reads_elsewhere(device, rng):
    x = torch.randn(1, 3, 4, 5, generator=rng, device=device)
    for bad in (5, -1, 2**40):
        channels = torch.tensor([2, bad], device=device)
        weights = torch.full((1, 4), 0.25, device=device)
        for got in (run_kernel(x, channels, None, None), run_kernel(x, channels, None, weights)):
            assert got[..., 0].isfinite().all()
            assert got[..., 1].isnan().all()


def test_gradcheck(rng):
    for kind in KINDS:
        x, channels, projection, weights = double(
            *sample((2, 3, 4, 5), kind, torch.float64, "cpu", rng)
        )
        x.requires_grad_()
        if projection is not None:
            projection.requires_grad_()
        torch.autograd.gradcheck(motion_feature, (x, channels, projection, weights))


@pytest.mark.parametrize("kind", KINDS)
def test_is_a_well_formed_operator(kind, device, rng):
    x, channels, projection, weights = sample((2, 3, 4, 5), kind, torch.float32, device, rng)
    x.requires_grad_()
    inputs = (x, channels, projection, weights)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if kind == "projection in a region":
        tests = (*tests, "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.kinetiq.motion_feature.default, inputs, test_utils=tests)
    grad = run_operator(*inputs).detach()
    torch.library.opcheck(
        torch.ops.kinetiq.motion_feature_backward.default,
        (grad, channels, projection, weights, 4, 5),
        test_utils=("test_schema", "test_faketensor"),
    )


class Feature(torch.nn.Module):
    def forward(self, x, channels, region):
        return motion_feature(x, channels, region=region)


def test_exports_as_one_node_and_compiles_whole(rng):
    x, channels, _, weights = sample(
        (2, 3, 4, 5), "channels in a region", torch.float32, "cpu", rng
    )
    rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens")
    dynamic = {"x": {0: rows, 2: tokens}, "channels": None, "region": {0: rows, 1: tokens}}
    program = torch.export.export(Feature(), (x, channels, weights), dynamic_shapes=dynamic)
    calls = [str(n.target) for n in program.graph.nodes if "kinetiq" in str(n.target)]
    assert calls == ["kinetiq.motion_feature.default"]
    wanted = motion_feature(x, channels, region=weights)
    torch.testing.assert_close(program.module()(x, channels, weights), wanted)
    compiled = torch.compile(Feature(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, channels, weights), wanted)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(1, 6), st.integers())
def test_ignores_what_does_not_change_and_the_order_of_all_else(rows, frames, tokens, width, seed):
    rng = torch.Generator().manual_seed(seed % 2**31)
    x = torch.randn(rows, frames, tokens, width, generator=rng, dtype=torch.float64)
    still = torch.randn(rows, 1, tokens, width, generator=rng, dtype=torch.float64)
    y = motion_feature(x)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(motion_feature(x + still), y, **close)
    torch.testing.assert_close(y.sum(1), torch.zeros_like(y[:, 0]), **close)
    for axis, size in enumerate(x.shape):
        order = torch.randperm(size, generator=rng)
        torch.testing.assert_close(
            motion_feature(x.index_select(axis, order)), y.index_select(axis, order), **close
        )


def test_channels_and_regions_come_in_several_forms(device, rng):
    x = torch.randn(2, 3, 4, 5, generator=rng, device=device)
    wanted = motion_feature(x)[..., [3, 0, 3]]
    assert torch.equal(motion_feature(x, [3, 0, 3]), wanted)
    assert torch.equal(motion_feature(x, torch.tensor([3, 0, 3], device=device)), wanted)
    region = torch.tensor([True, False, True, True], device=device)
    wanted = motion_feature(x)[:, :, region].mean(2, keepdim=True)
    torch.testing.assert_close(motion_feature(x, region=region), wanted)
    torch.testing.assert_close(motion_feature(x, region=5.0 * region.expand(2, -1)), wanted)


X = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x must be \[rows, frames, tokens, channels\].*\[2, 3, 4\]"),
        ({"x": torch.zeros(2, 0, 4, 5)}, r"at least one frame.* got \[2, 0, 4, 5\]"),
        ({"x": X.long()}, r"x must be float32.* got torch.int64 on cpu"),
        ({"channels": [0, 5]}, "channels must be from 0 to 4, got 0 to 5"),
        ({"channels": torch.tensor([-1])}, "channels must be from 0 to 4, got -1 to -1"),
        ({"channels": [0.5]}, r"channels must be integers, got \[0\.5\]"),
        ({"channels": []}, r"channels must be one or more indices, .* \[0\]"),
        ({"channels": torch.zeros(2)}, r"int64 \[K\], got torch.float32 \[2\]"),
        ({"channels": torch.zeros(2, device="meta").long()}, "channels must be on cpu .* meta"),
        ({"channels": [0], "projection": X[0, 0].T}, "give channels or projection, got both"),
        (
            {"projection": torch.zeros(4, 2)},
            r"projection must be \[channels = 5, K\], got \[4, 2\]",
        ),
        ({"projection": torch.zeros(5, 2).half()}, r"projection must be torch.float32 .*float16"),
        ({"region": torch.zeros(5)}, r"region must be \[tokens = 4\] .* got \[5\] on cpu"),
        ({"region": torch.zeros(4, requires_grad=True)}, "region must not require a gradient"),
    ],
)
def test_says_what_is_wrong(inputs, message):
    with pytest.raises(kq.ShapeError, match="^motion_feature: .*" + message):
        motion_feature(**{"x": X} | inputs)


def test_cost_counts_each_tensor_once():
    places = 2 * 3 * 4
    assert operator.cost(2, 3, 4, 5, 2) == operator.Cost(2 * 2 * places * 5, 2 * places * 5)
    assert operator.cost(2, 3, 4, 5, 2, chosen=2).bytes == 2 * 2 * places * 2
    projected = operator.cost(2, 3, 4, 5, 2, projected=2)
    assert projected.bytes == 2 * (places * 5 + places * 2 + 5 * 2)
    assert projected.flops == 2 * places * 5 + 2 * places * 5 * 2
    assert operator.cost(2, 3, 4, 5, 2, region=True).bytes == 2 * (places * 5 + 6 * 5) + 4 * 8


def test_compiles_at_production_shapes():
    kinds = {("channels", True), ("projection", True), ("region", True), ("projection", False)}
    requests = [
        _compile.Request("motion_feature", f"animatediff_{kind}", forward, "fp16", target)
        for target in ("sm_80", "sm_90")
        for kind, forward in kinds
    ]
    requests += [
        _compile.Request("motion_feature", "longest_region", True, "fp16", "sm_80"),
        _compile.Request("motion_feature", "animatediff_channels", False, "fp16", "gfx942"),
    ]
    accounts = list(_compile.compile_apart(requests))
    assert len(accounts) == len(requests)
    for account in accounts:
        assert not account.error, account
        assert account.spill_bytes == 0, account
        assert not account.misses_matrix_units, account
        assert bool(account.dots) == ("projection" in account.request.shape), account
