"""The kernels of guidance and the sampler's update, clip by clip in float64 beside them."""

import contextlib
import importlib

import pytest
import torch
from closeness import assert_as_good_as

import kinetiq as kq
from kinetiq.kernels import _compile, _launch, guided_step

operator = importlib.import_module("kinetiq.kernels.guided_step")  # not the function

SHAPES = [
    pytest.param((1, 1), id="smallest"),
    pytest.param((3, 4, 3, 5, 7), id="odd"),
    pytest.param((2, 4, 8, 16, 9), id="several programs a clip"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("sample", "conditional", "unconditional", "former", "noise", "scale", "coefficients")
EVERY = [True] * len(NAMES)


def sample(shape, device, rng, dtype=torch.float32):
    make = lambda *size: torch.randn(size, generator=rng, device=device).to(dtype)
    return [make(*shape) for _ in range(5)], make(shape[0]), make(shape[0], 6)


def formula(*inputs):
    following, clean = [], []
    for x, conditional, unconditional, former, noise, scale, numbers in zip(*inputs, strict=True):
        a, b, c, s, p, q = numbers
        m = unconditional + scale * (conditional - unconditional)
        following.append(a * x + b * m + c * former + s * noise)
        clean.append(p * x + q * m)
    return torch.stack(following), torch.stack(clean)


def guarded(like):
    """An output full of NaN, and the memory behind it, which no kernel may touch."""
    memory = torch.full((like.numel() + 64,), float("nan"), dtype=like.dtype, device=like.device)
    memory[like.numel() :] = 7
    return memory[: like.numel()].view(like.shape), memory[like.numel() :]


def run_kernel(*inputs):
    *tensors, scale, coefficients = inputs
    results, tails = zip(*(guarded(tensors[0]) for _ in range(2)), strict=True)
    operator._launch_forward(tuple(tensors), scale, coefficients, results)
    assert all((tail == 7).all() for tail in tails)
    return results


def run_backward_kernel(inputs, grads, needed=EVERY):
    """Gradients by the kernel, None for those that are not needed."""
    *tensors, scale, coefficients = inputs
    results, tails = zip(*(guarded(tensor) for tensor in tensors), strict=True)
    wanted = tuple(r if need else None for r, need in zip(results, needed[:5], strict=True))
    sums = operator._launch_backward(
        tuple(tensors), scale, coefficients, grads, wanted, any(needed[5:])
    )
    assert all((tail == 7).all() for tail in tails)
    if sums is None:
        return *wanted, None, None
    return *wanted, sums[:, 0].to(scale.dtype), sums[:, 1:].to(coefficients.dtype)


def gradients(inputs, grads):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(formula(*inputs), inputs, grads)


def double(tensors):
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_agrees_with_float64(shape, dtype, kernel_device, kernel_rng):
    tensors, *numbers = sample(shape, kernel_device, kernel_rng, dtype)
    inputs = (*tensors, *numbers)
    parts = zip(
        ("next", "clean"),
        run_kernel(*inputs),
        formula(*inputs),
        formula(*double(inputs)),
        strict=True,
    )
    for name, *three in parts:
        assert_as_good_as(*three, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_agree_with_float64(shape, dtype, kernel_device, kernel_rng):
    tensors, *numbers = sample(shape, kernel_device, kernel_rng, dtype)
    inputs = (*tensors, *numbers)
    grads = tuple(
        torch.randn(shape, generator=kernel_rng, device=kernel_device).to(dtype) for _ in range(2)
    )
    naive, exact = gradients(inputs, grads), gradients(double(inputs), double(grads))
    by_kernel = run_backward_kernel(inputs, grads)
    by_operator = torch.ops.kinetiq.guided_step_backward(tensors, *numbers, *grads, EVERY)
    for got in (by_kernel, by_operator):
        for name, *three in zip(NAMES, got, naive, exact, strict=True):
            assert_as_good_as(*three, slack=3.0, name=f"gradient of {name}")


# Each is one wrong line: the function that it is in, what the line says, and what it says instead.
MUTANTS = [
    ("_numbers", "scale_ptr + clip", "scale_ptr"),
    ("_numbers", "coefficients_ptr + clip * 6", "coefficients_ptr"),
    ("_guided", "other + scale * way", "other"),
    ("_guided", "wanted - (1.0 - scale) * way", "wanted"),
    ("_guided_step_kernel", "c * former", "b * former"),
    ("_guided_step_kernel", "p * x + q * output", "q * x + p * output"),
    ("_guided_step_kernel", "place = clip * elements + element", "place = element"),
    ("_guided_step_backward_kernel", "output - scale * output", "output"),
    ("_guided_step_backward_kernel", "q * clean", "p * clean"),
    ("_guided_step_backward_kernel", "output * (wanted - other)", "output * wanted"),
    ("_guided_step_backward_kernel", "sums_ptr + program * 7", "sums_ptr"),
]


@pytest.mark.parametrize(("function", "line", "instead"), [(None, "", ""), *MUTANTS])
def test_a_wrong_line_is_found(function, line, instead, kernel_device, kernel_rng, mutate):
    """The comparison holds for the kernels as they are, and for none that differs by a line."""
    tensors, _, numbers = sample((3, 40), kernel_device, kernel_rng)
    scale = torch.tensor([0.25, 3.0, 0.75], device=kernel_device)  # in either half of its formula
    inputs = (*tensors, scale, numbers)
    make = lambda: torch.randn(3, 40, generator=kernel_rng, device=kernel_device)
    grads = (make(), make())

    def compare():
        naive, exact = formula(*inputs), formula(*double(inputs))
        for three in zip(run_kernel(*inputs), naive, exact, strict=True):
            assert_as_good_as(*three)
        naive, exact = gradients(inputs, grads), gradients(double(inputs), double(grads))
        for three in zip(run_backward_kernel(inputs, grads), naive, exact, strict=True):
            assert_as_good_as(*three, slack=3.0)

    if function is None:
        compare()
        return
    mutate(operator, function, line, instead)
    with pytest.raises(AssertionError):
        compare()


@pytest.mark.parametrize("place", range(7), ids=NAMES)
def test_only_what_is_needed_is_computed(place, kernel_device, kernel_rng):
    """Alone a gradient has the bits that it has among all, by kernel, operator and autograd."""
    tensors, *numbers = sample((3, 4, 5), kernel_device, kernel_rng)
    inputs = (*tensors, *numbers)
    grads = tuple(torch.randn_like(tensors[0]) for _ in range(2))
    needed = [at == place for at in range(7)]
    alone = run_backward_kernel(inputs, grads, needed)
    assert torch.equal(alone[place], run_backward_kernel(inputs, grads)[place])
    of_numbers = (5, 6) if place >= 5 else (place,)  # which are added up together
    assert all(got is None for at, got in enumerate(alone) if at not in of_numbers)

    backward = torch.ops.kinetiq.guided_step_backward
    found = backward(tensors, *numbers, *grads, needed)
    wanted = backward(tensors, *numbers, *grads, EVERY)[place]
    assert torch.equal(found[place], wanted)
    assert [got.numel() for at, got in enumerate(found) if at != place] == [0] * 6
    leaves = [t.requires_grad_(at == place) for at, t in enumerate(inputs)]
    (got,) = torch.autograd.grad(torch.ops.kinetiq.guided_step(*leaves), leaves[place], grads)
    assert torch.equal(got, wanted)


def test_launches_on_the_device_of_the_sample(monkeypatch, kernel_device, kernel_rng):
    """Settings are those of that GPU too, so they are asked for with it as the current one."""
    tensors, *numbers = sample((2, 3), kernel_device, kernel_rng)
    current, asked = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    def settings(operator, key):
        asked.append((key, *current))
        return _launch.settings(operator, key)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(operator, "settings", settings)
    run_kernel(*tensors, *numbers)
    run_backward_kernel((*tensors, *numbers), (tensors[0], tensors[1]))
    assert [(key, len(on)) for key, *on in asked] == [("forward", 1), ("backward", 1)]
    assert all(on[0] is tensors[0] for _, *on in asked)


def test_kernel_reads_any_strides_and_types(kernel_device, kernel_rng):
    """Halves of one output are contiguous clip by clip; a network's output is in half precision."""
    tensors, *numbers = sample((3, 4, 5), kernel_device, kernel_rng)
    halves = torch.cat([tensors[1], tensors[2]], dim=1).half()
    tensors[1], tensors[2] = halves[:, :4], halves[:, 4:]
    tensors[3] = tensors[3].transpose(1, 2).contiguous().transpose(1, 2)
    tensors[4] = tensors[4][:1].expand(3, -1, -1)
    inputs = (*tensors, numbers[0], numbers[1].T.contiguous().T)
    wanted = run_kernel(*(t.float().contiguous() for t in inputs))
    for got, expected in zip(run_kernel(*inputs), wanted, strict=True):
        assert torch.equal(got, expected)
    for got, expected in zip(guided_step(*inputs), wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected)


def test_float64_is_not_narrowed(kernel_device, kernel_rng):
    tensors, *numbers = sample((2, 3), kernel_device, kernel_rng, torch.float64)
    inputs = (*tensors, *numbers)
    for got, wanted in zip(run_kernel(*inputs), formula(*inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)


def test_extreme_values_of_half_precision(kernel_device, kernel_rng):
    """Two halves near the end of float16 differ by more than it can hold; their mix fits again."""
    full = lambda value: torch.full((1, 5), value, dtype=torch.float16, device=kernel_device)
    scale = torch.tensor([0.5], device=kernel_device)
    numbers = torch.tensor([[0.0, 1, 0, 0, 0, 1]], device=kernel_device)
    zero = full(0.0)
    for got in run_kernel(zero, full(60000.0), full(-60000.0), zero, zero, scale, numbers):
        assert not got.any()


def test_autocast_does_not_change_the_type(kernel_device, kernel_rng):
    tensors, *numbers = sample((3, 4, 5), kernel_device, kernel_rng)
    leaves = [t.requires_grad_() for t in (*tensors, *numbers)]

    def results():
        values = [guided_step(*leaves), torch.ops.kinetiq.guided_step(*leaves)]
        grads = [torch.autograd.grad(sum(pair).square().sum(), leaves) for pair in values]
        return (*values[0], *values[1], *grads[0], *grads[1])

    wanted = results()
    with torch.autocast(torch.device(kernel_device).type, dtype=torch.bfloat16):
        got = results()
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_kernel_is_exact_where_one_half_is_wanted(scale, kernel_device, kernel_rng):
    """Whatever the other is: here it is ten thousand times as large."""
    (x, conditional, unconditional, former, noise), _, _ = sample(
        (1, 1000), kernel_device, kernel_rng
    )
    halves = (conditional, 1e4 * unconditional) if scale else (1e4 * conditional, unconditional)
    numbers = torch.tensor([[0.0, 1, 0, 0, 0, 1]], device=kernel_device)
    scales = torch.full((1,), scale, device=kernel_device)
    for run in (run_kernel, guided_step):
        for got in run(x, *halves, former, noise, scales, numbers):
            assert torch.equal(got, halves[0] if scale else halves[1])


def test_nothing_to_do(kernel_device):
    for shape in ((0, 4), (2, 0)):
        inputs = [torch.zeros(shape, device=kernel_device)] * 5
        inputs += [
            torch.zeros(shape[0], device=kernel_device),
            torch.zeros(shape[0], 6, device=kernel_device),
        ]
        assert all(got.shape == shape for got in run_kernel(*inputs))
        grads = run_backward_kernel(inputs, (inputs[0], inputs[0]))
        assert [g.shape for g in grads] == [t.shape for t in inputs]
        assert not grads[-1].any()


def test_is_a_well_formed_operator(device, rng):
    tensors, *numbers = sample((2, 3), device, rng)
    inputs = tuple(t.requires_grad_() for t in (*tensors, *numbers))
    torch.library.opcheck(torch.ops.kinetiq.guided_step.default, inputs)
    detached = [t.detach() for t in tensors]
    grads = (detached[0], detached[1])
    numbers = [t.detach() for t in numbers]
    torch.library.opcheck(
        torch.ops.kinetiq.guided_step_backward.default,
        (detached, *numbers, *grads, [True, False, True, False, False, True, False]),
        test_utils=("test_schema", "test_faketensor"),
    )


class Step(torch.nn.Module):
    def forward(self, *inputs):
        return guided_step(*inputs)


def test_exports_as_one_node_and_compiles_whole(cpu_rng):
    tensors, *numbers = sample((2, 3, 4), "cpu", cpu_rng)
    inputs = (*tensors, *numbers)
    clips = torch.export.Dim("clips")
    program = torch.export.export(Step(), inputs, dynamic_shapes=(({0: clips},) * 7,))
    calls = [str(n.target) for n in program.graph.nodes if "kinetiq" in str(n.target)]
    assert calls == ["kinetiq.guided_step.default"]
    compiled = torch.compile(Step(), fullgraph=True, backend="aot_eager")
    for run in (program.module(), compiled):
        for got, wanted in zip(run(*inputs), guided_step(*inputs), strict=True):
            torch.testing.assert_close(got, wanted)


def test_refuses_tensors_of_another_device():
    inputs = [torch.zeros(2, 4)] * 5 + [torch.zeros(2), torch.zeros(2, 6)]
    for place, name in ((3, "former"), (6, "coefficients")):
        wrong = [*inputs[:place], inputs[place].to("meta"), *inputs[place + 1 :]]
        with pytest.raises(kq.ShapeError, match=f"^guided_step: {name} must be on cpu .* got meta"):
            guided_step(*wrong)


def test_cost_counts_each_tensor_once():
    assert operator.cost(2, 10) == operator.Cost(bytes=4 * (7 * 20 + 2 + 12), flops=2 * 10 * 13)
    mixed = operator.cost(2, 10, output_itemsize=2)
    assert mixed.bytes == 4 * (5 * 20 + 2 + 12) + 2 * 2 * 20
    assert mixed.least_seconds(1e3, 1e3) == mixed.bytes / 1e3
    assert mixed.least_seconds(1e6, 1e3) == mixed.flops / 1e3


def test_compiles_at_production_shapes():
    requests = [
        _compile.Request("guided_step", "animatediff", forward, "fp16", target)
        for target in ("sm_80", "sm_90")
        for forward in (True, False)
    ]
    accounts = list(_compile.compile_apart(requests))
    assert len(accounts) == len(requests)
    for account in accounts:
        assert not account.error, account
        assert account.spill_bytes == 0, account
        assert account.dots == 0, account


@pytest.mark.gpu
def test_is_captured_and_replayed():
    """With its gradient; a wait for the GPU would be an error while a graph is captured."""
    rng = torch.Generator("cuda").manual_seed(0)
    tensors, *numbers = sample((2, 4, 500), "cuda", rng)
    inputs = [t.requires_grad_() for t in (*tensors, *numbers)]

    def step():
        following, clean = guided_step(*inputs)
        return following, clean, *torch.autograd.grad((following + clean).sum(), inputs)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which draws the inputs
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    with torch.no_grad():
        for tensor in inputs:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for got, wanted in zip(kept, step(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.gpu
def test_more_clips_than_a_grid_axis_has():
    rng = torch.Generator("cuda").manual_seed(0)
    tensors, *numbers = sample((70_000, 3), "cuda", rng)
    inputs = (*tensors, *numbers)
    wanted = operator.guided_step_reference(*double(inputs))
    naive = operator.guided_step_reference(*inputs)
    for three in zip(guided_step(*inputs), naive, wanted, strict=True):
        assert_as_good_as(*three)
    grads = (tensors[1], tensors[2])
    got = run_backward_kernel(inputs, grads)[0]
    a, p = numbers[1].double()[:, :1], numbers[1].double()[:, 4:5]
    exact = a * grads[0].double() + p * grads[1].double()
    assert_as_good_as(got, exact.float(), exact)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    x = torch.randn(2, 2**30 + 8, device="cuda", dtype=torch.float16)
    assert x.numel() > 2**31
    scale = torch.full((2,), 3.0, device="cuda")
    numbers = torch.randn(2, 6, device="cuda")
    last = x[:, -8:].contiguous()
    for got, wanted in zip(
        guided_step(x, x, x, x, x, scale, numbers),
        guided_step(last, last, last, last, last, scale, numbers),
        strict=True,
    ):
        assert torch.equal(got[:, -8:], wanted)
    needed = [True] + [False] * 6
    backward = torch.ops.kinetiq.guided_step_backward
    got = backward([x] * 5, scale, numbers, x, x, needed)[0]
    wanted = backward([last] * 5, scale, numbers, last, last, needed)[0]
    assert torch.equal(got[:, -8:], wanted)


@pytest.mark.slow
@pytest.mark.gpu
def test_touches_no_memory_but_its_own(memory_check):
    memory_check(__file__, "agree and odd and torch.float16")
