"""Guidance and the sampler's update against the formula, clip by clip."""

import importlib

import pytest
import torch
from closeness import assert_as_good_as

import kinetiq as kq
from kinetiq.kernels import guided_step

operator = importlib.import_module("kinetiq.kernels.guided_step")  # not the function

SHAPES = [(1, 1), (3, 4, 3, 5, 7), (2, 4, 16, 8, 8)]


def sample(shape, device, rng, dtype=torch.float32):
    make = lambda *size: torch.randn(size, generator=rng, device=device).to(dtype)
    return [make(*shape) for _ in range(5)], make(shape[0]), make(shape[0], 6)


def formula(tensors, scales, coefficients):
    following, clean = [], []
    for clip, scale, (a, b, c, s, p, q) in zip(
        zip(*tensors, strict=True), scales, coefficients, strict=True
    ):
        x, conditional, unconditional, former, noise = clip
        m = unconditional + scale * (conditional - unconditional)
        following.append(a * x + b * m + c * former + s * noise)
        clean.append(p * x + q * m)
    return torch.stack(following), torch.stack(clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(shape, dtype, device, rng):
    tensors, scale, coefficients = sample(shape, device, rng, dtype)
    got = guided_step(*tensors, scale, coefficients)
    naive = formula(tensors, scale, coefficients)
    exact = formula([t.double() for t in tensors], scale.double(), coefficients.double())
    for name, *three in zip(("next", "clean"), got, naive, exact, strict=True):
        assert three[0].dtype == dtype
        assert_as_good_as(*three, name=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_only_the_result_is_rounded(dtype, device, rng):
    """Sums are in float32 whatever the type, so a result errs half a unit in its last place."""
    tensors, scale, coefficients = sample((2, 40), device, rng, dtype)
    got = guided_step(*tensors, scale, coefficients)
    exact = formula([t.double() for t in tensors], scale.double(), coefficients.double())
    for result, wanted in zip(got, exact, strict=True):
        allowed = torch.finfo(dtype).eps / 2 * wanted.abs() + 1e-5
        assert ((result.double() - wanted).abs() <= allowed).all()


def test_reads_any_strides(device, rng):
    tensors, scale, coefficients = sample((3, 4, 5), device, rng)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    wanted = guided_step(*tensors, scale, coefficients)
    for got, expected in zip(guided_step(*strided, scale, coefficients), wanted, strict=True):
        assert torch.equal(got, expected)


def test_no_guidance_is_the_conditional_half(device, rng):
    (x, conditional, unconditional, former, noise), _, _ = sample((2, 3, 4), device, rng)
    output = torch.tensor([[0.0, 1, 0, 0, 0, 1]] * 2, device=device)  # both results are m itself

    def run(uncond, scale):
        scales = torch.full((2,), scale, device=device)
        return guided_step(x, conditional, uncond, former, noise, scales, output)

    one = run(unconditional, 1.0)
    for got in one:
        torch.testing.assert_close(got, conditional)
    for got in run(conditional, 7.5):  # a clip without guidance passes the same half twice
        assert torch.equal(got, conditional)
    for got in run(unconditional, 0.0):
        assert torch.equal(got, unconditional)


@pytest.mark.parametrize("place", range(6))
def test_each_coefficient_has_its_tensor(place, device, rng):
    tensors, _, _ = sample((2, 3), device, rng)
    x, conditional, unconditional, former, noise = tensors
    scale, coefficients = torch.tensor([2.0, 3.0], device=device), torch.zeros(2, 6, device=device)
    coefficients[1, place] = 1.0
    following, clean = guided_step(*tensors, scale, coefficients)
    output = unconditional + 3.0 * (conditional - unconditional)
    wanted = [x, output, former, noise, x, output][place][1]
    chosen, other = (following, clean) if place < 4 else (clean, following)
    torch.testing.assert_close(chosen[1], wanted)
    assert not other.any()
    assert not chosen[0].any()  # the other clip has its own coefficients


def test_a_clip_does_not_depend_on_its_neighbours(device, rng):
    tensors, scale, coefficients = sample((4, 3, 5), device, rng)
    together = guided_step(*tensors, scale, coefficients)
    for clip in range(4):
        one = slice(clip, clip + 1)
        alone = guided_step(*(t[one] for t in tensors), scale[one], coefficients[one])
        for got, wanted in zip(alone, together, strict=True):
            assert torch.equal(got, wanted[one])


def test_gradient(device, rng):
    tensors, scale, coefficients = sample((2, 3), device, rng, torch.float64)
    inputs = [t.requires_grad_() for t in (*tensors, scale, coefficients)]
    assert torch.autograd.gradcheck(guided_step, inputs)


@pytest.mark.parametrize(
    ("place", "tensor", "message"),
    [
        (0, torch.zeros(()), r"sample must be \[clips, \.\.\.\], got \[\]"),
        (1, torch.zeros(2, 3), r"conditional must have the shape of sample \[2, 4\], got \[2, 3\]"),
        (2, torch.zeros(1, 4), r"unconditional must have .* \[2, 4\], got \[1, 4\]"),
        (3, torch.zeros(2, 4, 1), r"former must have .* got \[2, 4, 1\]"),
        (4, torch.zeros(4), r"noise must have .* got \[4\]"),
        (
            5,
            torch.zeros(()),
            r"guidance_scale must be \[clips\] .* clips = 2, got \[\] and \[2, 6\]",
        ),
        (6, torch.zeros(2, 5), r"coefficients \[clips, 6\] .* got \[2\] and \[2, 5\]"),
        (
            0,
            torch.zeros(2, 4).int(),
            "sample must be float32, float16, bfloat16 or float64, got torch.int32",
        ),
        (4, torch.zeros(2, 4).to(torch.float8_e5m2), "noise must be float32, .*float8_e5m2"),
        (5, 7.5, "guidance_scale must be a tensor, got 7.5"),
        (0, [1], r"sample must be a tensor, got \[1\]"),
        (5, torch.zeros(2).long(), "guidance_scale must be float32, .* got torch.int64"),
    ],
)
def test_says_what_is_wrong(place, tensor, message):
    arguments = [torch.zeros(2, 4)] * 5 + [torch.zeros(2), torch.zeros(2, 6)]
    arguments[place] = tensor
    with pytest.raises(kq.ShapeError, match="^guided_step: .*" + message):
        guided_step(*arguments)
