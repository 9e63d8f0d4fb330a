"""The temporal block, by the operator and by its kernel, against the formula in float64."""

import importlib

import pytest
import torch
from closeness import assert_as_good_as

import kinetiq as kq
from kinetiq.kernels import _compile, temporal_block

operator = importlib.import_module("kinetiq.kernels.temporal_block")  # not the function

SHAPES = [  # rows, frames, tokens, heads, d
    pytest.param((1, 1, 1, 1, 8), id="smallest"),
    pytest.param((2, 5, 3, 3, 8), id="odd"),
    pytest.param((2, 16, 5, 2, 40), id="head dim 40"),
    pytest.param((1, 3, 6, 1, 16), id="several positions a program"),
    pytest.param((1, 24, 2, 2, 64), id="frames of ZeroScope"),
    pytest.param((1, 2, 1, 1, 80), id="head dim 80"),
    pytest.param((1, 2, 1, 1, 160), id="head dim 160"),
]
NAMES = ("norm_weight", "norm_bias", "query_weight", "key_weight", "value_weight", "out_weight")
NAMES = ("x", *NAMES, "out_bias", "position", "motion_slot", "motion_scale")
NAMES = (*NAMES, "query_bank", "key_bank", "value_bank")


def sample(shape, device, rng, dtype=torch.float32, *, controlled=True):
    rows, frames, tokens, heads, d = shape
    width = heads * d
    make = lambda *size: torch.randn(size, generator=rng, device=device).to(dtype)
    vectors = [1 + 0.1 * make(width), 0.1 * make(width)]
    matrices = [make(width, width) * (width**-0.5) for _ in range(4)]
    inputs = [3 + make(rows, frames, tokens, width), *vectors, *matrices, 0.1 * make(width)]
    if not controlled:
        return [*inputs, *[None] * 6]
    slot = torch.arange(rows, device=device).roll(1)
    scale = torch.rand(rows, generator=rng, device=device)
    banks = [make(3, frames, width), make(3, frames, width), make(3, frames, tokens, width)]
    for bank in banks:
        bank[0] = float("nan")  # slot 0 is none, whatever lies there
    return [*inputs, 0.3 * make(frames + 3, width), slot, scale, *banks]


def plain(inputs, heads):
    """The formula, one row, position and head at a time, in the type of the input."""
    x, weight, bias, *matrices, out_bias, position, slot, scale = inputs[:11]
    banks, d = inputs[11:], x.shape[-1] // heads
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias)
    if position is not None:
        normed = normed + position[: x.shape[1], None]
    parts = [normed @ matrix.T for matrix in matrices[:3]]
    attended = torch.empty_like(x)
    for r in range(x.shape[0]):
        for p in range(x.shape[2]):
            q, k, v = (part[r, :, p] for part in parts)
            if slot is not None and slot[r] > 0:
                share = scale[r].to(x.dtype)
                q, k = (t + share * bank[slot[r]] for t, bank in zip((q, k), banks, strict=False))
                v = v + share * banks[2][slot[r], :, p]
            for h in range(heads):
                part = slice(h * d, (h + 1) * d)
                weights = (q[:, part] @ k[:, part].T / d**0.5).softmax(-1)
                attended[r, :, p, part] = weights @ v[:, part]
    return x + attended @ matrices[3].T + out_bias


def double(inputs):
    return [t.double() if t is not None and t.is_floating_point() else t for t in inputs]


def run_operator(inputs, heads):
    return temporal_block(*inputs[:8], heads=heads, **dict(zip(NAMES[8:], inputs[8:], strict=True)))


def run_kernel(inputs, heads):
    x = inputs[0]
    memory = torch.full((x.numel() + 64,), float("nan"), dtype=x.dtype, device=x.device)
    memory[x.numel() :] = 7
    y = memory[: x.numel()].view(x.shape)
    operator._launch(*inputs, heads, 1e-5, y)
    assert (memory[x.numel() :] == 7).all()
    return y


@pytest.mark.parametrize("run", [run_operator, run_kernel], ids=["operator", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("controlled", [False, True], ids=["plain", "motion"])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(run, shape, controlled, dtype, device, rng):
    inputs, heads = sample(shape, device, rng, dtype, controlled=controlled), shape[3]
    got = run(inputs, heads)
    assert got.dtype == dtype and got.is_contiguous()
    assert_as_good_as(got, plain(inputs, heads), plain(double(inputs), heads))


def test_reference_is_the_definition(rng):
    inputs = double(sample((2, 5, 3, 3, 8), "cpu", rng))
    options = dict(zip(NAMES[8:], inputs[8:], strict=True))
    got = operator.temporal_block_reference(*inputs[:8], heads=3, **options)
    torch.testing.assert_close(got, plain(inputs, 3))


def test_kernel_reads_any_strides(device, rng):
    inputs = sample((2, 5, 3, 3, 8), device, rng)
    wanted = run_kernel(inputs, 3)
    strided = [t if t is None else t.T.contiguous().T if t.ndim == 2 else t for t in inputs]
    strided[0] = inputs[0].permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    torch.testing.assert_close(run_kernel(strided, 3), wanted)


def test_extreme_values(device, rng):
    """Activations near the end of float16, and scores far beyond the range of exp."""
    inputs = sample((1, 4, 2, 1, 16), device, rng, torch.float16, controlled=False)
    inputs[0] = 60000 + 1000 * (inputs[0] - 3).clamp(-4, 4)
    inputs[1] = 100 * inputs[1]
    assert_as_good_as(run_kernel(inputs, 1), plain(inputs, 1), plain(double(inputs), 1))
    inputs[0] = torch.full_like(inputs[0], 5.0)  # nothing to normalise: all scores are equal
    assert_as_good_as(run_kernel(inputs, 1), plain(inputs, 1), plain(double(inputs), 1))


def test_positions_and_rows_keep_to_themselves(device, rng):
    inputs = sample((2, 3, 6, 1, 16), device, rng)
    y = run_kernel(inputs, 1)
    order = torch.tensor([4, 1, 0, 5, 3, 2], device=device)
    moved = [inputs[0][:, :, order], *inputs[1:13], inputs[13][:, :, order]]
    torch.testing.assert_close(run_kernel(moved, 1), y[:, :, order])
    changed = inputs[0].clone()
    changed[1] *= -50
    changed[0, :, 3] *= 7
    got = run_kernel([changed, *inputs[1:]], 1)
    keep = torch.tensor([0, 1, 2, 4, 5], device=device)
    assert torch.equal(got[0][:, keep], y[0][:, keep])
    assert not torch.isclose(got[0][:, 3], y[0][:, 3]).all()


def test_gradients_agree_with_autograd(rng):
    inputs = double(sample((2, 3, 2, 2, 8), "cpu", rng))
    for place in (11, 12, 13):
        inputs[place][0] = 0.0
    inputs = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
    grad = torch.randn(inputs[0].shape, generator=rng, dtype=torch.float64)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    exact = torch.autograd.grad(plain(inputs, 2), wanted, grad)
    for y in (torch.ops.kinetiq.temporal_block(*inputs, 2, 1e-5), run_operator(inputs, 2)):
        for got, expected in zip(torch.autograd.grad(y, wanted, grad), exact, strict=True):
            torch.testing.assert_close(got, expected)


def test_is_a_well_formed_operator(device, rng):
    inputs = sample((1, 2, 2, 1, 8), device, rng)
    inputs[0].requires_grad_()
    torch.library.opcheck(
        torch.ops.kinetiq.temporal_block.default,
        (*inputs, 1, 1e-5),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


class Block(torch.nn.Module):
    def forward(self, *inputs):
        return temporal_block(*inputs, heads=2)


def test_exports_as_one_node_and_compiles_whole(rng):
    inputs = tuple(sample((2, 3, 2, 2, 8), "cpu", rng, controlled=False)[:8])
    with torch.no_grad():
        wanted = temporal_block(*inputs, heads=2)
        program = torch.export.export(Block(), inputs)
        calls = [str(n.target) for n in program.graph.nodes if "kinetiq" in str(n.target)]
        assert calls == ["kinetiq.temporal_block.default"]
        compiled = torch.compile(Block(), fullgraph=True, backend="aot_eager")
        for run in (program.module(), compiled):
            torch.testing.assert_close(run(*inputs), wanted)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("x", torch.zeros(2, 3, 4), r"x must be \[rows, frames, tokens, heads \* d\].*\[2, 3, 4\]"),
        ("x", torch.zeros(2, 0, 2, 16), r"at least one frame and token, got \[2, 0, 2, 16\]"),
        ("norm_weight", torch.zeros(8), r"norm_weight must be \[16\] in .* got \[8\]"),
        ("key_weight", torch.zeros(16, 8), r"key_weight must be \[16, 16\] .* got \[16, 8\]"),
        ("out_weight", torch.zeros(16, 16).half(), "out_weight must be .* got .*float16"),
        ("out_bias", torch.zeros(16, device="meta"), "out_bias must be .* on cpu .* on meta"),
        ("position", torch.zeros(2, 16), r"position must be \[3 frames or more, 16\] .* \[2, 16\]"),
        ("motion_slot", torch.zeros(2), r"motion_slot must be int64 \[rows = 2\], got .*float32"),
        ("motion_slot", None, "motion_scale needs motion_slot, got none|query_bank needs"),
        ("motion_scale", torch.zeros(3), r"motion_scale must be \[rows = 2\], got \[3\]"),
        (
            "query_bank",
            torch.zeros(3, 4, 16),
            r"query_bank must be \[slots, 3, 16\], .*\[3, 4, 16\]",
        ),
        ("value_bank", torch.zeros(3, 3, 16), r"value_bank must be \[slots, 3, 2, 16\]"),
        ("key_bank", torch.zeros(3, 3, 16, device="meta"), "key_bank must be on cpu .* got meta"),
    ],
)
def test_says_what_is_wrong(name, tensor, message, rng):
    inputs = dict(zip(NAMES, sample((2, 3, 2, 2, 8), "cpu", rng), strict=True)) | {name: tensor}
    with pytest.raises(kq.ShapeError, match="^temporal_block: .*(" + message + ")"):
        temporal_block(**inputs, heads=2)


def test_cost_counts_each_tensor_once():
    elements = 2 * 3 * 4 * 10
    cost = operator.cost(2, 3, 4, 2, 5, 2)
    assert cost.bytes == 2 * (2 * elements + 4 * 100 + (3 + 3) * 10)
    assert cost.flops == elements * (8 * 10 + 4 * 3)


def test_compiles_at_production_shapes():
    requests = [
        _compile.Request("temporal_block", "animatediff_64x64", True, "fp16", target)
        for target in ("sm_80", "sm_90")
    ]
    ampere, hopper = _compile.compile_apart(requests)
    for account in (ampere, hopper):
        assert not account.error, account
        assert account.spill_bytes == 0, account
        assert account.padded_work <= 48 / 40
    assert "HMMA" in ampere.matrix_instructions
    assert "HGMMA" in hopper.matrix_instructions
