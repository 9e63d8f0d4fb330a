"""The GPU kernels of frame attention, run interpreted where there is no GPU, and their operator."""

import importlib
from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch
from closeness import assert_as_good_as
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kinetiq as kq
from kinetiq.kernels import _compile, frame_attention, motion_feature
from kinetiq.kernels.frame_attention import frame_attention_with_motion

operator = importlib.import_module("kinetiq.kernels.frame_attention")  # not the function

SENTINEL = 17.0
NAMES = operator.CONTROLS
# Interpreted, the products of bfloat16 are wrong in Triton 3.7.
OF_GPUS = [torch.bfloat16] if torch.cuda.is_available() else []
DTYPES = [torch.float32, torch.float16, *OF_GPUS]
SHAPES = [  # rows, frames, tokens, heads, d
    pytest.param((1, 1, 1, 1, 1), id="smallest"),
    pytest.param((2, 5, 3, 3, 8), id="odd, head dim 8"),
    pytest.param((1, 16, 3, 2, 40), id="head dim 40, in 32 + 16"),
    pytest.param((1, 7, 2, 1, 80), id="head dim 80, in 64 + 16"),
    pytest.param((1, 17, 1, 1, 160), id="head dim 160, all warps on one sequence"),
    pytest.param((1, 24, 2, 1, 64), id="24 frames, head dim 64"),
    pytest.param((1, 65, 1, 2, 16), id="one past 64 frames"),
    pytest.param((1, 128, 1, 1, 8), id="most frames"),
    pytest.param((1, 2, 1, 1, 256), id="widest head"),
]
KINDS = ["none", "query", "per row", "deviation", "deviation per token", "motion", "all"]


def sample(shape, dtype, device, rng):
    *size, heads, d = shape
    make = lambda: torch.randn(*size, heads * d, generator=rng, device=device).to(dtype)
    return make(), 2 * make(), make()


def controls(kind, shape, dtype, device, rng):
    """Controls of a kind, with values that the type can hold."""
    rows, frames, tokens, heads, d = shape
    row = torch.arange(rows, device=device).roll(1)
    make = lambda *size: torch.rand(size, generator=rng, device=device).to(dtype)
    chosen = dict.fromkeys(NAMES)
    if kind in ("query", "all"):
        chosen |= {"query_row": row, "query_blend": make(rows, frames, tokens)}
    if kind == "per row":  # no two of them alike
        blends = torch.arange(1, 2 * rows + 1, device=device).to(dtype) / (2 * rows + 1)
        chosen |= {
            "query_row": row,
            "query_blend": blends[:rows],
            "deviation_row": row.flip(0),
            "deviation_blend": blends[rows:],
        }
    if kind == "deviation":
        chosen |= {"deviation_row": row}
    if kind in ("deviation per token", "all"):
        chosen |= {
            "deviation_row": torch.zeros_like(row),
            "deviation_blend": make(rows, frames, tokens),
            "deviation_parts": make(rows, 3),
        }
    if kind in ("motion", "all"):
        chosen |= {
            "motion_slot": torch.arange(2, rows + 2, device=device) % 3,
            "motion_scale": torch.arange(1, rows + 1, device=device).to(dtype) / rows,
            "query_bank": make(3, frames, heads * d),
            "key_bank": make(3, frames, heads * d) if kind == "all" else None,
            "value_bank": make(3, frames, tokens, heads * d),
        }
    return chosen


def widen(tensors):
    """The same in float64, indices aside."""
    if isinstance(tensors, dict):
        return dict(zip(tensors, widen(tensors.values()), strict=True))
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def plain(query, key, value, heads, chosen):
    """The formula in the type of the input, by plain PyTorch."""
    parts = operator.mix(query, key, value, **chosen)
    q, k, v = (t.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4) for t in parts)
    weights = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
    return (weights @ v).permute(0, 3, 1, 2, 4).flatten(-2)


def prefilled(like, count):
    """Contiguous tensors that a kernel must fill, and the memory behind each that it must not."""
    memory = [like.new_full((like.numel() + 64,), float("nan")) for _ in range(count)]
    for one in memory:
        one[like.numel() :] = SENTINEL
    return [one[: like.numel()].view(like.shape) for one in memory], memory


def forward(query, key, value, heads, chosen):
    (out,), memory = prefilled(query, 1)
    operator._launch_forward(query, key, value, tuple(chosen.values()), heads, out)
    assert all((one[query.numel() :] == SENTINEL).all() for one in memory)
    return out


def backward(grad, query, key, value, heads, chosen):
    grads, memory = prefilled(query, 3)
    operator._launch_backward(grad, query, key, value, tuple(chosen.values()), heads, tuple(grads))
    assert all((one[query.numel() :] == SENTINEL).all() for one in memory)
    return grads


def gradients(grad, query, key, value, heads, chosen):
    """Gradients of the mixed q, k and v, by autograd of the plain formula."""
    mixed = [t.detach().requires_grad_() for t in operator.mix(query, key, value, **chosen)]
    out = plain(*mixed, heads, dict.fromkeys(NAMES))
    return torch.autograd.grad(out, mixed, grad)


def check(shape, dtype, kind, device, rng, change=lambda t: t):
    inputs, heads = [change(t) for t in sample(shape, dtype, device, rng)], shape[-2]
    chosen = controls(kind, shape, dtype, device, rng)
    exact = operator.frame_attention_reference(*widen(inputs), heads=heads, **widen(chosen))
    naive = plain(*inputs, heads, chosen)
    assert_as_good_as(forward(*inputs, heads, chosen), naive, exact)
    grad = torch.randn(exact.shape, generator=rng, device=device).to(dtype)
    exact = gradients(grad.double(), *widen(inputs), heads, widen(chosen))
    naive = gradients(grad, *inputs, heads, chosen)
    got = backward(grad, *inputs, heads, chosen)
    for name, *tensors in zip("qkv", got, naive, exact, strict=True):
        assert_as_good_as(*tensors, slack=3, name=f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_agrees_with_float64(shape, dtype, kernel_device, kernel_rng):
    check(shape, dtype, "none", kernel_device, kernel_rng)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_kernel_mixes_rows_as_the_definition_does(kind, kernel_device, kernel_rng):
    check((3, 5, 2, 2, 8), torch.float32, kind, kernel_device, kernel_rng)


def test_kernel_mixes_tails_too(kernel_device, kernel_rng):
    check((2, 16, 1, 1, 40), torch.float16, "all", kernel_device, kernel_rng)


# Each is one wrong line: the function that it is in, what the line says, and what it says instead.
MUTANTS = [
    ("_share", "tl.load(blend_ptr + row)", "tl.load(blend_ptr)"),
    ("_biased", "tl.load(motion[0] + row)", "tl.load(motion[0])"),
    ("_biased", "tl.load(motion[1] + row, mask", "tl.load(motion[1], mask"),
    ("_frame_attention_kernel", "(value_bank_ptr, by_slot,", "(value_bank_ptr, by_frame,"),
    ("_moved", "_biased(operand, source, place", "_biased(operand, row, place"),
    ("_moved", "_share(deviation[1], row, place", "_share(deviation[1], source, place"),
    ("_moved", "own_mean[:, None, :] - own", "0.0"),
    ("_chosen", "tl.load(choice[0] + row)", "row"),
    ("_chosen", "_share(choice[1], row, place", "_share(choice[1], reader, place"),
    ("_known_scores", "SCALE * 1.4426950408889634", "1.4426950408889634"),
    ("_known_scores", "(frame < frames)", "(frame >= 0)"),
    ("_attend_kernel_part", "1.0 / total[:, :, None]", "1.0"),
    ("_frame_attention_backward_kernel", "(grad_weights - common)", "grad_weights"),
]


@pytest.mark.parametrize(("function", "line", "instead"), [(None, "", ""), *MUTANTS])
def test_a_wrong_line_is_found(function, line, instead, kernel_device, kernel_rng, mutate):
    """The comparison holds for the kernels as they are, and for none that differs by a line."""
    shape = (3, 3, 2, 1, 8)

    def compare():
        for kind in ("per row", "motion"):
            check(shape, torch.float32, kind, kernel_device, kernel_rng)

    if function is None:
        compare()
        return
    mutate(operator, function, line, instead)
    with pytest.raises(AssertionError):
        compare()


SMALL = {"TILE": 1, "WHOLE": 1, "ONE_TILE": 1, "ONE_WARPS": 4, "num_warps": 4, "num_stages": 1}


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        ((1, 33, 1, 1, 40), torch.float16, "none"),
        ((2, 17, 1, 1, 8), torch.float32, "query"),
        ((2, 17, 1, 1, 8), torch.float32, "motion"),
        ((2, 17, 1, 1, 8), torch.float32, "all"),
    ],
    ids=["tail", "queries", "motion", "means that no part has"],
)
def test_kernel_takes_long_sequences_in_parts(
    shape, dtype, kind, kernel_device, kernel_rng, monkeypatch
):
    """As it does where a head is wide; here 16 frames at a time, the last part nearly empty."""
    monkeypatch.setattr(operator, "settings", lambda *_: dict(SMALL))
    check(shape, dtype, kind, kernel_device, kernel_rng)


def test_kernel_reads_any_strides(kernel_device, kernel_rng):
    def strided(tensor):
        return (
            torch.stack([tensor, tensor], -1)[..., 0].transpose(0, 2).contiguous().transpose(0, 2)
        )

    inputs = sample((2, 5, 3, 2, 8), torch.float32, kernel_device, kernel_rng)
    every_second = [torch.stack([t, t], -1)[..., 0] for t in inputs]
    assert not any(strided(t).is_contiguous() or t.is_contiguous() for t in every_second)
    none = dict.fromkeys(NAMES)
    wanted = forward(*inputs, 2, none)
    assert torch.equal(forward(*every_second, 2, none), wanted)
    assert torch.equal(forward(*(strided(t) for t in inputs), 2, none), wanted)
    grad = inputs[0].sum(-1, keepdim=True).expand_as(inputs[0])  # a stride of 0
    for got, same in zip(
        backward(grad, *every_second, 2, none),
        backward(grad.contiguous(), *inputs, 2, none),
        strict=True,
    ):
        assert torch.equal(got, same)


def test_kernel_reaches_beyond_two_to_the_31(kernel_device, kernel_rng, tmp_path):
    """Channels so far apart that 32 bits do not hold their distance; the rest is a hole in a file.

    A distance that wraps around leads to the hole before them, not out of the process.
    """
    far = 2**29
    memory = (
        torch.from_file(str(tmp_path / "hole"), shared=True, size=9 * far, dtype=torch.float16)
        if kernel_device == "cpu"
        else torch.empty(9 * far, dtype=torch.float16, device=kernel_device)
    )
    spread = torch.as_strided(memory, (1, 2, 1, 5), (10, 1, 1, far), 4 * far)
    query, key, value = sample((1, 2, 1, 5, 1), torch.float16, kernel_device, kernel_rng)
    spread.copy_(query)
    none = dict.fromkeys(NAMES)
    wanted = forward(query, key, value, 5, none)
    assert torch.equal(forward(spread, key, value, 5, none), wanted)


@pytest.mark.parametrize(
    "gain", [0.0, 60.0, 60000.0], ids=["equal scores", "sharp", "at the limit"]
)
def test_kernel_survives_extreme_values(gain, kernel_device, kernel_rng):
    """Products of float16 reach 1e9 and more, and must not pass through float16."""
    query, key, value = sample((1, 5, 3, 1, 16), torch.float16, kernel_device, kernel_rng)
    query, key = (gain * t.sign() for t in (query, key))
    none = dict.fromkeys(NAMES)
    exact = operator.frame_attention_reference(*widen((query, key, value)), heads=1)
    wide = operator.frame_attention_reference(query, key, value, heads=1)
    got = forward(query, key, value, 1, none)
    assert_as_good_as(got, wide, exact)
    if gain < 1000:  # beyond, gradients as steep as that are not in float16
        grads = backward(value, query, key, value, 1, none)
        assert all(grad.isfinite().all() for grad in grads)
    if gain == 0:
        mean = value.float().mean(1, keepdim=True).expand(value.shape).half()
        torch.testing.assert_close(got, mean)
        assert not grads[0].any()  # keys that are zero pull no query anywhere


def test_slot_zero_is_not_read_and_a_full_share_is_the_default(kernel_device, kernel_rng):
    shape = (2, 5, 3, 2, 8)
    inputs = sample(shape, torch.float32, kernel_device, kernel_rng)
    none = dict.fromkeys(NAMES)
    bank = torch.full((2, 5, 16), float("nan"), device=kernel_device)
    own = forward(*inputs, 2, none)
    slot = torch.zeros(2, dtype=torch.int64, device=kernel_device)
    for run in (forward, lambda *args: frame_attention(*args[:3], heads=2, **args[4])):
        assert torch.equal(
            run(*inputs, 2, none | {"motion_slot": slot, "query_bank": bank}).isnan(),
            torch.zeros_like(own).bool(),
        )
    given = {"motion_slot": slot, "motion_scale": bank[:, 0, 0] / 0, "key_bank": bank}
    assert torch.equal(forward(*inputs, 2, none | given), own)
    assert frame_attention(*inputs, heads=2, **given).isfinite().all()
    row, ones = torch.tensor([1, 0], device=kernel_device), torch.ones(2, device=kernel_device)
    moved = forward(*inputs, 2, none | {"deviation_row": row, "query_row": row})
    assert not torch.equal(moved, own)
    for share in (ones, ones[:, None, None].expand(2, 5, 3)):
        full = {"deviation_row": row, "query_row": row, "deviation_blend": share}
        assert torch.equal(forward(*inputs, 2, none | full | {"query_blend": share}), moved)
        assert torch.equal(forward(*inputs, 2, none | full), moved)
        nothing = full | {"deviation_blend": 0 * share, "query_blend": 0 * share}
        assert torch.equal(forward(*inputs, 2, none | nothing), own)


@pytest.mark.parametrize("per_token", [False, True])
def test_a_full_blend_leaves_nothing_of_the_own_queries(kernel_device, kernel_rng, per_token):
    """Bit for bit, however large they are: a blend of 1 is a choice."""
    query, key, value = sample((2, 5, 3, 2, 8), torch.float32, kernel_device, kernel_rng)
    query = query * torch.tensor([1e6, 1.0], device=kernel_device)[:, None, None, None]
    row = torch.tensor([1, 1], device=kernel_device)
    share = torch.ones((2, 5, 3) if per_token else 2, device=kernel_device)
    chosen = dict.fromkeys(NAMES) | {"query_row": row}
    wanted = forward(query, key, value, 2, chosen)
    assert torch.equal(forward(query, key, value, 2, chosen | {"query_blend": share}), wanted)


@settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the device is always the same
)
@given(
    rows=st.integers(1, 3),
    frames=st.integers(1, 18),
    tokens=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_kernel_follows_permutations_and_offsets(rows, frames, tokens, seed, kernel_device):
    """Symmetries of the operator, which need no reference."""
    rng = torch.Generator().manual_seed(seed)
    inputs = [
        t.to(kernel_device) for t in sample((rows, frames, tokens, 1, 8), torch.float32, "cpu", rng)
    ]
    row = torch.randint(rows, (rows,), generator=rng).to(kernel_device)
    none = dict.fromkeys(NAMES)
    run = lambda tensors, row=row: forward(*tensors, 1, none | {"query_row": row})
    base = run(inputs)
    permutation = lambda count: torch.randperm(count, generator=rng).to(kernel_device)
    place, time = permutation(tokens), permutation(frames)
    query, key, value = inputs
    offset = torch.randn(rows, 1, tokens, 8, generator=rng)  # adds to all scores of a query alike
    offset = offset.to(kernel_device)
    # A score is rounded by its size, and its weight by as much; one of each side, query and key.
    size = 1 + (query.norm(dim=-1).max() * (key + offset).norm(dim=-1).max()).item() / 8**0.5
    error = 4 * torch.finfo(torch.float32).eps * size * (value + offset).abs().max().item()
    close = lambda got, wanted: torch.testing.assert_close(got, wanted, rtol=0, atol=error)
    close(run([t[:, :, place] for t in inputs]), base[:, :, place])
    close(run([t[:, time] for t in inputs]), base[:, time])
    order = permutation(rows)
    close(run([t[order] for t in inputs], order.argsort()[row[order]]), base[order])
    close(run([query, key + offset, value + offset]), base + offset)


def call(inputs, chosen, heads=2):
    return torch.ops.kinetiq.frame_attention(*inputs, *chosen.values(), heads)


@pytest.mark.parametrize("kind", ["none", "all"])
def test_is_a_well_formed_operator(kind, device, rng):
    shape = (2, 3, 2, 2, 4)
    inputs = [t.requires_grad_() for t in sample(shape, torch.float32, device, rng)]
    chosen = controls(kind, shape, torch.float32, device, rng)
    arguments = (*inputs, *chosen.values(), 2)
    torch.library.opcheck(torch.ops.kinetiq.frame_attention.default, arguments)
    detached = [t.detach() for t in inputs]
    arguments = (detached[0], *detached, *chosen.values(), 2)
    torch.library.opcheck(torch.ops.kinetiq.frame_attention_backward.default, arguments)


def test_operator_and_recorded_path_have_one_gradient(cpu_rng):
    """Also of blends, scales and banks; and by finite differences."""
    shape = (2, 3, 1, 2, 2)
    inputs = sample(shape, torch.float64, "cpu", cpu_rng)
    chosen = controls("all", shape, torch.float64, "cpu", cpu_rng)
    names = [name for name in NAMES if chosen[name].is_floating_point()]
    leaves = [t.requires_grad_() for t in (*inputs, *(chosen[name] for name in names))]

    def of_operator(*tensors):
        return call(tensors[:3], chosen | dict(zip(names, tensors[3:], strict=True)))

    assert torch.autograd.gradcheck(of_operator, leaves, fast_mode=True)
    grad = torch.randn(shape[0], shape[1], shape[2], 4, generator=cpu_rng, dtype=torch.float64)
    got = torch.autograd.grad(of_operator(*leaves), leaves, grad)
    recorded = torch.autograd.grad(frame_attention(*inputs, heads=2, **chosen), leaves, grad)
    for one, other in zip(got, recorded, strict=True):
        torch.testing.assert_close(one, other)


def test_slot_zero_sends_no_gradient_astray(device, rng):
    """What lies there may be NaN, and zero times that is NaN too."""
    inputs = sample((2, 3, 1, 2, 4), torch.float32, device, rng)
    bank = torch.full((2, 3, 8), float("nan"), device=device)
    bank[1] = 0.5
    scale = torch.ones(2, device=device, requires_grad=True)
    bank.requires_grad_()
    slot = torch.tensor([0, 1], device=device)
    chosen = {"motion_slot": slot, "motion_scale": scale, "query_bank": bank}
    for run in (lambda **c: frame_attention(*inputs, heads=2, **c), lambda **c: call(inputs, c)):
        out = run(**(dict.fromkeys(NAMES) | chosen))
        of_scale, of_bank = torch.autograd.grad(out.square().sum(), (scale, bank))
        assert of_scale[0] == 0 and of_scale[1].abs() > 0
        assert not of_bank[0].any() and of_bank[1].isfinite().all() and of_bank[1].any()


@pytest.mark.parametrize("name", ["query_row", "deviation_row", "motion_slot"])
def test_gradients_of_shared_rows_are_the_same_every_time(name, device, rng):
    """Two dozen readers of one row, on two threads: sums in another order differ in last bits."""
    inputs = sample((24, 4, 64, 2, 32), torch.float32, device, rng)
    chosen = {name: torch.ones(24, dtype=torch.int64, device=device)}
    if name == "motion_slot":
        chosen["value_bank"] = torch.randn(2, 4, 64, 64, generator=rng, device=device)
    leaves = [t.requires_grad_() for t in (*inputs, *chosen.values()) if t.is_floating_point()]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (
            torch.autograd.grad(frame_attention(*inputs, heads=2, **chosen).square().sum(), leaves)
            for _ in range(4)
        )
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert all(torch.equal(*pair) for pair in zip(first, other, strict=True))


def test_only_what_needs_a_gradient_has_one(cpu_rng):
    shape = (2, 3, 1, 1, 2)
    query, key, value = sample(shape, torch.float64, "cpu", cpu_rng)
    chosen = controls("query", shape, torch.float64, "cpu", cpu_rng)
    call((query, key.requires_grad_(), value), chosen, 1).sum().backward()
    assert query.grad is None and value.grad is None
    assert key.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["none", "query", "all"])
def test_a_projection_alone_may_need_a_gradient(kind, cpu_rng):
    shape = (2, 3, 2, 2, 4)
    inputs = sample(shape, torch.float64, "cpu", cpu_rng)
    chosen = controls(kind, shape, torch.float64, "cpu", cpu_rng)
    projection = torch.randn(8, 3, generator=cpu_rng, dtype=torch.float64, requires_grad=True)
    _, motion = torch.ops.kinetiq.frame_attention_with_motion(
        *inputs, projection, *chosen.values(), 2
    )
    grad = torch.randn(motion.shape, generator=cpu_rng, dtype=torch.float64)
    (got,) = torch.autograd.grad(motion, projection, grad)
    out = plain(*inputs, 2, chosen)
    torch.testing.assert_close(
        got, torch.einsum("rfpc,rfpm->cm", out - out.mean(1, keepdim=True), grad)
    )


def test_one_frame_has_no_deviation_from_its_mean(kernel_device, kernel_rng):
    """Not even a rounding error: values of far apart sizes, each off its own mean first."""
    query, key, value = sample((2, 1, 3, 2, 8), torch.float32, kernel_device, kernel_rng)
    value[1] *= 1000
    row = torch.tensor([1, 0], device=kernel_device)
    got = forward(query, key, value, 2, dict.fromkeys(NAMES) | {"deviation_row": row})
    assert torch.equal(got, value)


def test_settings_are_those_of_the_gpu_of_the_inputs(cpu_rng, monkeypatch):
    entered, asked = [], []

    @contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield
        entered.pop()

    def settings(name, key):
        asked.append(bool(entered))
        return dict(SMALL)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(operator, "settings", settings)
    kernels = ("_frame_attention_kernel", "_frame_attention_backward_kernel")
    for kernel in kernels:
        monkeypatch.setattr(operator, kernel, defaultdict(lambda: lambda *_, **__: None))
    query, key, value = sample((1, 2, 1, 1, 8), torch.float32, "cpu", cpu_rng)
    none = (None,) * len(NAMES)
    operator._launch_forward(query, key, value, none, 1, query)
    operator._launch_backward(query, query, key, value, none, 1, (query, key, value))
    assert asked == [True, True]


def with_motion(query, key, value, projection, heads, chosen):
    """Both results of the kernel, in memory that it must fill and no more."""
    (out,), memory = prefilled(query, 1)
    (motion,), more = prefilled(query.new_empty(*query.shape[:3], projection.shape[1]), 1)
    controls = tuple(chosen.values())
    operator._launch_forward(query, key, value, controls, heads, out, projection, motion)
    for filled, one in ((out, memory[0]), (motion, more[0])):
        assert (one[filled.numel() :] == SENTINEL).all()
    return out, motion


def motion_of(out, projection):
    return (out - out.mean(1, keepdim=True)) @ projection


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "channels", "kind"),
    [
        pytest.param((1, 1, 1, 1, 8), 1, "none", id="one frame does not move"),
        pytest.param((2, 5, 6, 3, 8), 5, "deviation", id="odd, another row's motion"),
        pytest.param((1, 16, 2, 1, 40), 33, "none", id="channels in two tiles"),
    ],
)
def test_kernel_returns_the_motion_of_what_it_returns(
    shape, channels, kind, dtype, kernel_device, kernel_rng
):
    query, key, value = sample(shape, dtype, kernel_device, kernel_rng)
    inputs = (query, key, value + 20)  # what does not move is large, and must not cost digits
    heads = shape[-2]
    chosen = controls(kind, shape, dtype, kernel_device, kernel_rng)
    projection = torch.randn(
        heads * shape[-1], channels, generator=kernel_rng, device=kernel_device
    ).to(dtype)
    exact = operator.frame_attention_reference(*widen(inputs), heads=heads, **widen(chosen))
    naive = plain(*inputs, heads, chosen)
    options = {name: control for name, control in chosen.items() if control is not None}
    public = frame_attention_with_motion(*inputs, projection, heads=heads, **options)
    for out, motion in (with_motion(*inputs, projection, heads, chosen), public):
        assert_as_good_as(out, naive, exact)
        wanted = motion_of(exact, projection.double())
        assert_as_good_as(motion, motion_of(naive, projection), wanted, name="motion")
        assert motion.is_contiguous()
    torch.testing.assert_close(public[1], motion_feature(public[0], projection=projection))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_gradient_of_a_projection_costs_no_digits_either(dtype, cpu_rng):
    """What is left of the values' mean over frames is as large as what moves."""
    query, key, value = sample((2, 16, 10, 2, 8), dtype, "cpu", cpu_rng)
    projection = torch.randn(16, 5, generator=cpu_rng).to(dtype).requires_grad_()
    grad = torch.randn(2, 16, 10, 5, generator=cpu_rng).to(dtype)
    none = [None] * len(NAMES)
    for still in (0, 20, 200):
        out, motion = torch.ops.kinetiq.frame_attention_with_motion(
            query, key, value + still, projection, *none, 2
        )
        (got,) = torch.autograd.grad(motion, projection, grad)
        moving = out.double() - out.double().mean(1, keepdim=True)  # all that is left to know
        wanted = moving.flatten(0, 2).mT @ grad.double().flatten(0, 2)
        terms = moving.abs().flatten(0, 2).mT @ grad.double().abs().flatten(0, 2)
        # One rounding to the type; in float32 means of what stays, and sums over all positions.
        exact = torch.finfo(torch.float32).eps
        of_means = 16 * exact * out.double().abs().max() * grad.double().abs().flatten(0, 2).sum(0)
        allowed = torch.finfo(dtype).eps * wanted.abs() + len(grad) * 160 * exact * terms + of_means
        assert ((got.double() - wanted).abs() <= allowed).all()


def test_kernel_with_motion_takes_long_sequences_in_parts(kernel_device, kernel_rng, monkeypatch):
    monkeypatch.setattr(operator, "settings", lambda *_: dict(SMALL))
    inputs = sample((1, 17, 2, 2, 8), torch.float32, kernel_device, kernel_rng)
    projection = torch.randn(16, 3, generator=kernel_rng, device=kernel_device)
    out, motion = with_motion(*inputs, projection, 2, dict.fromkeys(NAMES))
    exact = operator.frame_attention_reference(*widen(inputs), heads=2)
    naive = plain(*inputs, 2, dict.fromkeys(NAMES))
    assert_as_good_as(out, naive, exact)
    wanted = motion_of(exact, projection.double())
    assert_as_good_as(motion, motion_of(naive, projection), wanted, name="motion")


@pytest.mark.parametrize("kind", ["none", "all"])
def test_motion_has_gradients(kind, cpu_rng):
    """By finite differences, of all that can have one; and those of the recorded path."""
    shape = (2, 3, 1, 2, 2)
    inputs = [
        *sample(shape, torch.float64, "cpu", cpu_rng),
        torch.rand(4, 3, generator=cpu_rng).double(),
    ]
    chosen = controls(kind, shape, torch.float64, "cpu", cpu_rng)
    chosen = {name: control for name, control in chosen.items() if control is not None}
    names = [name for name, control in chosen.items() if control.is_floating_point()]
    leaves = [t.requires_grad_() for t in (*inputs, *(chosen[name] for name in names))]

    def of_operator(*tensors):
        given = dict.fromkeys(NAMES) | chosen | dict(zip(names, tensors[4:], strict=True))
        return torch.ops.kinetiq.frame_attention_with_motion(*tensors[:4], *given.values(), 2)

    assert torch.autograd.gradcheck(of_operator, leaves, fast_mode=True)
    recorded = frame_attention_with_motion(*inputs, heads=2, **chosen)
    weights = [torch.rand(t.shape, generator=cpu_rng).double() for t in recorded]
    results = [
        torch.autograd.grad(outs, leaves, weights) for outs in (recorded, of_operator(*leaves))
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_with_motion_is_a_well_formed_operator(device, rng):
    shape = (2, 3, 2, 2, 4)
    inputs = [t.requires_grad_() for t in sample(shape, torch.float32, device, rng)]
    inputs.append(torch.randn(8, 3, generator=rng, device=device).requires_grad_())
    chosen = controls("all", shape, torch.float32, device, rng)
    torch.library.opcheck(
        torch.ops.kinetiq.frame_attention_with_motion.default, (*inputs, *chosen.values(), 2)
    )


class Site(torch.nn.Module):
    def forward(self, query, key, value, row):
        return frame_attention(query, key, value, heads=2, query_row=row)


def test_export_keeps_one_node(cpu_rng):
    inputs = (*sample((2, 3, 4, 2, 4), torch.float32, "cpu", cpu_rng), torch.tensor([1, 1]))
    dims = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    program = torch.export.export(
        Site(), inputs, dynamic_shapes=(dims, dims, dims, {0: torch.export.Dim.AUTO})
    )
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called.count("kinetiq.frame_attention.default") == 1
    assert not [name for name in called if name.startswith("aten") and "sym" not in name]
    assert torch.equal(program.module()(*inputs), Site()(*inputs))


def test_compiles_without_a_break(cpu_rng):
    inputs = sample((2, 3, 2, 2, 4), torch.float32, "cpu", cpu_rng)
    row = torch.tensor([1, 1])
    compiled = torch.compile(Site(), fullgraph=True, backend="aot_eager")
    leaves = [[t.clone().requires_grad_() for t in inputs] for _ in range(2)]
    outs = [run(*one, row) for run, one in zip((compiled, Site()), leaves, strict=True)]
    for one in outs:
        one.square().sum().backward()
    torch.testing.assert_close(*outs)
    for one, other in zip(*leaves, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "cached", "chunks"),
    [
        ((2, 16, 9, 1, 8), 16 * 16 * 4, 3),
        ((1, 40, 5, 3, 5), 40 * 40 * 2, 8),
        ((2, 3, 7, 2, 4), 3 * 4 * 14, 1),
        ((1, 64, 3, 1, 8), 64 * 64 * 2, 2),
    ],
    ids=["a rest of one", "heads apart, scores larger than tensors", "one chunk", "many frames"],
)
def test_cpu_path_reads_in_place_whatever_the_size(
    shape, cached, chunks, dtype, cpu_rng, monkeypatch
):
    """Output and gradient, some sequences of a row at a time and the last time fewer."""
    monkeypatch.setattr(operator, "CACHED", cached)
    inputs, heads = sample(shape, dtype, "cpu", cpu_rng), shape[-2]
    if dtype == torch.float32:
        assert len(list(operator._chunks(inputs, heads))) == shape[0] * chunks
    none = dict.fromkeys(NAMES)
    exact = operator.frame_attention_reference(*widen(inputs), heads=heads)
    naive = plain(*inputs, heads, none)
    grad = torch.randn(exact.shape, generator=cpu_rng).to(dtype)
    for change in (
        lambda t: t,
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t[..., :1].expand_as(t),  # strides of 0
    ):
        g, *tensors = (change(t) for t in (grad, *inputs))
        if tensors[0].stride(-1) == 0:
            exact = operator.frame_attention_reference(*widen(tensors), heads=heads)
            naive = plain(*tensors, heads, none)
        leaves = [t.detach().requires_grad_() for t in tensors]
        got = frame_attention(*leaves, heads=heads)
        assert got.is_contiguous() and got.dtype == dtype
        assert torch.equal(got, frame_attention(*leaves, heads=heads))
        for one in (got, frame_attention(*tensors, heads=heads)):  # other chunks, other rounding
            assert_as_good_as(one, naive, exact)
        of_exact = gradients(g.double(), *widen(tensors), heads, none)
        of_naive = gradients(g, *tensors, heads, none)
        found = torch.autograd.grad(got, leaves, g)
        for name, *three in zip("qkv", found, of_naive, of_exact, strict=True):
            assert_as_good_as(*three, slack=3, name=f"gradient of {name}")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by PyTorch's own jvp
@pytest.mark.parametrize("many", [3, 64])
def test_cpu_path_can_be_transformed_and_differentiated_twice(many, cpu_rng, monkeypatch):
    monkeypatch.setattr(operator, "CACHED", 3 * 2 * 2)
    monkeypatch.setattr(operator, "_MANY", many)
    inputs = sample((2, 3, 2, 2, 2), torch.float64, "cpu", cpu_rng)
    run = lambda *tensors: frame_attention(*tensors, heads=2)
    leaves = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=False)
    assert torch.autograd.gradgradcheck(run, leaves)
    change = [torch.randn(t.shape, generator=cpu_rng, dtype=t.dtype) for t in inputs]
    plainly = lambda *tensors: plain(*tensors, 2, dict.fromkeys(NAMES))
    for got, wanted in zip(
        *(torch.func.jvp(function, inputs, tuple(change)) for function in (run, plainly)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)

    def of_row(function):
        one = lambda *tensors: function(*(t[None] for t in tensors)).square().sum()
        return torch.func.vmap(torch.func.grad(one, argnums=(0, 1, 2)))(*inputs)

    for got, wanted in zip(of_row(run), of_row(plainly), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by PyTorch's own jvp
@pytest.mark.parametrize("many", [3, 64])
@pytest.mark.parametrize("place", range(3), ids="qkv")
def test_cpu_path_can_be_transformed_in_one_of_its_inputs(place, many, cpu_rng, monkeypatch):
    """A batch of one input, or of its gradients, beside two that are no batches."""
    monkeypatch.setattr(operator, "CACHED", 3 * 2 * 2)
    monkeypatch.setattr(operator, "_MANY", many)
    inputs = sample((2, 3, 2, 2, 2), torch.float64, "cpu", cpu_rng)
    own = inputs[place]

    def of_one(function):
        return lambda t: function(*inputs[:place], t, *inputs[place + 1 :])

    run = of_one(lambda *tensors: frame_attention(*tensors, heads=2))
    plainly = of_one(lambda *tensors: plain(*tensors, 2, dict.fromkeys(NAMES)))
    wanted = torch.func.jacrev(plainly)(own)
    torch.testing.assert_close(torch.func.jacrev(run)(own), wanted)
    torch.testing.assert_close(torch.func.jacfwd(run)(own), wanted)
    got = torch.autograd.functional.jacobian(run, own, vectorize=True)
    torch.testing.assert_close(got, wanted)
    batch = torch.stack([own, 2 * own])
    torch.testing.assert_close(torch.func.vmap(run)(batch), torch.stack([run(t) for t in batch]))


def test_cpu_path_takes_a_batch_of_gradients(cpu_rng):
    leaves = [t.requires_grad_() for t in sample((2, 3, 2, 2, 2), torch.float64, "cpu", cpu_rng)]
    out = frame_attention(*leaves, heads=2)
    grads = torch.randn(2, *out.shape, generator=cpu_rng, dtype=out.dtype)
    keep = {"retain_graph": True}
    batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, **keep)
    single = [torch.autograd.grad(out, leaves, grad, **keep) for grad in grads]
    for got, *wanted in zip(batched, *single, strict=True):
        torch.testing.assert_close(got, torch.stack(wanted))


@pytest.mark.parametrize("kind", ["none", "all"])
def test_operators_can_be_differentiated_twice(kind, cpu_rng):
    shape = (2, 3, 1, 1, 2)
    chosen = controls(kind, shape, torch.float64, "cpu", cpu_rng)
    names = [
        name for name in NAMES if chosen[name] is not None and chosen[name].dtype.is_floating_point
    ]
    projection = torch.rand(2, 3, generator=cpu_rng).double()
    inputs = [*sample(shape, torch.float64, "cpu", cpu_rng), projection]
    leaves = [t.requires_grad_() for t in (*inputs, *(chosen[name] for name in names))]

    def alone(*tensors):
        return call(tensors[:3], chosen | dict(zip(names, tensors[4:], strict=True)), 1)

    def with_motion(*tensors):
        given = chosen | dict(zip(names, tensors[4:], strict=True))
        return torch.ops.kinetiq.frame_attention_with_motion(*tensors[:4], *given.values(), 1)

    assert torch.autograd.gradgradcheck(alone, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(with_motion, leaves, fast_mode=True)


def test_a_second_derivative_counts_what_inputs_owe_to_one_another_once(cpu_rng):
    query, key, value = sample((2, 3, 1, 1, 2), torch.float64, "cpu", cpu_rng)
    row = torch.tensor([1, 0])

    def penalty(run):
        leaf = query.detach().requires_grad_()
        out = run(leaf, leaf * key, value + leaf.square())
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(out.sum() + grad.square().sum(), leaf)[0]

    chosen = dict.fromkeys(NAMES) | {"query_row": row}
    got = penalty(lambda *tensors: call(tensors, chosen, 1))
    torch.testing.assert_close(got, penalty(lambda *tensors: plain(*tensors, 1, chosen)))


def test_nothing_is_kept_in_a_wider_type_but_weights(cpu_rng, monkeypatch):
    """And no gradient of the weights is made up, which would be as large as they are."""
    inputs = [t.requires_grad_() for t in sample((2, 3, 5, 2, 8), torch.float16, "cpu", cpu_rng)]
    kept, others, backward = [], [], operator._InPlace.backward

    def watch(ctx, grad, *rest):
        others.extend(rest)
        return backward(ctx, grad, *rest)

    monkeypatch.setattr(operator._InPlace, "backward", staticmethod(watch))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = frame_attention(*inputs, heads=2)
    of_inputs = [t for t in kept if t.shape == out.shape]
    assert len(of_inputs) == 3 and {t.dtype for t in of_inputs} == {torch.float16}
    out.sum().backward()
    assert others == [None] * (len(kept) - 3) != []


@pytest.mark.parametrize("run", [forward, lambda *args: call(args[:3], args[4], args[3])])
def test_a_scale_may_be_beyond_the_type(run, kernel_device, kernel_rng):
    inputs = sample((2, 3, 2, 2, 8), torch.float16, kernel_device, kernel_rng)
    make = lambda *size: torch.randn(size, generator=kernel_rng, device=kernel_device)
    banks = [1e-5 * make(2, 3, 16), 1e-5 * make(2, 3, 16), 1e-5 * make(2, 3, 2, 16)]
    chosen = dict.fromkeys(NAMES) | {
        "motion_slot": torch.tensor([1, 0], device=kernel_device),
        "motion_scale": torch.full((2,), 1e5, device=kernel_device),
        **dict(zip(NAMES[-3:], (bank.half() for bank in banks), strict=True)),
    }
    exact = operator.frame_attention_reference(*widen(inputs), heads=2, **widen(chosen))
    scaled = {name: (1e5 * chosen[name].float()).half() for name in NAMES[-3:]}
    naive = plain(*inputs, 2, chosen | scaled | {"motion_scale": None})
    assert_as_good_as(run(*inputs, 2, chosen), naive, exact)


def test_compiles_for_gpus_that_are_not_here():
    """Products on the matrix units, nothing spilled, and no more shared memory than there is."""
    requests = [
        _compile.Request(
            "frame_attention", "animatediff_64x64", forward=forward, element="fp16", target=target
        )
        for forward in (True, False)
        for target in ("sm_80", "sm_90")
    ]
    # With every control a program holds the most: where settings of their own keep it from spilling.
    requests += [
        _compile.Request("frame_attention", shape, forward=True, element=element, target=target)
        for shape, element, target in (
            ("animatediff_32x32_controlled", "fp16", "sm_90"),
            ("videocrafter2_40x64_controlled", "bf16", "sm_80"),
            ("animatediff_64x64_controlled_regional_with_motion", "bf16", "sm_90"),
        )
    ]
    accounts = list(_compile.compile_apart(requests))
    assert [account.request for account in accounts] == requests
    for account in accounts:
        assert not account.error
        assert account.spill_bytes == 0
        assert account.dots > 0 and not account.misses_matrix_units
        assert account.shared_bytes <= _compile.SHARED_LIMITS[account.request.target]
        of_head = 48 / 40 if "64x64" in account.request.shape else 1  # d of 40; of 80 and 64
        assert account.padded_work == account.padded_head_dim == of_head
        assert len(account.grid) == 1  # the other axes end at 65,535


def test_cost_counts_each_tensor_once():
    forward_cost = operator.cost(2, 3, 5, 7, 11, itemsize=2)
    assert forward_cost.bytes == 4 * (2 * 3 * 5 * 7 * 11) * 2
    assert forward_cost.flops == 2 * 5 * 7 * 2 * (2 * 3 * 3 * 11)  # sequences, products, each
    backward_cost = operator.cost(2, 3, 5, 7, 11, itemsize=2, backward=True)
    assert backward_cost.bytes == 7 * (2 * 3 * 5 * 7 * 11) * 2
    assert backward_cost.flops == 2.5 * forward_cost.flops


ZEROS = torch.zeros(2, 3, 4, 6)
ROW = torch.zeros(2, dtype=torch.int64)
BANK = torch.zeros(5, 3, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": [1]}, r"value must be a tensor, got \[1\]"),
        ({"motion_slot": ROW, "key_bank": [1]}, r"key_bank must be a tensor, got \[1\]"),
        (
            {"deviation_row": ROW, "deviation_parts": torch.ones(2, 3).long()},
            "deviation_parts must be float32, .* got torch.int64",
        ),
        ({"query": ZEROS[:, :0]}, r"at least one frame and one channel, got \[2, 0, 4, 6\]"),
        ({"motion_slot": ROW[:1], "key_bank": BANK}, r"motion_slot must be int64 \[rows = 2\]"),
        (
            {"motion_slot": ROW + 5, "key_bank": BANK},
            "motion_slot must have values from 0 to 4, got 5 to 5",
        ),
        ({"motion_slot": ROW}, "motion_slot needs query_bank, key_bank or value_bank, got motion_"),
        ({"query_bank": BANK}, "motion_scale and banks need motion_slot, got none"),
        ({"motion_scale": torch.ones(2)}, "motion_scale and banks need motion_slot, got none"),
        (
            {"motion_slot": ROW, "key_bank": BANK, "motion_scale": torch.ones(3)},
            r"motion_scale must be \[rows = 2\], got \[3\]",
        ),
        (
            {"motion_slot": ROW, "key_bank": BANK[:, :2]},
            r"key_bank must be \[slots, frames, heads \* d\] = \[slots, 3, 6\], got \[5, 2, 6\]",
        ),
        (
            {"motion_slot": ROW, "key_bank": BANK, "motion_scale": ROW},
            "motion_scale must be float32, .* got torch.int64",
        ),
        *(
            ({name: tensor.to("meta")} | more, f"{name} must be .*cpu.*, got .*meta")
            for name, tensor, more in (
                ("query_row", ROW, {}),
                ("query_blend", torch.ones(2), {"query_row": ROW}),
                ("deviation_row", ROW, {}),
                ("deviation_blend", torch.ones(2), {"deviation_row": ROW}),
                ("deviation_parts", torch.ones(2, 3), {"deviation_row": ROW}),
                ("motion_slot", ROW, {"key_bank": BANK}),
                ("motion_scale", torch.ones(2), {"motion_slot": ROW, "key_bank": BANK}),
                ("value_bank", torch.ones(5, 3, 4, 6), {"motion_slot": ROW}),
            )
        ),
        ({"motion_slot": ROW, "query_bank": BANK[:0]}, r"query_bank must be .* got \[0, 3, 6\]"),
        (
            {"motion_slot": ROW, "value_bank": BANK},
            r"value_bank must be \[slots, frames, tokens, heads \* d\] = \[slots, 3, 4, 6\], got",
        ),
        (
            {"motion_slot": ROW, "key_bank": BANK.half()},
            "key_bank must be torch.float32 on cpu like query, got torch.float16 on cpu",
        ),
    ],
)
def test_says_what_is_wrong(change, message):
    given_ = {"query": ZEROS, "key": ZEROS, "value": ZEROS, "heads": 2} | change
    with pytest.raises(kq.ShapeError, match="^frame_attention: .*" + message):
        frame_attention(**given_)


@pytest.mark.parametrize("name", ["query_row", "deviation_row", "motion_slot"])
@pytest.mark.parametrize("index", [5, -1])
def test_a_graph_on_a_cpu_is_told_of_rows_that_are_not(name, index):
    chosen = dict.fromkeys(NAMES) | {name: torch.tensor([0, index])}
    chosen["key_bank"] = BANK if name == "motion_slot" else None
    message = f"^frame_attention: {name} must have values from 0 to ., got .* to "
    with pytest.raises(kq.ShapeError, match=message):
        call((ZEROS, ZEROS, ZEROS), chosen)
    with pytest.raises(kq.ShapeError, match=message):
        torch.ops.kinetiq.frame_attention_with_motion(
            ZEROS, ZEROS, ZEROS, torch.zeros(6, 2), *chosen.values(), 2
        )


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        (torch.zeros(6), r"projection must be \[heads \* d = 6, motion channels\], got \[6\]"),
        (torch.zeros(5, 2), r"projection must be .*, got \[5, 2\]"),
        (torch.zeros(6, 0), r"projection must be .*, got \[6, 0\]"),
        (torch.zeros(6, 2).half(), "projection must be torch.float32 on cpu like query, got"),
        ([1], r"projection must be a tensor, got \[1\]"),
    ],
)
def test_says_what_is_wrong_with_a_projection(projection, message):
    with pytest.raises(kq.ShapeError, match="^frame_attention: " + message):
        frame_attention_with_motion(ZEROS, ZEROS, ZEROS, projection, heads=2)


def test_a_graph_on_a_cpu_is_told_of_a_projection_that_does_not_fit():
    message = r"^frame_attention: projection must be \[heads \* d = 6, .* got \[5, 2\]"
    with pytest.raises(kq.ShapeError, match=message):
        torch.ops.kinetiq.frame_attention_with_motion(
            ZEROS, ZEROS, ZEROS, torch.zeros(5, 2), *[None] * len(NAMES), 2
        )


def test_knows_its_controls():
    with pytest.raises(TypeError, match=r"controls must be among query_row, .*, got slot"):
        frame_attention_with_motion(ZEROS, ZEROS, ZEROS, torch.zeros(6, 2), heads=2, slot=ROW)


@pytest.mark.gpu
def test_more_programs_than_a_grid_axis_has(monkeypatch):
    """Eight clips of 512x512 with guidance, two heads, and one sequence a program: 131,104."""
    monkeypatch.setattr(operator, "settings", lambda *_: dict(SMALL))
    shape = (16, 2, 4097, 2, 8)
    blocks = operator._blocks("frame_attention", torch.empty(16, 2, 4097, 16), (), 2)
    assert 16 * 4097 * 2 / blocks["BLOCK"] > 65_535
    check(shape, torch.float16, "none", "cuda", torch.Generator("cuda").manual_seed(0))


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    query = torch.randn(1, 128, 2**15 + 1, 512, device="cuda", dtype=torch.float16)
    assert query.numel() > 2**31
    out = frame_attention(query, query, query, heads=8)
    last = query[:, :, -1:].contiguous()
    torch.testing.assert_close(out[:, :, -1:], frame_attention(last, last, last, heads=8))
    none = (None,) * len(NAMES)
    backward = torch.ops.kinetiq.frame_attention_backward
    wanted = backward(last, last, last, last, *none, 8)
    for got, alone in zip(backward(query, query, query, query, *none, 8), wanted, strict=True):
        torch.testing.assert_close(got[:, :, -1:], alone)


@pytest.mark.slow
@pytest.mark.gpu
def test_touches_no_memory_but_its_own(memory_check):
    memory_check(
        __file__,
        "kernel_agrees and odd and torch.float16 or mixes_rows and all or tails or long and motion",
    )


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "all"])
def test_is_captured_and_replayed(kind):
    """With its gradient; a wait for the GPU would be an error while a graph is captured."""
    rng, shape = torch.Generator("cuda").manual_seed(0), (2, 16, 8, 2, 40)
    inputs = [t.requires_grad_() for t in sample(shape, torch.float16, "cuda", rng)]
    chosen = controls(kind, shape, torch.float16, "cuda", rng)

    def step():
        out = frame_attention(*inputs, heads=2, **chosen)
        return out, *torch.autograd.grad(out.sum(), inputs)

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
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    "query",
    [torch.empty(1, 129, 1, 8), torch.empty(1, 1, 1, 257), torch.empty(1, 1, 1, 8).double()],
    ids=["frames", "head dim", "type"],
)
def test_says_what_the_kernel_cannot_hold(query):
    with pytest.raises(kq.ShapeError, match="at most 128 frames, d at most 256 and type float32"):
        operator._check_kernel(query, 1)
