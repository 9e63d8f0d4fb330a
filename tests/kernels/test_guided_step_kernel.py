"""The kernels of guidance and the sampler's update, clip by clip in float64 beside them."""

import importlib

import pytest
import torch
from closeness import assert_as_good_as

import kinetiq as kq
from kinetiq.kernels import _compile, guided_step

operator = importlib.import_module("kinetiq.kernels.guided_step")  # not the function

SHAPES = [
    pytest.param((1, 1), id="smallest"),
    pytest.param((3, 4, 3, 5, 7), id="odd"),
    pytest.param((2, 4, 8, 16, 9), id="several programs a clip"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("sample", "conditional", "unconditional", "former", "noise", "scale", "coefficients")


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


def run_backward_kernel(inputs, grads):
    *tensors, scale, coefficients = inputs
    results, tails = zip(*(guarded(tensor) for tensor in tensors), strict=True)
    sums = operator._launch_backward(tuple(tensors), scale, coefficients, grads, results)
    assert all((tail == 7).all() for tail in tails)
    return *results, sums[:, 0].to(scale.dtype), sums[:, 1:].to(coefficients.dtype)


def gradients(inputs, grads):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(formula(*inputs), inputs, grads)


def double(tensors):
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_agrees_with_float64(shape, dtype, device, rng):
    tensors, *numbers = sample(shape, device, rng, dtype)
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
def test_gradients_agree_with_float64(shape, dtype, device, rng):
    tensors, *numbers = sample(shape, device, rng, dtype)
    inputs = (*tensors, *numbers)
    grads = tuple(torch.randn(shape, generator=rng, device=device).to(dtype) for _ in range(2))
    naive, exact = gradients(inputs, grads), gradients(double(inputs), double(grads))
    by_kernel = run_backward_kernel(inputs, grads)
    by_operator = torch.ops.kinetiq.guided_step_backward(tensors, *numbers, *grads)
    for got in (by_kernel, by_operator):
        for name, *three in zip(NAMES, got, naive, exact, strict=True):
            assert_as_good_as(*three, slack=3.0, name=f"gradient of {name}")


def test_kernel_reads_any_strides_and_types(device, rng):
    """Halves of one output are contiguous clip by clip; a network's output is in half precision."""
    tensors, *numbers = sample((3, 4, 5), device, rng)
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


def test_float64_is_not_narrowed(device, rng):
    tensors, *numbers = sample((2, 3), device, rng, torch.float64)
    inputs = (*tensors, *numbers)
    for got, wanted in zip(run_kernel(*inputs), formula(*inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)


def test_extreme_values_of_half_precision(device, rng):
    """Two halves near the end of float16 differ by more than it can hold; their mix fits again."""
    full = lambda value: torch.full((1, 5), value, dtype=torch.float16, device=device)
    scale = torch.tensor([0.5], device=device)
    numbers = torch.tensor([[0.0, 1, 0, 0, 0, 1]], device=device)
    zero = full(0.0)
    for got in run_kernel(zero, full(60000.0), full(-60000.0), zero, zero, scale, numbers):
        assert not got.any()


def test_nothing_to_do(device):
    for shape in ((0, 4), (2, 0)):
        inputs = [torch.zeros(shape, device=device)] * 5
        inputs += [torch.zeros(shape[0], device=device), torch.zeros(shape[0], 6, device=device)]
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
        (detached, *numbers, *grads),
        test_utils=("test_schema", "test_faketensor"),
    )


class Step(torch.nn.Module):
    def forward(self, *inputs):
        return guided_step(*inputs)


def test_exports_as_one_node_and_compiles_whole(rng):
    tensors, *numbers = sample((2, 3, 4), "cpu", rng)
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
