"""Motion features, by the operator and by its kernels, against the formula in float64."""

import contextlib
import importlib

import pytest
import torch
from closeness import assert_as_good_as
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import kinetiq as kq
from kinetiq.kernels import _compile, _launch, motion_feature

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


def check(run, inputs):
    got = run(*inputs)
    assert got.dtype == inputs[0].dtype and got.is_contiguous()
    assert_as_good_as(got, plain(*inputs), plain(*double(*inputs)))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_operator_agrees_with_float64(shape, kind, dtype, device, rng):
    check(run_operator, sample(shape, kind, dtype, device, rng))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_agrees_with_float64(shape, kind, dtype, kernel_device, kernel_rng):
    if dtype == torch.bfloat16 and "projection" in kind and kernel_device == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    check(run_kernel, sample(shape, kind, dtype, kernel_device, kernel_rng))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_kernel_agrees_with_float64(shape, kind, dtype, kernel_device, kernel_rng):
    if dtype == torch.bfloat16 and "projection" in kind and kernel_device == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices wrongly")
    inputs = x, *rest = sample(shape, kind, dtype, kernel_device, kernel_rng)
    grad = torch.randn(plain(*inputs).shape, generator=kernel_rng, device=kernel_device).to(dtype)
    got = run_backward_kernel(grad, *rest, x.shape)
    naive = gradient(x, grad, *rest)
    exact = gradient(*double(x, grad, *rest))
    assert_as_good_as(got, naive, exact, slack=3.0, name="gradient of x")
    through = torch.ops.kinetiq.motion_feature_backward(grad, *rest, *x.shape[2:])
    assert_as_good_as(through, naive, exact, slack=3.0, name="gradient of x by the operator")


# Each is one wrong line: the function that it is in, what the line says, and what it says instead.
MUTANTS = [
    ("_centre_kernel", "x - (tl.sum(x, axis=0) / frames)[None, :]", "x"),
    ("_centre_kernel", "element % chosen", "element // chosen"),
    ("_project_kernel", "x -= (tl.sum(x, axis=0) / frames)[None, :, :]", "x -= 0.0"),
    ("_project_kernel", "+ token * x_token", ""),
    ("_region_kernel", "x * weight[None, :, None]", "x"),
    ("_region_kernel", "weights_ptr + row * w_row", "weights_ptr"),
    ("_scatter_kernel", "used = use < uses", "used = uses > 2 * use"),
    ("_scatter_kernel", "(tl.sum(dx, axis=0) / frames)[None, :, :]", "0.0"),
    (
        "_project_backward_kernel",
        "grad -= (tl.sum(grad, axis=0) / frames)[None, :, :]",
        "grad -= 0",
    ),
    ("_spread_kernel", "image // frames * w_row", "image % frames * w_row"),
]


@pytest.mark.parametrize(("function", "line", "instead"), [(None, "", ""), *MUTANTS])
def test_a_wrong_line_is_found(function, line, instead, kernel_device, kernel_rng, mutate):
    """The comparison holds for the kernels as they are, and for none that differs by a line."""

    def compare():
        for kind in ("all", "channels", "projection", "region"):
            inputs = x, *rest = sample(
                (3, 3, 5, 33), kind, torch.float32, kernel_device, kernel_rng
            )
            check(run_kernel, inputs)
            size = plain(*inputs).shape
            grad = torch.randn(size, generator=kernel_rng, device=kernel_device)
            got = run_backward_kernel(grad, *rest, x.shape)
            exact = gradient(*double(x, grad, *rest))
            assert_as_good_as(got, gradient(x, grad, *rest), exact, slack=3.0)

    if function is None:
        compare()
        return
    mutate(operator, function, line, instead)
    with pytest.raises(AssertionError):
        compare()


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_read_any_strides(kind, kernel_device, kernel_rng):
    x, channels, projection, weights = sample(
        (2, 5, 7, 33), kind, torch.float32, kernel_device, kernel_rng
    )
    y = run_kernel(x, channels, projection, weights)
    grad = torch.randn(y.shape, generator=kernel_rng, device=kernel_device)
    dx = run_backward_kernel(grad, channels, projection, weights, x.shape)
    strided = x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    wide = torch.full((2, 5, 7, 40), float("nan"), device=kernel_device)
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


@pytest.mark.parametrize("kind", ["projection", "region", "projection in a region"])
def test_autocast_does_not_change_the_type(kind, kernel_device, kernel_rng):
    shape = (2, 5, 7, 33)
    x, _, projection, weights = sample(shape, kind, torch.float32, kernel_device, kernel_rng)
    inputs = (x, None, projection, weights)
    grad = torch.randn(run_kernel(*inputs).shape, generator=kernel_rng, device=kernel_device)
    leaves = [t.detach().requires_grad_() for t in (x, projection) if t is not None]
    given = (leaves[0], None, None if projection is None else leaves[1], weights)

    def results():
        return (
            motion_feature(x, projection=projection, region=weights),
            run_kernel(*inputs),
            run_backward_kernel(grad, None, projection, weights, shape),
            torch.ops.kinetiq.motion_feature_backward(grad, None, projection, weights, 7, 33),
            *torch.autograd.grad(run_operator(*given), leaves, grad),
        )

    wanted = results()
    with torch.autocast(torch.device(kernel_device).type, dtype=torch.bfloat16):
        got = results()
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


def test_a_long_region_is_split_over_programs(kernel_device, kernel_rng):
    x, _, _, weights = sample((1, 4, 3000, 5), "region", torch.float32, kernel_device, kernel_rng)
    inputs = (x, None, None, weights)
    assert_as_good_as(run_kernel(*inputs), plain(*inputs), plain(*double(*inputs)))


@pytest.mark.parametrize("frames", [2, 128])
def test_extreme_values(frames, kernel_device, kernel_rng):
    """The sum of 128 frames near the end of float16 does not fit into float16."""
    x = torch.full((1, frames, 3, 40), 65000.0, dtype=torch.float16, device=kernel_device)
    assert not run_kernel(x, None, None, None).any()
    x[:, 0] = 0.0
    got = run_kernel(x[..., :4], None, None, None)
    exact = operator.motion_feature_reference(x[..., :4].double())
    assert torch.equal(got, exact.to(torch.float16))


def test_an_empty_region_is_zero_and_an_absent_batch_is_empty(kernel_device, kernel_rng):
    x = torch.randn(2, 3, 4, 5, generator=kernel_rng, device=kernel_device)
    region = torch.tensor([[0.0, 0, 0, 0], [0, 1, 0, 0]], device=kernel_device)
    got = motion_feature(x, region=region)
    assert not got[0].any()
    torch.testing.assert_close(got[1], motion_feature(x)[1, :, 1:2])
    weights = operator._normalise(region)
    torch.testing.assert_close(run_kernel(x, None, None, weights), got)
    assert run_kernel(x[:0], None, None, None).shape == (0, 3, 4, 5)


def test_an_unknown_channel_never_reads_elsewhere(kernel_device, kernel_rng):
    x = torch.randn(1, 3, 4, 5, generator=kernel_rng, device=kernel_device)
    for bad in (5, -1, 2**40):
        channels = torch.tensor([2, bad], device=kernel_device)
        weights = torch.full((1, 4), 0.25, device=kernel_device)
        for got in (run_kernel(x, channels, None, None), run_kernel(x, channels, None, weights)):
            assert got[..., 0].isfinite().all()
            assert got[..., 1].isnan().all()
        for region in (None, weights):  # nor is its gradient written anywhere
            grad = torch.ones(1, 3, 4 if region is None else 1, 2, device=kernel_device)
            grad[:, 0, :, 0] = 2.0
            dx = run_backward_kernel(grad, channels, None, region, x.shape)
            assert dx[..., 2].any() and not dx[..., [0, 1, 3, 4]].any()


def test_sums_of_a_region_do_not_take_the_default_type(kernel_device, kernel_rng):
    x, _, _, weights = sample((1, 4, 70, 5), "region", torch.float32, kernel_device, kernel_rng)
    wanted = run_kernel(x, None, None, weights)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        got = run_kernel(x, None, None, weights)
    finally:
        torch.set_default_dtype(usual)
    assert torch.equal(got, wanted)


def test_gradients_of_a_channel_named_twice_add_up_in_one_order(
    monkeypatch, kernel_device, kernel_rng
):
    """An `index_add_` on a GPU adds in whatever order its threads come."""
    channels = torch.tensor([3, 0, 3, 3], device=kernel_device)
    weights = torch.full((1, 7), 1 / 7, device=kernel_device)
    shape = (2, 5, 7, 6)
    grad = torch.randn(2, 5, 1, 4, generator=kernel_rng, device=kernel_device)

    def refuse(*_):
        raise AssertionError("gradients must add up in one order")

    for name in ("index_add_", "scatter_add_", "index_put_"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    got = run_backward_kernel(grad, channels, None, weights, shape)
    moved = grad.double() - grad.double().mean(1, keepdim=True)
    wanted = torch.zeros(shape, dtype=torch.float64, device=kernel_device)
    for at, channel in enumerate(channels.tolist()):
        wanted[..., channel] += moved[..., at] / 7
    assert_as_good_as(got, wanted.float(), wanted)
    for _ in range(5):
        assert torch.equal(run_backward_kernel(grad, channels, None, weights, shape), got)


@pytest.mark.parametrize("kind", KINDS)
def test_launches_on_the_device_of_its_tensors(kind, monkeypatch, kernel_device, kernel_rng):
    """Settings are those of that GPU too, so they are asked for with it as the current one."""
    x, *rest = sample((2, 3, 4, 5), kind, torch.float32, kernel_device, kernel_rng)
    grad = run_kernel(x, *rest)
    current, asked = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.shape)
        yield
        current.pop()

    def settings(operator, key):
        asked.append(list(current))
        return _launch.settings(operator, key)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(operator, "settings", settings)
    run_kernel(x, *rest)
    forward = len(asked)
    run_backward_kernel(grad, *rest, x.shape)
    assert 0 < forward < len(asked)
    assert asked == [[x.shape]] * len(asked)


def test_gradcheck(cpu_rng):
    for kind in KINDS:
        x, channels, projection, weights = double(
            *sample((2, 3, 4, 5), kind, torch.float64, "cpu", cpu_rng)
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


def test_exports_as_one_node_and_compiles_whole(cpu_rng):
    x, channels, _, weights = sample(
        (2, 3, 4, 5), "channels in a region", torch.float32, "cpu", cpu_rng
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


@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the device is always the same
)
@given(
    rows=st.integers(1, 3),
    frames=st.integers(1, 9),
    tokens=st.integers(1, 5),
    width=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_kernel_ignores_what_does_not_change_and_the_order_of_all_else(
    rows, frames, tokens, width, seed, kernel_device
):
    rng = torch.Generator().manual_seed(seed)
    draw = lambda frames: torch.randn(rows, frames, tokens, width, generator=rng).to(kernel_device)
    x, still = draw(frames), draw(1)
    run = lambda x: run_kernel(x, None, None, None)
    y = run(x)
    largest = (x.abs().max() + still.abs().max()).item()
    # Sum, mean and difference are each rounded by the size of what is summed.
    error = (frames + 4) * torch.finfo(torch.float32).eps * largest
    close = lambda got, wanted: torch.testing.assert_close(got, wanted, rtol=0, atol=error)
    close(run(x + still), y)
    close(y.mean(1), torch.zeros_like(y[:, 0]))
    for axis, size in enumerate(x.shape):
        order = torch.randperm(size, generator=rng).to(kernel_device)
        close(run(x.index_select(axis, order)), y.index_select(axis, order))


def test_channels_and_regions_come_in_several_forms(device, rng):
    x = torch.randn(2, 3, 4, 5, generator=rng, device=device)
    wanted = motion_feature(x)[..., [3, 0, 3]]
    if device == "cpu":
        assert torch.equal(motion_feature(x, [3, 0, 3]), wanted)
    assert torch.equal(motion_feature(x, torch.tensor([3, 0, 3], device=device)), wanted)
    region = torch.tensor([True, False, True, True], device=device)
    wanted = motion_feature(x)[:, :, region].mean(2, keepdim=True)
    torch.testing.assert_close(motion_feature(x, region=region), wanted)
    torch.testing.assert_close(motion_feature(x, region=5.0 * region.expand(2, -1)), wanted)


def test_integers_are_not_copied_to_a_gpu_at_every_call():
    message = r"int64 tensor on cuda:1 like x, got integers; .* torch.tensor\(.*device='cuda:1'\)"
    with pytest.raises(kq.ShapeError, match="^motion_feature: channels must be an " + message):
        operator._check_channels([0, 1], 5, torch.device("cuda:1"))


X = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x must be \[rows, frames, tokens, channels\].*\[2, 3, 4\]"),
        ({"x": torch.zeros(2, 0, 4, 5)}, r"at least one frame.* got \[2, 0, 4, 5\]"),
        ({"x": X.long()}, r"x must be float32.* got torch.int64 on cpu"),
        ({"channels": [0, 5]}, "channels must have values from 0 to 4, got 0 to 5"),
        ({"channels": torch.tensor([-1])}, "channels must have values from 0 to 4, got -1 to -1"),
        ({"channels": [True, False]}, r"channels must be integers, got \[True, False\]"),
        ({"channels": [0.5]}, r"channels must be integers, got \[0\.5\]"),
        ({"channels": 3}, "channels must be a tensor or integers, got 3"),
        ({"x": [1]}, r"x must be a tensor, got \[1\]"),
        ({"projection": [1]}, r"projection must be a tensor, got \[1\]"),
        ({"region": [1.0]}, r"region must be a tensor, got \[1.0\]"),
        ({"region": torch.zeros(4).cfloat()}, "region must hold real numbers, got torch.complex64"),
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


@pytest.mark.parametrize("channel", [5, -1])
def test_a_graph_on_a_cpu_is_told_of_channels_that_are_not(channel):
    message = "^motion_feature: channels must have values from 0 to 4, got .* to "
    with pytest.raises(kq.ShapeError, match=message):
        run_operator(X, torch.tensor([0, channel]), None, None)


def test_channels_that_vmap_batches_are_refused_in_words():
    with pytest.raises(kq.ShapeError, match=r"channels must hold numbers .* vmap batches"):
        torch.vmap(lambda channels: motion_feature(X, channels))(torch.tensor([[0, 1], [1, 2]]))


def test_a_trace_does_not_look_at_channels(cpu_rng):
    x, channels = torch.randn(2, 3, 4, 5, generator=cpu_rng), torch.tensor([3, 1])
    chosen = lambda x, channels: motion_feature(x, channels=channels)
    traced = make_fx(chosen, tracing_mode="fake")(x, channels)
    assert torch.equal(traced(x, channels), chosen(x, channels))


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


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_is_captured_and_replayed(kind):
    """With its gradient; a wait for the GPU would be an error while a graph is captured."""
    rng = torch.Generator("cuda").manual_seed(0)
    x, channels, projection, region = sample((2, 16, 9, 40), kind, torch.float16, "cuda", rng)
    leaves = [t.requires_grad_() for t in (x, projection) if t is not None]

    def step():
        y = motion_feature(x, channels, projection, region)
        return y, *torch.autograd.grad(y.sum(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which draws the inputs
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for got, wanted in zip(kept, step(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_a_grid_axis_has(kind):
    rng = torch.Generator("cuda").manual_seed(0)
    inputs = x, *rest = sample((70_000, 2, 3, 20), kind, torch.float32, "cuda", rng)
    check(run_kernel, inputs)
    grad = torch.randn(plain(*inputs).shape, generator=rng, device="cuda")
    got = run_backward_kernel(grad, *rest, x.shape)
    exact = gradient(*double(x, grad, *rest))
    assert_as_good_as(got, gradient(x, grad, *rest), exact, slack=3.0, name="gradient of x")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_more_elements_than_32_bits_count(kind):
    """The last position, alone and after two thousand million others; a region that is it alone."""
    x = torch.randn(1, 16, 2**20 + 1, 128, device="cuda", dtype=torch.float16)
    assert x.numel() > 2**31
    channels = projection = weights = None
    if "channels" in kind:
        channels = torch.tensor([127, 0, 127], device="cuda")
    if "projection" in kind:
        projection = torch.randn(128, 16, device="cuda", dtype=torch.float16)
    if "region" in kind:
        weights = torch.zeros(1, x.shape[2], device="cuda")
        weights[:, -1] = 1.0
    alone = None if weights is None else weights[:, -1:]
    last = x[:, :, -1:].contiguous()
    got = run_operator(x, channels, projection, weights)[:, :, -1:]
    torch.testing.assert_close(got, run_operator(last, channels, projection, alone))
    places = 1 if weights is not None else x.shape[2]
    grad = torch.randn(1, 16, places, got.shape[-1], device="cuda", dtype=torch.float16)
    backward = torch.ops.kinetiq.motion_feature_backward
    dx = backward(grad, channels, projection, weights, *x.shape[2:])[:, :, -1:]
    wanted = backward(grad[:, :, -1:].contiguous(), channels, projection, alone, 1, 128)
    torch.testing.assert_close(dx, wanted)


@pytest.mark.slow
@pytest.mark.gpu
def test_touches_no_memory_but_its_own(memory_check):
    memory_check(__file__, "kernel_agrees and odd and torch.float16")
