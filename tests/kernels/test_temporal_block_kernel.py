"""The temporal block, by the operator and by its kernel, against the formula in float64."""

import importlib
import math
from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch
from closeness import assert_as_good_as

import kinetiq as kq
from kinetiq.kernels import _compile, _launch, temporal_block

operator = importlib.import_module("kinetiq.kernels.temporal_block")  # not the function

SHAPES = [  # rows, frames, tokens, heads, d
    pytest.param((1, 1, 1, 1, 8), id="smallest"),
    pytest.param((2, 5, 3, 3, 8), id="odd"),
    pytest.param((3, 3, 1, 1, 8), id="three rows"),
    pytest.param((2, 16, 5, 2, 40), id="head dim 40"),
    pytest.param((1, 3, 6, 1, 16), id="several positions a program"),
    pytest.param((1, 24, 2, 2, 64), id="frames of ZeroScope"),
    pytest.param((1, 2, 1, 1, 80), id="widest head"),
    pytest.param((1, 32, 1, 1, 8), id="most frames"),
]
NAMES = (*operator._TENSORS, *operator._OPTIONAL)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Interpreted, the products of bfloat16 are wrong in Triton 3.7.
KERNEL_DTYPES = DTYPES if torch.cuda.is_available() else DTYPES[:2]


def sample(shape, device, rng, dtype=torch.float32, *, controlled=True):
    rows, frames, tokens, heads, d = shape
    width = heads * d
    make = lambda *size: torch.randn(size, generator=rng, device=device).to(dtype)
    vectors = [1 + 0.1 * make(width), 0.1 * make(width)]
    matrices = [make(width, width) * (width**-0.5) for _ in range(4)]
    inputs = [3 + make(rows, frames, tokens, width), *vectors, *matrices, 0.1 * make(width)]
    if not controlled:
        return [*inputs, *[None] * 6]
    slot = (
        torch.arange(2, rows + 2, device=device) % 3
    )  # 2, 0, 1: of slots and scales, no two alike
    scale = torch.arange(1, rows + 1, device=device) / rows
    banks = [make(3, frames, width), make(3, frames, width), make(3, frames, tokens, width)]
    for bank in banks:
        bank[0] = float("nan")  # slot 0 is none, whatever lies there
    return [*inputs, 0.3 * make(frames + 3, width), slot, scale, *banks]


def plain(inputs, heads, eps=1e-5):
    """The formula, one row, position and head at a time, in the type of the input."""
    x, weight, bias, *matrices, out_bias, position, slot, scale = inputs[:11]
    banks, d = inputs[11:], x.shape[-1] // heads
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
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


def run_operator(inputs, heads, eps=1e-5):
    others = dict(zip(NAMES[8:], inputs[8:], strict=True))
    return temporal_block(*inputs[:8], heads=heads, eps=eps, **others)


def run_kernel(inputs, heads, eps=1e-5):
    x = inputs[0]
    memory = torch.full((x.numel() + 64,), float("nan"), dtype=x.dtype, device=x.device)
    memory[x.numel() :] = 7
    y = memory[: x.numel()].view(x.shape)
    operator._launch(*inputs, heads, eps, y)
    assert (memory[x.numel() :] == 7).all()
    return y


def check(run, inputs, heads):
    got = run(inputs, heads)
    assert got.dtype == inputs[0].dtype and got.is_contiguous()
    assert_as_good_as(got, plain(inputs, heads), plain(double(inputs), heads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("controlled", [False, True], ids=["plain", "motion"])
@pytest.mark.parametrize("shape", SHAPES)
def test_operator_agrees_with_float64(shape, controlled, dtype, device, rng):
    check(run_operator, sample(shape, device, rng, dtype, controlled=controlled), shape[3])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("controlled", [False, True], ids=["plain", "motion"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_agrees_with_float64(shape, controlled, dtype, kernel_device, kernel_rng):
    inputs = sample(shape, kernel_device, kernel_rng, dtype, controlled=controlled)
    check(run_kernel, inputs, shape[3])


# Each is one wrong line of the kernel's functions: which, what it says, and what it says instead.
MUTANTS = [
    ("_temporal_block_kernel", "tl.load(scale_ptr + row, mask", "tl.load(scale_ptr, mask"),
    ("_temporal_block_kernel", "tl.load(slot_ptr + row)", "tl.load(slot_ptr)"),
    ("_temporal_block_kernel", "scores * (D**-0.5)", "scores"),
    ("_temporal_block_kernel", "== line[None, :] // FRAMES) & (frame < frames)[None, :]",
     "== line[None, :] // FRAMES)"),
    ("_temporal_block_kernel", "(line[:, None] // FRAMES == line[None, :] // FRAMES) &", ""),
    ("_temporal_block_kernel", "total / width + EPS", "total + EPS"),
    ("_temporal_block_kernel", "of_token[:, None] + out[None, :], there", "of_frame[:, None] + out[None, :], there"),
    ("_temporal_block_kernel", "y += tl.load(out_bias_ptr", "y -= tl.load(out_bias_ptr"),
    ("_normed", "bias[None, :]", "0.0"),
    ("_normed", "frame[:, None] * width + channel", "channel"),
    ("_bias", "scale * tl.load", "tl.load"),
    ("_weights", "out[None, :] * width + channel[:, None]", "out[None, :] + channel[:, None] * width"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "line", "instead"), [(None, "", ""), *MUTANTS])
def test_a_wrong_line_is_found(function, line, instead, kernel_device, kernel_rng, mutate):
    """The comparison holds for the kernel as it is, and for none that differs by a line."""
    inputs = sample((3, 3, 2, 1, 8), kernel_device, kernel_rng)
    if function is None:
        check(run_kernel, inputs, 1)
        return
    mutate(operator, function, line, instead)
    with pytest.raises(AssertionError):
        check(run_kernel, inputs, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cpu_takes_a_few_positions_at_a_time_and_leaves_its_inputs(dtype, cpu_rng, monkeypatch):
    """Three of seven at a time, and so one the last time."""
    inputs = sample((2, 5, 7, 3, 8), "cpu", cpu_rng, dtype)
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    kept = [t.clone() for t in inputs]
    monkeypatch.setattr(operator, "CACHED", 3 * 2 * 5 * 24)
    got = run_operator(inputs, 3)
    assert_as_good_as(got, plain(inputs, 3), plain(double(inputs), 3))
    for now, before in zip(inputs, kept, strict=True):
        assert torch.equal(now.nan_to_num(), before.nan_to_num())


def test_reference_is_the_definition(cpu_rng):
    inputs = double(sample((2, 5, 3, 3, 8), "cpu", cpu_rng))
    options = dict(zip(NAMES[8:], inputs[8:], strict=True))
    got = operator.temporal_block_reference(*inputs[:8], heads=3, **options)
    torch.testing.assert_close(got, plain(inputs, 3))


def test_kernel_reads_any_strides(kernel_device, kernel_rng):
    inputs = sample((2, 5, 3, 3, 8), kernel_device, kernel_rng)
    wanted = run_kernel(inputs, 3)
    strided = [t if t is None else t.T.contiguous().T if t.ndim == 2 else t for t in inputs]
    strided[0] = inputs[0].permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    torch.testing.assert_close(run_kernel(strided, 3), wanted)


def test_extreme_values(kernel_device, kernel_rng):
    """Activations near the end of float16, and scores far beyond the range of exp."""
    inputs = sample((1, 4, 2, 1, 16), kernel_device, kernel_rng, torch.float16, controlled=False)
    inputs[0] = 60000 + 1000 * (inputs[0] - 3).clamp(-4, 4)
    inputs[1] = 100 * inputs[1]
    assert_as_good_as(run_kernel(inputs, 1), plain(inputs, 1), plain(double(inputs), 1))
    inputs[0] = torch.full_like(inputs[0], 5.0)  # nothing to normalise: all scores are equal
    assert_as_good_as(run_kernel(inputs, 1), plain(inputs, 1), plain(double(inputs), 1))


@pytest.mark.parametrize("run", [run_operator, run_kernel])
def test_a_scale_may_be_beyond_the_type(run, kernel_device, kernel_rng):
    inputs = sample((2, 3, 2, 2, 8), kernel_device, kernel_rng, torch.float16)
    inputs[10] = torch.full((2,), 1e5, device=kernel_device)
    inputs[11:] = [1e-5 * bank for bank in inputs[11:]]
    exact = plain(double(inputs), 2)
    assert exact.abs().max() < 100
    scaled = [(1e5 * bank.float()).half() for bank in inputs[11:]]
    naive = plain([*inputs[:10], torch.ones_like(inputs[10]), *scaled], 2)
    assert_as_good_as(run(inputs, 2), naive, exact)


def test_slot_zero_has_no_scale(kernel_device, kernel_rng):
    inputs = sample((2, 3, 2, 2, 8), kernel_device, kernel_rng)
    inputs[9].zero_()
    wanted = [*inputs[:9], *[None] * 5]
    inputs[10].fill_(float("inf"))
    for run in (run_operator, run_kernel):
        assert torch.equal(run(inputs, 2), run(wanted, 2))


def test_positions_and_rows_keep_to_themselves(kernel_device, kernel_rng):
    inputs = sample((2, 3, 6, 1, 16), kernel_device, kernel_rng)
    y = run_kernel(inputs, 1)
    order = torch.tensor([4, 1, 0, 5, 3, 2], device=kernel_device)
    moved = [inputs[0][:, :, order], *inputs[1:13], inputs[13][:, :, order]]
    torch.testing.assert_close(run_kernel(moved, 1), y[:, :, order])
    changed = inputs[0].clone()
    changed[1] *= -50
    changed[0, :, 3] *= 7
    got = run_kernel([changed, *inputs[1:]], 1)
    keep = torch.tensor([0, 1, 2, 4, 5], device=kernel_device)
    assert torch.equal(got[0][:, keep], y[0][:, keep])
    assert not torch.isclose(got[0][:, 3], y[0][:, 3]).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # by the interpreter
def test_a_value_that_is_not_finite_never_reaches_another_row(kernel_device, kernel_rng):
    """Nor, where a program does not hold it as well, another position; a CPU keeps all apart."""
    inputs = sample((2, 3, 40, 1, 16), kernel_device, kernel_rng)
    wanted = run_kernel(inputs, 1)
    spoilt = [inputs[0].clone(), *inputs[1:]]
    spoilt[0][0, 1, 2, 5] = float("inf")
    got = run_kernel(spoilt, 1)
    assert torch.equal(got[1], wanted[1])
    assert not got[0, :, 2].isfinite().any()
    together = operator._sizes(3, 16, torch.float32)["TOKENS"]
    assert together < 40
    assert torch.equal(got[0, :, together:], wanted[0, :, together:])
    if kernel_device == "cpu":
        finite = run_operator(spoilt, 1)[0].isfinite().all(-1).all(0)
        assert finite.sum() == 39 and not finite[2]


def run_registered(inputs, heads, eps=1e-5):
    """The operator below the public function: another forward pass, and a gradient of its own."""
    return torch.ops.kinetiq.temporal_block(*inputs, heads, eps)


# Also where nothing is added: frames and tokens that fill up a tile do not vary at all.
@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize("run", [run_operator, run_registered, run_kernel])
@pytest.mark.parametrize("controlled", [False, True], ids=["plain", "motion"])
def test_any_eps_agrees_with_float64(controlled, run, eps, kernel_device, kernel_rng):
    inputs = sample((3, 3, 5, 2, 16), kernel_device, kernel_rng, controlled=controlled)
    got = run(inputs, 2, eps)
    assert_as_good_as(got, plain(inputs, 2, eps), plain(double(inputs), 2, eps))
    usual = run(inputs, 2)
    assert eps == 0 or (got - usual).abs().max() > 0.1


def test_an_eps_that_is_not_given_on_is_found(kernel_device, kernel_rng, mutate):
    inputs = sample((3, 3, 2, 1, 8), kernel_device, kernel_rng)
    mutate(operator, "_temporal_block_kernel", "total / width + EPS", "total / width + 1e-5")
    with pytest.raises(AssertionError):
        assert_as_good_as(
            run_kernel(inputs, 1, 0.5), plain(inputs, 1, 0.5), plain(double(inputs), 1, 0.5)
        )


def test_gradients_with_another_eps(cpu_rng):
    inputs = double(sample((2, 3, 1, 2, 2), "cpu", cpu_rng, controlled=False))
    copies, leaves = with_leaves(inputs)
    wanted = torch.autograd.grad(plain(copies, 2, 0.5).square().sum(), leaves)
    for run in (run_operator, run_registered):
        got = torch.autograd.grad(run(copies, 2, 0.5).square().sum(), leaves)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("run", [run_operator, run_registered])
def test_gradients_of_the_norm_are_added_up_in_float32_on_a_cpu(run, dtype, cpu_rng):
    """Over thousands of positions, where sums in the type itself keep one digit."""
    inputs = sample((2, 16, 128, 2, 16), "cpu", cpu_rng, dtype, controlled=False)
    grad = torch.randn(inputs[0].shape, generator=cpu_rng).to(dtype)
    copies, leaves = with_leaves(inputs)
    exact_copies, exact_leaves = with_leaves(double(inputs))
    got = torch.autograd.grad(run(copies, 2), leaves[1:3], grad)
    exact = torch.autograd.grad(plain(exact_copies, 2), exact_leaves[1:3], grad.double())
    # The residual branch goes through five roundings to the type, each of half its precision.
    allowed = 5 * torch.finfo(dtype).eps / 2
    for one, wanted in zip(got, exact, strict=True):
        assert (one.double() - wanted).norm() <= allowed * wanted.norm()


@pytest.mark.parametrize("run", [run_operator, run_registered, run_kernel])
@pytest.mark.parametrize("controlled", [False, True], ids=["plain", "motion"])
def test_no_rows_are_no_work(controlled, run, kernel_device, kernel_rng):
    inputs = sample((2, 3, 2, 2, 8), kernel_device, kernel_rng, controlled=controlled)
    inputs[0] = inputs[0][:0]
    inputs[9:11] = [t if t is None else t[:0] for t in inputs[9:11]]
    assert run(inputs, 2).shape == (0, 3, 2, 16)


@pytest.mark.parametrize(("slot", "got"), [(3, "0 to 3"), (-1, "-1 to 0")])
def test_a_graph_on_a_cpu_is_told_of_slots_that_are_not(slot, got, cpu_rng):
    inputs = sample((2, 3, 2, 2, 8), "cpu", cpu_rng)
    inputs[9] = torch.tensor([0, slot])
    words = f"^temporal_block: motion_slot must have values from 0 to 2, got {got}$"
    with pytest.raises(kq.ShapeError, match=words):
        run_registered(inputs, 2)


def with_leaves(inputs):
    """Copies of which all that can has a gradient, and those that do."""
    copies = [t if t is None else t.detach().clone() for t in inputs]
    return copies, [t.requires_grad_() for t in copies if t is not None and t.is_floating_point()]


@pytest.mark.parametrize("run", [run_operator, run_registered], ids=["public", "registered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 3, 3, 8), (2, 16, 1, 1, 40)], ids=["odd", "head dim 40"])
def test_gradients_agree_with_float64(shape, dtype, run, device, rng):
    inputs, heads = sample(shape, device, rng, dtype), shape[3]
    grad = torch.randn(inputs[0].shape, generator=rng, device=device).to(dtype)

    def gradients(run, inputs, grad):
        copies, leaves = with_leaves(inputs)
        return torch.autograd.grad(run(copies, heads), leaves, grad)

    got = gradients(run, inputs, grad)
    for bank in inputs[11:]:
        bank[0] = 0  # what is NaN there must not matter; the plain formula has a gradient of it
    exact = gradients(plain, double(inputs), grad.double())
    naive = gradients(plain, inputs, grad)
    names = [name for name in NAMES if name != "motion_slot"]
    of_scale, of_banks = names.index("motion_scale"), exact[-3:]
    for name, *tensors in zip(names, got, naive, exact, strict=True):
        if name != "motion_scale":
            assert_as_good_as(*tensors, slack=3, name=f"gradient of {name}")
    # One number, a sum of bank times gradient: plain PyTorch may be right by luck, so what rounding
    # may take from the terms is allowed as well.
    terms = [
        (bank.double() * of).abs().sum() for bank, of in zip(inputs[11:], of_banks, strict=True)
    ]
    allowed = torch.finfo(dtype).eps * sum(terms) / inputs[10][inputs[9] > 0]
    error, plainly = (t[of_scale].double() - exact[of_scale] for t in (got, naive))
    assert error.abs().max() <= 3 * plainly.abs().max() + allowed.max()


def test_gradients_by_finite_differences(cpu_rng):
    inputs = double(sample((2, 3, 1, 2, 2), "cpu", cpu_rng))
    copies, leaves = with_leaves(inputs)
    slot = copies[9]
    run = lambda *tensors: run_registered([*tensors[:9], slot, *tensors[9:]], 2)
    with torch.no_grad():
        for bank in copies[11:]:
            bank[0] = 0
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("run", [run_operator, run_registered], ids=["public", "registered"])
def test_only_what_needs_a_gradient_has_one(run, cpu_rng):
    inputs = sample((2, 3, 2, 2, 8), "cpu", cpu_rng)
    inputs[12].requires_grad_()
    run(inputs, 2).sum().backward()
    assert [name for name, t in zip(NAMES, inputs, strict=True) if t.grad is not None] == [
        "key_bank"
    ]
    assert not inputs[12].grad[:2].any() and inputs[12].grad[2].abs().max() > 0  # slots 2 and 0


@pytest.mark.parametrize("controlled", [False, True], ids=["plain", "motion"])
def test_is_a_well_formed_operator(controlled, device, rng):
    inputs = sample((1, 2, 2, 1, 8), device, rng, controlled=controlled)
    inputs, _ = with_leaves(inputs)
    torch.library.opcheck(torch.ops.kinetiq.temporal_block.default, (*inputs, 1, 1e-5))


@pytest.mark.parametrize(
    ("frames", "d", "held"),
    [
        (16, 40, True),
        (32, 80, True),
        (33, 8, False),
        (1, 81, False),
        (16, 160, False),
    ],
)
def test_what_a_program_cannot_hold_goes_to_the_separate_operators(
    frames, d, held, cpu_rng, monkeypatch
):
    launched = []
    monkeypatch.setattr(operator, "_launch", lambda *arguments: launched.append(arguments))
    inputs = sample((1, frames, 1, 1, d), "cpu", cpu_rng)
    y = operator._temporal_block._init_fn(*inputs, 1, 1e-5)  # as it is on a GPU
    assert y.shape == inputs[0].shape
    assert bool(launched) == held
    if not held:
        assert_as_good_as(y, plain(inputs, 1), plain(double(inputs), 1))


def test_wins_only_where_that_was_measured(monkeypatch):
    here = torch.device("cuda")
    shape = (2, 16, 4096, 8, 40, torch.float16, here)
    for name in ("default", *_compile.SHARED_LIMITS):
        with _launch.pretend(name):
            measured = _launch.file_entries("temporal_block_wins").get(name, {})
            assert operator.wins(*shape) == (
                0 < measured.get("frames16_heads8_d40_fp16", {"POSITIONS": 0})["POSITIONS"] <= 8192
            )
    table = {
        "default": {"*": {"POSITIONS": 1}},
        "sm_80": {
            "*": {"POSITIONS": 1},
            "frames16_heads8_d40_fp16": {"POSITIONS": 8192},
            "frames16_heads8_d40_bf16": {"POSITIONS": 0},
        },
    }
    monkeypatch.setattr(operator, "file_entries", lambda _: table)
    with _launch.pretend("sm_80"):
        assert operator.wins(*shape)
        assert operator.wins(1, 16, 8192, 8, 40, torch.float16, here)
        assert not operator.wins(1, 16, 8191, 8, 40, torch.float16, here)  # fewer than measured
        assert not operator.wins(2, 16, 4096, 8, 40, torch.bfloat16, here)  # measured to lose
        assert not operator.wins(2, 24, 4096, 8, 40, torch.float16, here)
        assert not operator.wins(2, 16, 4096, 5, 64, torch.float16, here)
        assert not operator.wins(2, 16, 4096, 8, 40, torch.float64, here)
    with _launch.pretend("sm_86"):  # whose launch settings may be those of sm_80
        assert not operator.wins(*shape)


def test_wins_on_the_gpu_of_the_tensor_and_not_on_the_current_one(monkeypatch):
    current = [0]

    @contextmanager
    def device(index):
        current.append(current[-1] if index < 0 else index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(operator, "architecture", lambda: ("sm_80", "sm_90")[current[-1]])
    table = {"sm_90": {"frames16_heads8_d40_fp16": {"POSITIONS": 1}}}
    monkeypatch.setattr(operator, "file_entries", lambda _: table)
    wins = lambda place: operator.wins(2, 16, 64, 8, 40, torch.float16, torch.device(place))
    assert wins("cuda:1") and not wins("cuda:0")


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_wins_nowhere_but_on_a_gpu(place, monkeypatch):
    """Whatever the GPU beside it is good at."""
    table = {"sm_90": {"frames16_heads8_d40_fp16": {"POSITIONS": 1}}}
    monkeypatch.setattr(operator, "file_entries", lambda _: table)
    wins = lambda name: operator.wins(2, 16, 64, 8, 40, torch.float16, torch.device(name))
    with _launch.pretend("sm_90"):
        assert wins("cuda")
        assert not wins(place)


@pytest.mark.parametrize("name", ["x", *operator._TENSORS[1:]])
def test_a_cpu_takes_a_batch_of_any_one_tensor(name, cpu_rng):
    """Beside others that are no batches, as when several weights are compared on one input."""
    inputs = dict(zip(NAMES, sample((2, 3, 2, 2, 8), "cpu", cpu_rng), strict=True))
    run = lambda tensor: temporal_block(**inputs | {name: tensor}, heads=2)
    batch = torch.stack([inputs[name], 2 * inputs[name]])
    got = torch.func.vmap(run)(batch)
    torch.testing.assert_close(got, torch.stack([run(tensor) for tensor in batch]))


def test_settings_are_those_of_the_gpu_of_the_input(cpu_rng, monkeypatch):
    entered, asked = [], []

    @contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield
        entered.pop()

    def settings(name, key, ask=operator.settings):
        asked.append(bool(entered))
        return ask(name, key)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(operator, "settings", settings)
    monkeypatch.setattr(
        operator, "_temporal_block_kernel", defaultdict(lambda: lambda *_, **__: None)
    )
    inputs = sample((1, 2, 1, 1, 8), "cpu", cpu_rng)
    operator._launch(*inputs, 1, 1e-5, inputs[0])
    assert asked == [True]


@pytest.mark.parametrize("frames", [4, 16])
def test_autocast_does_not_change_the_type(frames, cpu_rng):
    inputs = sample((2, frames, 3, 2, 8), "cpu", cpu_rng)
    grad = torch.randn(inputs[0].shape, generator=cpu_rng)

    def results():
        copies, leaves = with_leaves(inputs)
        y = run_registered(copies, 2)
        recorded = run_operator(copies, 2)
        return run_operator(inputs, 2), recorded, y, *torch.autograd.grad(y, leaves, grad)

    wanted = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results()
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


class Block(torch.nn.Module):
    def forward(self, *inputs):
        return temporal_block(*inputs, heads=2)


def test_exports_as_one_node_and_compiles_whole(cpu_rng):
    inputs = tuple(sample((2, 3, 2, 2, 8), "cpu", cpu_rng, controlled=False)[:8])
    with torch.no_grad():
        wanted = temporal_block(*inputs, heads=2)
        program = torch.export.export(Block(), inputs)
        calls = [str(n.target) for n in program.graph.nodes if "kinetiq" in str(n.target)]
        assert calls == ["kinetiq.temporal_block.default"]
        compiled = torch.compile(Block(), fullgraph=True, backend="aot_eager")
        for run in (program.module(), compiled):
            torch.testing.assert_close(run(*inputs), wanted)


def test_trains_compiled_whole(cpu_rng):
    """With a motion embedding, whose slots must not be looked at while a graph is made."""
    inputs = sample((2, 3, 2, 2, 8), "cpu", cpu_rng)
    compiled = torch.compile(run_operator, fullgraph=True, backend="aot_eager")
    results = []
    for run in (run_operator, compiled):
        copies, leaves = with_leaves(inputs)
        y = run(copies, 2)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("x", torch.zeros(2, 3, 4), r"x must be \[rows, frames, tokens, heads \* d\].*\[2, 3, 4\]"),
        ("x", torch.zeros(2, 0, 2, 16), r"at least one frame and token, got \[2, 0, 2, 16\]"),
        (
            "x",
            torch.zeros(2, 3, 2, 16).int(),
            "x must be float32, float16, bfloat16 or float64, got torch.int32$",
        ),
        ("norm_weight", torch.zeros(8), r"norm_weight must be \[16\] in .* got \[8\]"),
        ("key_weight", torch.zeros(16, 8), r"key_weight must be \[16, 16\] .* got \[16, 8\]"),
        ("out_weight", torch.zeros(16, 16).half(), "out_weight must be .* got .*float16"),
        ("out_bias", torch.zeros(16, device="meta"), "out_bias must be .* on cpu .* on meta"),
        ("position", torch.zeros(2, 16), r"position must be \[3 frames or more, 16\] .* \[2, 16\]"),
        ("position", torch.zeros(3, 16).long(), "position must be float32, .* got torch.int64"),
        ("position", [1], r"position must be a tensor, got \[1\]"),
        ("x", [1], r"x must be a tensor, got \[1\]"),
        ("out_weight", 3, "out_weight must be a tensor, got 3"),
        ("query_bank", [1], r"query_bank must be a tensor, got \[1\]"),
        ("eps", -100, "eps must be a number of at least 0 that float32 holds, got -100"),
        ("eps", math.nan, "eps must be a number of at least 0 that float32 holds, got nan"),
        ("eps", "1e-5", "eps must be a number of at least 0 that float32 holds, got '1e-5'"),
        ("eps", True, "eps must be a number of at least 0 that float32 holds, got True"),
        ("eps", 10**400, "eps must be a number of at least 0 that float32 holds, got 1000"),
        ("motion_slot", torch.zeros(2), r"motion_slot must be int64 \[rows = 2\], got .*float32"),
        ("motion_slot", None, "motion_scale and banks need motion_slot, got none"),
        (
            "motion_slot",
            torch.tensor([0, 3]),
            "motion_slot must have values from 0 to 2, got 0 to 3",
        ),
        ("motion_scale", torch.zeros(3), r"motion_scale must be \[rows = 2\], got \[3\]"),
        (
            "query_bank",
            torch.zeros(3, 4, 16),
            r"query_bank must be .* = \[slots, 3, 16\], .*\[3, 4, 16\]",
        ),
        ("value_bank", torch.zeros(3, 3, 16), r"value_bank must be .* \[slots, 3, 2, 16\]"),
        ("key_bank", torch.zeros(3, 3, 16, device="meta"), "key_bank must be .* on cpu .* on meta"),
        (
            "key_bank",
            torch.zeros(3, 3, 16).half(),
            "key_bank must be torch.float32 .* got .*float16",
        ),
    ],
)
def test_says_what_is_wrong(name, tensor, message, cpu_rng):
    inputs = dict(zip(NAMES, sample((2, 3, 2, 2, 8), "cpu", cpu_rng), strict=True)) | {name: tensor}
    with pytest.raises(kq.ShapeError, match="^temporal_block: .*(" + message + ")"):
        temporal_block(**inputs, heads=2)


@pytest.mark.gpu
def test_more_programs_than_a_grid_axis_has():
    inputs = sample((70_000, 2, 1, 1, 16), "cuda", torch.Generator("cuda").manual_seed(0))
    y = run_kernel(inputs, 1)
    last = [inputs[0][-5:], *inputs[1:9], *(t[-5:] for t in inputs[9:11]), *inputs[11:]]
    check(run_kernel, last, 1)
    torch.testing.assert_close(y[-5:], run_kernel(last, 1))


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    """The last position, alone and after two thousand million others."""
    rng = torch.Generator("cuda").manual_seed(0)
    inputs = sample((1, 16, 1, 8, 40), "cuda", rng, torch.float16, controlled=False)
    x = torch.randn(1, 16, 420_000, 320, device="cuda", dtype=torch.float16)
    assert x.numel() > 2**31
    y = temporal_block(x, *inputs[1:8], heads=8)[:, :, -1:]
    torch.testing.assert_close(y, run_operator([x[:, :, -1:].contiguous(), *inputs[1:]], 8))


@pytest.mark.gpu
@pytest.mark.parametrize("controlled", [False, True], ids=["plain", "motion"])
def test_is_captured_and_replayed(controlled):
    """With its gradient; a wait for the GPU would be an error while a graph is captured."""
    rng = torch.Generator("cuda").manual_seed(0)
    inputs = sample((2, 16, 8, 2, 40), "cuda", rng, torch.float16, controlled=controlled)
    inputs, leaves = with_leaves(inputs)

    def step():
        y = run_operator(inputs, 2)
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
        inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    for got, wanted in zip(kept, step(), strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)


@pytest.mark.slow
@pytest.mark.gpu
def test_touches_no_memory_but_its_own(memory_check):
    memory_check(__file__, "kernel_agrees and odd and torch.float16")


def test_cost_counts_each_tensor_once():
    elements = 2 * 3 * 4 * 10
    cost = operator.cost(2, 3, 4, 2, 5, 2)
    assert cost.bytes == 2 * (2 * elements + 4 * 100 + (3 + 3) * 10)
    assert cost.flops == elements * (8 * 10 + 4 * 3)
    backward = operator.cost(2, 3, 4, 2, 5, 2, backward=True)
    assert backward.bytes == 2 * (3 * elements + 2 * (4 * 100 + 3 * 10) + 3 * 10)
    assert backward.flops == elements * ((3 + 8) * 2 * 10 + 6 * 2 * 3)  # 3 again, two a projection


@pytest.mark.parametrize(
    "x",
    [torch.empty(1, 129, 1, 8), torch.empty(1, 1, 1, 257), torch.empty(1, 1, 1, 8).double()],
    ids=["frames", "head dim", "type"],
)
def test_says_what_a_gpu_cannot_hold(x):
    with pytest.raises(kq.ShapeError, match="at most 128 frames, d at most 256 and type float32"):
        operator._check_kernel(x, 1)


def test_padded_work_counts_all_that_is_multiplied():
    """The matrices of the weights of a position, and then its scores and what they weigh."""
    work = {case.shape: case.padded_work for case in operator.COMPILED}
    heads = {case.shape: case.padded_head_dim for case in operator.COMPILED}
    assert (heads["animatediff_64x64"], heads["zeroscope_36x20"]) == (48 / 40, 1.0)
    # 64 lines are four positions of 16 frames, each against all. 40 columns of a head are 48, and
    # that alone is what no kernel may exceed; all together it is more.
    done = 3 * 320 * 8 * 48 + 2 * 64 * 8 * 48 + 320 * 320
    wanted = 4 * 320 * 320 + 2 * 16 * 320
    assert work["animatediff_64x64"] == pytest.approx(done / wanted)
    assert 1.2 < done / wanted < 1.24
    # 64 lines are two positions of 24 frames, of which 8 more are padding.
    done = 4 * 640 * 640 + 2 * 64 * 640
    wanted = 4 * 640 * 640 + 2 * 24 * 640
    assert work["zeroscope_36x20"] == pytest.approx(32 / 24 * done / wanted)


def test_compiles_at_production_shapes():
    requests = [
        _compile.Request("temporal_block", shape, True, "fp16", target)
        for shape, target in (
            ("animatediff_64x64", "sm_80"),
            ("animatediff_64x64", "sm_90"),
            ("animatediff_32x32", "sm_120"),  # the fewest registers for what it holds
            ("longest_d80", "sm_86"),
            ("zeroscope_72x40", "sm_89"),  # which takes the settings of sm_86
        )
    ]
    accounts = list(_compile.compile_apart(requests))
    assert [account.request for account in accounts] == requests
    for account in accounts:
        assert not account.error, account
        assert account.spill_bytes == 0, account
        assert not account.misses_matrix_units, account
        assert len(account.grid) == 1  # the other axes end at 65,535
    assert "HGMMA" in accounts[1].matrix_instructions
