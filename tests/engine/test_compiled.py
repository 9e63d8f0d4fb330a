"""The compiled back end predicts what the eager one does, and compiles no more than it says.

Tracing a network takes seconds, so most tests are `traced_by_nobody`. What Dynamo really does is
asked once a family here, and of every kind and with Inductor in the tests marked slow.
"""

import gc
import itertools
import logging
import weakref
from dataclasses import fields, replace

import pytest
import tiny
import torch
from torch._dynamo import eval_frame
from torch._dynamo.utils import counters

import kinetiq as kq
from kinetiq import compiled as back_end
from kinetiq.bench.moft_cost import random_channels
from kinetiq.compiled import CompiledDenoiser
from kinetiq.control_tensors import (
    ControlTensors,
    DeviationControl,
    KeyValueControl,
    LoraBank,
    LoraControl,
    MotionControl,
    QueryControl,
    SkipControl,
    no_injection,
)
from kinetiq.denoiser import EagerDenoiser
from kinetiq.families import SiteKind
from kinetiq.generation import is_out_of_memory
from kinetiq.motion_embedding import project_bank, site_size
from kinetiq.motion_lora import lora_paths
from kinetiq.motion_training import train_embedding
from kinetiq.plan import Plan
from kinetiq.plan_inputs import KINDS, bank_axes, round_rows, round_slots
from kinetiq.prompt_keys import KEPT_PROMPTS
from kinetiq.temporal_analysis import analyze_temporal

TOLERANCE = 1e-4  # of the largest value: the project's word for "equal" in float32
SHALLOW = {  # one level: an eighth of the modules, and every kind of site and skip
    "animatediff": {
        "down_block_types": ("CrossAttnDownBlockMotion",),
        "up_block_types": ("CrossAttnUpBlockMotion",),
    },
    "unet3d": {
        "down_block_types": ("CrossAttnDownBlock3D",),
        "up_block_types": ("CrossAttnUpBlock3D",),
    },
}
SHAPES = ((3, 3, 8, 8), (2, 2, 7, 5))  # rows, frames, h, w


def shallow(family):
    return tiny.NETWORKS[family](block_out_channels=(16,), **SHALLOW[family])


def sample(rows=3, frames=3, height=8, width=8, seed=0, tokens=5):
    rng = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, 4, frames, height, width, generator=rng)
    text = torch.randn(rows, tokens, tiny.CROSS_WIDTH, generator=rng)
    return latents, 999 * torch.rand(rows, generator=rng), text


def make_controls(denoiser, shape, kinds=KINDS, seed=0, slots=2, regional=False):
    """Controls of some kinds, all of which act; other seeds have other values of one form."""
    rows, frames, height, width = shape
    rng = torch.Generator().manual_seed(seed)
    sites, network = denoiser.sites, denoiser.network
    row = no_injection(len(sites), rows)
    row[:, 0] = 1 + seed % (rows - 1)
    mask = torch.rand(rows, frames, height, width, generator=rng)
    chosen = torch.randint(1, slots, (rows,), generator=rng)
    scale = 0.5 + torch.rand(rows, generator=rng)
    banks = {}
    for index, site in enumerate(sites):
        if site.kind is SiteKind.TEMPORAL and site.place in ("up", "down"):
            h, w = site_size(network, site.name, (height, width))
            bank = torch.randn(slots, frames, h * w + 1, site.width, generator=rng)
            bank[0] = 0
            attention = network.get_submodule(site.name)
            query_key, value = bank[:, :, 0], bank[:, :, 1:]
            projected = project_bank(attention, query_key, value)
            banks[index] = replace(projected, query_key=query_key, value=value)
    loras = {}
    for path in lora_paths(network, denoiser.family, "all"):
        outs, ins = network.get_submodule(path).weight.shape
        down = torch.randn(slots, 3, ins, generator=rng) * ins**-0.5
        loras[path] = LoraBank(down, torch.randn(slots, outs, 3, generator=rng))
    skips = len(denoiser.skips)
    whole = ControlTensors(
        query=QueryControl(
            row,
            mask if regional else scale / 2,
            torch.tensor([True, False, True])[:rows] if seed % 2 else None,
        ),
        deviation=DeviationControl(
            row,
            torch.rand(len(sites), rows, generator=rng),
            torch.ones(rows, 3),
            mask if regional else None,
        ),
        motion=MotionControl(chosen, scale, banks),
        lora=LoraControl(chosen.flip(0), scale, loras),
        skip=SkipControl(
            torch.randint(0, 2, (skips, rows), generator=rng).float(),
            1 + torch.rand(skips, rows, generator=rng),
        ),
    )
    left_out = {f.name: None for f in fields(whole) if f.name in KINDS and f.name not in kinds}
    return replace(whole, **left_out)


def assert_equal(got, wanted):
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


def assert_differ(one, other):
    assert (one - other).abs().max() > 10 * TOLERANCE * other.abs().max()


def eager(denoiser, *given):
    with denoiser.eagerly(), torch.no_grad():
        return denoiser.predict(*given)


@pytest.fixture
def make(networks, family, traced_by_nobody):
    """Compiled denoisers of the tiny network, detached at the end."""
    made = []

    def attach(**options):
        made.append(CompiledDenoiser(networks[family], compiler="eager", **options).attach())
        return made[-1]

    yield attach
    for denoiser in made:
        denoiser.detach()


# What it computes.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("regional", [False, True], ids=["rows", "regions"])
def test_equals_the_eager_network_under_every_kind(make, shape, regional):
    denoiser, given = make(), sample(*shape)
    plain = eager(denoiser, *given)
    assert_equal(denoiser.predict(*given), plain)
    for kinds in [*((kind,) for kind in KINDS), KINDS, ("motion", "lora", "skip")]:
        controls = make_controls(denoiser, shape, kinds, regional=regional)
        wanted = eager(denoiser, *given, controls)
        assert_equal(denoiser.predict(*given, controls), wanted)
        assert_differ(wanted, plain)


def test_rows_that_fill_a_plan_up_have_no_say(make):
    exact, rounding = make(), None
    given = sample()
    wanted = {
        kinds: eager(exact, *given, make_controls(exact, SHAPES[0], kinds))
        for kinds in ((), *((kind,) for kind in KINDS), KINDS)
    }
    exact.detach()
    rounding = make(rows=lambda _: 5)
    for kinds, expected in wanted.items():
        controls = make_controls(rounding, SHAPES[0], kinds)
        assert_equal(rounding.predict(*given, controls), expected)
    assert all(plan.startswith("5 rows") for plan in rounding.plans)


def test_nothing_is_left_of_what_was_predicted_before(make):
    """Inputs are kept between predictions, and copied only where they changed."""
    denoiser = make(rows=lambda _: 4)
    shape = SHAPES[0]
    steady = make_controls(denoiser, shape, seed=1, slots=3)
    for seed in (1, 2, 1, 1):
        given = sample(seed=seed)
        for controls in (steady, make_controls(denoiser, shape, seed=2 * seed + 1, slots=4)):
            assert_equal(denoiser.predict(*given, controls), eager(denoiser, *given, controls))
    assert denoiser.compilations == 1
    latents, timesteps, text = given
    before = eager(denoiser, *given, steady)
    bank = next(iter(steady.motion.banks.values()))
    for tensor in (latents, timesteps, text, steady.motion.scale, bank.query_key):
        tensor.mul_(0.5)  # the very tensors, changed in place
        wanted = eager(denoiser, *given, steady)
        assert_equal(denoiser.predict(*given, steady), wanted)
        assert_differ(wanted, before)
        before = wanted


def test_tensors_of_inference_mode_are_read_anew(make):
    denoiser = make()
    with torch.inference_mode():
        given = sample()
        first = denoiser.predict(*given)
        given[0].mul_(0.5)
        assert_differ(denoiser.predict(*given), first)
        wanted = eager(denoiser, *given)
    got = denoiser.predict(*given)
    assert_equal(got, wanted)
    assert not got.is_inference()


def test_a_prediction_is_not_overwritten_by_the_next(make):
    denoiser = make(rows=lambda _: 4)
    first = denoiser.predict(*sample())
    kept = first.clone()
    denoiser.predict(*sample(seed=1))
    assert torch.equal(first, kept)


def test_bfloat16_stays_bfloat16(family, traced_by_nobody):
    denoiser = CompiledDenoiser(shallow(family).bfloat16(), compiler="eager").attach()
    latents, timesteps, text = sample()
    given = latents.bfloat16(), timesteps, text.bfloat16()
    got = denoiser.predict(*given)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, eager(denoiser, *given), rtol=0, atol=0)


# Plans.


def test_values_never_make_a_plan_and_forms_do(make):
    denoiser = make()
    shape = SHAPES[0]
    for seed in range(3):
        denoiser.predict(*sample(seed=seed), make_controls(denoiser, shape, seed=2 * seed))
    assert denoiser.compilations == 1
    latents, timesteps, text = sample()
    others = [
        (latents[:2], timesteps[:2], text[:2]),
        (latents[:, :, :2], timesteps, text),
        (latents[..., :4], timesteps, text),
        (latents, timesteps, text[:, :4]),
        (latents, timesteps.long(), text),
        (latents, timesteps, text),
    ]
    for count, given in enumerate(others, start=2):
        denoiser.predict(*given)
        denoiser.predict(*given)
        assert denoiser.compilations == count


def test_motions_are_loaded_and_mixed_without_compiling_within_a_bucket(make):
    denoiser = make()
    given, shape = sample(), SHAPES[0]

    def compile_for(kinds, slots, keep=lambda banks: banks):
        controls = make_controls(denoiser, shape, kinds, slots=slots)
        motion = replace(controls.motion, banks=keep(controls.motion.banks))
        controls = replace(controls, motion=motion)
        before = denoiser.compilations
        assert_equal(denoiser.predict(*given, controls), eager(denoiser, *given, controls))
        return denoiser.compilations - before

    def some(banks):
        return dict(list(banks.items())[1:3])

    def without_values(banks):
        return {n: replace(b, value=None, projected_value=None) for n, b in banks.items()}

    for kinds in (("motion",), ("motion", "lora")):
        assert compile_for(kinds, 2) == 1
        assert [compile_for(kinds, 2, keep) for keep in (some, without_values, some)] == [0, 0, 0]
        assert [compile_for(kinds, slots) for slots in (3, 4, 3)] == [1, 0, 0]
        assert [compile_for(kinds, slots) for slots in (5, 6, 7, 8)] == [1, 0, 0, 0]


def test_plans_share_banks_and_nothing_else(make):
    denoiser = make()
    kinds = ("motion", "lora")
    controls = [make_controls(denoiser, SHAPES[0], kinds, seed=seed) for seed in (0, 1)]

    def first_rows(whole, rows):
        cut = {
            kind: replace(control, slot=control.slot[:rows], scale=control.scale[:rows])
            for kind in kinds
            for control in [getattr(whole, kind)]
        }
        return replace(whole, **cut)

    for turn in (0, 1, 1, 0):  # so that a plan runs with what another one filled, and must not
        for rows in (3, 2):
            given, some = sample(rows), first_rows(controls[turn], rows)
            assert_equal(denoiser.predict(*given, some), eager(denoiser, *given, some))
    one, other = denoiser._plans.values()
    assert one._buffers.keys() == other._buffers.keys()
    for path, buffer in one._buffers.items():
        assert (buffer is other._buffers[path]) == bool(bank_axes(path)), path
    assert len(denoiser._banks) == sum(bool(bank_axes(path)) for path in one._buffers)
    del one, other
    denoiser._drop_plans()
    gc.collect()
    assert not denoiser._banks


def test_ranks_of_loras_have_buckets_too(make):
    denoiser = make()
    given, shape = sample(), SHAPES[0]
    for rank, count in ((3, 1), (4, 1), (2, 2)):
        controls = make_controls(denoiser, shape, ("lora",))
        banks = {
            path: LoraBank(
                torch.ones(2, rank, bank.down.shape[2]), torch.ones(2, bank.up.shape[1], rank)
            )
            for path, bank in controls.lora.banks.items()
        }
        controls = replace(controls, lora=replace(controls.lora, banks=banks))
        assert_equal(denoiser.predict(*given, controls), eager(denoiser, *given, controls))
        assert denoiser.compilations == count


def test_the_plan_that_was_not_used_for_longest_makes_room(make):
    denoiser = make(most_plans=2)
    sizes = [sample(rows) for rows in (1, 2, 3)]
    for size, count in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        denoiser.predict(*sizes[size])
        assert denoiser.compilations == count
        assert len(denoiser.plans) == min(count, 2)
    assert denoiser.plans[-1] == (
        "2 rows of 3 frames of 4x8x8 latents in torch.float32 with no controls"
    )


def test_rows_are_rounded_little_and_to_few_sizes():
    rounded = [round_rows(rows) for rows in range(1, 513)]
    assert rounded[:16] == list(range(1, 17))
    for rows, padded in enumerate(rounded, start=1):
        assert rows <= padded <= rows + rows / 8
        assert round_rows(padded) == padded
    assert len(set(rounded)) == 16 + 8 * 5  # 32, 64, 128, 256 and 512 end eight sizes each
    assert [round_slots(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]


# Prompts.


def count_projections(denoiser):
    """How many prompts the keys of the first and the values of the last site are computed for."""
    seen = []
    cross = [site for site in denoiser.sites if site.kind is SiteKind.CROSS]
    first, last = (denoiser.network.get_submodule(site.name) for site in (cross[0], cross[-1]))
    handles = [
        linear.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
        for linear in (first.to_k, last.to_v)
    ]
    return seen, handles


def test_keys_and_values_of_a_prompt_are_computed_once(make):
    denoiser = make()
    seen, handles = count_projections(denoiser)
    latents, timesteps, text = sample(rows=4)
    text = text[torch.tensor([0, 1, 0, 1])]  # two clips of one prompt, and guidance
    try:
        for step in range(5):
            denoiser.predict(latents, timesteps - step, text.clone())
        assert seen == [1, 1, 1, 1]  # two sites, two prompts, each alone
        denoiser.predict(latents[:2], timesteps[:2], text[:2])  # a clip has ended
        denoiser.predict(latents[:3], timesteps[:3], text[torch.tensor([1, 0, 1])])
        assert len(seen) == 4
        denoiser.predict(latents[:1], timesteps[:1], text[:1] + 1)
        assert len(seen) == 6
        eager(denoiser, latents, timesteps, text)
        assert seen[6:] == [4, 4]  # as the eager network does at every step
    finally:
        for handle in handles:
            handle.remove()


def test_weights_may_be_changed_in_place(family, traced_by_nobody):
    denoiser = CompiledDenoiser(shallow(family), compiler="eager").attach()
    given = sample()
    before = denoiser.predict(*given)
    cross = next(site for site in denoiser.sites if site.kind is SiteKind.CROSS)
    with torch.no_grad():
        denoiser.network.get_submodule(cross.name).to_v.weight.mul_(1.5)
    got = denoiser.predict(*given)
    assert_equal(got, eager(denoiser, *given))
    assert_differ(got, before)


def test_prompts_are_forgotten_but_for_the_last(make, monkeypatch):
    monkeypatch.setattr("kinetiq.prompt_keys.KEPT_PROMPTS", 2)
    assert KEPT_PROMPTS > 16  # rows that a batch may have prompts in
    denoiser = make()
    seen, handles = count_projections(denoiser)
    given = sample(rows=4)
    try:
        assert_equal(denoiser.predict(*given), eager(denoiser, *given))  # more than are kept
        seen.clear()
        latents, timesteps, text = given
        denoiser.predict(latents[:2], timesteps[:2], text[2:])
        assert seen == []
        denoiser.predict(latents[:2], timesteps[:2], text[:2])
        assert seen == [1] * 4
    finally:
        for handle in handles:
            handle.remove()


# What it does not do.


def test_what_cannot_be_compiled_is_refused(make):
    denoiser, given = make(), sample()
    keys = ControlTensors(key_value=KeyValueControl(torch.zeros(3, dtype=torch.int64), {}))
    with pytest.raises(
        kq.RequestError,
        match=r"^compiled: controls must be of query, deviation, motion, lora, skip, got key_value; "
        r"predict inside `eagerly\(\)`, or load the model with backend='eager'$",
    ):
        denoiser.predict(*given, keys)
    with pytest.raises(kq.RequestError, match="must be asked for predictions without gradients"):
        denoiser.predict(given[0].requires_grad_(True), *given[1:])
    weight = next(denoiser.network.parameters()).requires_grad_(True)
    try:
        with pytest.raises(kq.RequestError, match="got inputs or weights that require them"):
            denoiser.predict(*sample())
    finally:
        weight.requires_grad_(False)
    assert denoiser.compilations == 0
    with pytest.raises(kq.RequestError, match="most_plans: must be at least 1, got 0"):
        CompiledDenoiser(denoiser.network, most_plans=0)
    denoiser.detach()
    with pytest.raises(kq.RequestError, match="predict: the denoiser must be attached"):
        denoiser.predict(*sample())


def test_inputs_that_do_not_fit_each_other_are_refused(make):
    """Also where a plan would have room for them."""
    denoiser, (latents, timesteps, text) = make(rows=lambda _: 4), sample()
    with pytest.raises(
        kq.ShapeError,
        match=r"^compiled: timesteps must have a row for each of the 3 of latents, got 2$",
    ):
        denoiser.predict(latents, timesteps[:2], text)
    with pytest.raises(kq.ShapeError, match=r"prompt \d+ key must have a row for each .*, got 2$"):
        denoiser.predict(latents, timesteps, text[:2])
    other = make_controls(denoiser, (3, 2, 8, 8), ("motion",))
    with pytest.raises(
        kq.ShapeError, match=r"motion banks \d+ projected_\w+ must be \[2, 3, .* got \[2, 2, "
    ):
        denoiser.predict(latents, timesteps, text, other)


def test_training_and_analysis_are_refused(tiny_folder, reference, tmp_path, traced_by_nobody):
    with kq.Engine.load(tiny_folder("animatediff"), backend="compiled") as engine:
        with pytest.raises(kq.RequestError, match="by the back end 'eager', got CompiledDenoiser"):
            analyze_temporal(engine)
        with pytest.raises(kq.RequestError, match="by the back end 'eager', got CompiledDenoiser"):
            train_embedding(engine, reference, "a circle", tmp_path / "motion.safetensors")


def test_what_looks_into_the_network_runs_it_eagerly(make, networks, family):
    denoiser, given = make(), sample()
    rows = torch.tensor([0, 2])
    site = next(n for n, s in enumerate(denoiser.sites) if s.kind is SiteKind.SPATIAL)
    words = torch.ones(2, 5) / 5

    def look(model):
        with model.keeping([site], rows) as kept:
            model.predict(*given)
        with model.watching(rows, words, "up_blocks.1") as watched:
            model.predict(*given)
        latents = given[0].clone().requires_grad_(True)
        seen = model.features(latents, *given[1:], tap="up_blocks.1")
        (gradient,) = torch.autograd.grad(seen.square().sum(), latents)
        return kept[site].key, *watched.words.values(), watched.features, seen, gradient

    got = look(denoiser)
    assert denoiser.compilations == 0
    assert_equal(denoiser.predict(*given), eager(denoiser, *given))
    assert denoiser.compilations == 1
    denoiser.detach()
    other = EagerDenoiser(networks[family]).attach()
    wanted = look(other)
    other.detach()
    for one, two in zip(got, wanted, strict=True):
        assert torch.equal(one, two)


class NoRoom:
    """Raises as PyTorch does without memory, a number of times."""

    def __init__(self, times, wrapped=False):
        self.left, self.wrapped = times, wrapped

    def __call__(self, graph, _):
        self.left -= 1
        if self.left < 0:
            return graph
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if self.wrapped:
            raise RuntimeError("backend=mine raised") from error
        raise error


@pytest.mark.parametrize("wrapped", [False, True])
def test_without_memory_the_other_plans_go_first(networks, family, traced_by_nobody, wrapped):
    room = NoRoom(0, wrapped)
    denoiser = CompiledDenoiser(networks[family], compiler=room).attach()
    try:
        for rows in (1, 2):
            denoiser.predict(*sample(rows))
        room.left = 1
        assert_equal(denoiser.predict(*sample(3)), eager(denoiser, *sample(3)))
        assert len(denoiser.plans) == 1
        room.left = 2
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            denoiser.predict(*sample(4))
        assert denoiser.plans == ()
        room.left = 0
        assert_equal(denoiser.predict(*sample(4)), eager(denoiser, *sample(4)))
    finally:
        denoiser.detach()


def test_a_replay_without_memory_has_the_other_plans_go_first(make, monkeypatch):
    failures = [0]
    run = Plan.run

    def short(plan, inputs, rows):
        failures[0] -= 1
        if failures[0] >= 0:
            raise RuntimeError("CUDA error: out of memory")
        return run(plan, inputs, rows)

    monkeypatch.setattr(Plan, "run", short)
    denoiser = make()
    for rows in (1, 2):
        denoiser.predict(*sample(rows))
    failures[0] = 1
    assert_equal(denoiser.predict(*sample(1)), eager(denoiser, *sample(1)))
    assert denoiser.compilations == 2 and len(denoiser.plans) == 1
    failures[0] = 1
    with pytest.raises(RuntimeError, match="out of memory"):  # there is no other
        denoiser.predict(*sample(1))
    assert_equal(denoiser.predict(*sample(2)), eager(denoiser, *sample(2)))


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_memory_that_runs_out_elsewhere_is_known(said):
    assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))


def test_an_input_that_was_half_filled_is_filled_again(make, monkeypatch):
    denoiser, given = make(), sample()
    wanted = denoiser.predict(*given)
    other = [sample(seed=1)[0], *given[1:]]

    def half(buffer, path, tensor):
        buffer.zero_()
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patched:
        patched.setattr("kinetiq.plan_inputs.fill", half)
        with pytest.raises(torch.OutOfMemoryError):
            denoiser.predict(*other)
    assert_equal(denoiser.predict(*given), wanted)


def test_an_input_on_another_device_is_refused(make):
    denoiser, (latents, timesteps, text) = make(), sample()
    with pytest.raises(
        kq.RequestError,
        match=r"^compiled: timesteps must be on cpu, where the latents are, got meta; move it there",
    ):
        denoiser.predict(latents, timesteps.to("meta"), text)


def test_a_plan_that_compiles_twice_is_refused(networks, traced_by_nobody):
    denoiser = CompiledDenoiser(networks["animatediff"], compiler=lambda graph, _: graph).attach()

    def twice(graph, inputs):
        denoiser._compilations.count += 1
        return graph

    denoiser._compile = twice
    try:
        with pytest.raises(
            kq.WorkError, match=r"must compile once for 3 rows .*, compiled 2 times"
        ):
            denoiser.predict(*sample())
    finally:
        denoiser.detach()


def test_a_batch_that_does_not_fit_is_split(tiny_folder, family, traced_by_nobody, monkeypatch):
    with kq.Engine.load(tiny_folder(family)) as engine:
        requests = [
            kq.Request("a red circle", seed=seed, steps=2, frames=3, height=16, width=16)
            for seed in range(2)
        ]
        wanted = list(engine.generate_latents(requests))
    monkeypatch.setattr(back_end, "lookup_backend", lambda _: NoRoom(1))
    with kq.Engine.load(tiny_folder(family), backend="compiled") as engine:
        got = list(engine.generate_latents(requests))
        assert [plan.split(" of")[0] for plan in engine.denoiser.plans] == ["2 rows"]
    for one, other in zip(got, wanted, strict=True):
        assert_equal(one, other)


class InvalidCxxCompiler(RuntimeError):  # noqa: N818  their name
    """As Inductor's, without loading Inductor."""


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            InvalidCxxCompiler("No working C++ compiler found\nin the path"),
            kq.MissingDependencyError,
            r"^compiled: a working C\+\+ compiler must be there for 3 rows .*, got InvalidCxxCom.* or",
        ),
        (
            RuntimeError("Failed to find C compiler. Please specify via CC"),
            kq.MissingDependencyError,
            "such as g",
        ),
        (
            ValueError("no luck"),
            kq.WorkError,
            r"^compiled: the network must compile for 3 rows .*, got ValueError: no luck; load the",
        ),
        (kq.ShapeError("ours: x must be y"), kq.ShapeError, "^ours: x must be y$"),
    ],
)
def test_what_does_not_compile_is_said(networks, traced_by_nobody, error, kind, message):
    def broken(*_):
        raise error

    denoiser = CompiledDenoiser(networks["animatediff"], compiler=broken).attach()
    try:
        for _ in range(2):
            with pytest.raises(kind, match=message):
                denoiser.predict(*sample())
        assert denoiser.plans == () and denoiser.signal.prompt_keys is None
        assert denoiser.signal.controls == ControlTensors()
    finally:
        denoiser.detach()


def test_a_compiler_that_is_switched_off_is_not_passed_over(networks, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    denoiser = CompiledDenoiser(networks["animatediff"], compiler="eager").attach()
    try:
        with pytest.raises(kq.WorkError, match=r"torch.compile must be at work .* TORCHDYNAMO_DIS"):
            denoiser.predict(*sample())
    finally:
        denoiser.detach()


# The engine.


def test_an_engine_generates_the_same_clips(tiny_folder, family, reference, traced_by_nobody):
    requests = [
        kq.Request("a red circle", seed=1, steps=3),
        kq.Request("a blue square", kq.QueryInjection(reference, until=0.5), seed=2, steps=4),
        kq.Request("a ring", kq.MotionInjection(reference), seed=3, steps=2, guidance_scale=1.0),
    ]
    requests = [
        kq.Request(r.prompt, r.control, seed=r.seed, steps=r.steps, frames=4, height=16, width=16)
        for r in requests
    ]
    with kq.Engine.load(tiny_folder(family)) as engine:
        wanted = list(engine.generate_latents(requests))
    with kq.Engine.load(tiny_folder(family), backend="compiled") as engine:
        network = engine.checkpoint.unet
        got = list(engine.generate_latents(requests))
        count = engine.denoiser.compilations
        again = list(engine.generate_latents(requests))
        assert engine.denoiser.compilations == count > 1
    for one, other, repeated in zip(got, wanted, again, strict=True):
        assert_equal(one, other)
        assert torch.equal(one, repeated)
    assert not any("kinetiq" in type(module).__module__ for module in network.modules())


def test_guidance_runs_and_boards_are_refused(tiny_folder, traced_by_nobody, monkeypatch):
    monkeypatch.setattr(  # calibrated ones take half a minute
        "kinetiq.engine.load_channels",
        lambda checkpoint, *_, **__: random_channels(checkpoint.unet),
    )
    guided = kq.Request(
        "a red circle",
        kq.MoftGuidance(direction="left", step_size=0.5),
        steps=5,
        frames=4,
        height=16,
        width=16,
    )
    with kq.Engine.load(tiny_folder("animatediff")) as engine:
        (wanted,) = engine.generate_latents([guided])
        (plain,) = engine.generate_latents([replace_control(guided)])
    with kq.Engine.load(tiny_folder("animatediff"), backend="compiled") as engine:
        (got,) = engine.generate_latents([guided])
        assert engine.denoiser.compilations > 0
        board = kq.ConsistentShots("circle", [kq.Shot("a red circle"), kq.Shot("a circle")])
        with pytest.raises(
            kq.RequestError, match=r"backend must be 'eager' for ConsistentShots, .* got 'compiled'"
        ):
            engine.generate_shots(board)
    assert_equal(got, wanted)
    assert_differ(wanted, plain)


def replace_control(request):
    return kq.Request(
        request.prompt, steps=request.steps, frames=4, height=request.height, width=request.width
    )


@pytest.mark.parametrize("word", ["network", "trust"])
def test_an_exported_network_is_not_for_it(word):
    with pytest.raises(
        kq.RequestError, match=rf"load: {word} needs a backend that runs .*, got 'compiled'"
    ):
        kq.Engine.load("sprites", backend="compiled", **{word: "a"})


# Dynamo itself.


def test_dynamo_compiles_once_a_plan_and_forgets_all(family, caplog):
    network = shallow(family)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    modules = {name: id(module) for name, module in network.named_modules()}
    denoiser = CompiledDenoiser(network, compiler="eager").attach()
    known = set(eval_frame.cached_backends)
    counters.clear()
    shape = SHAPES[0]
    for seed in range(3):
        given = sample(seed=seed)
        controls = make_controls(denoiser, shape, seed=2 * seed, slots=3 + seed // 2)
        got = denoiser.predict(*given, controls)
        assert_equal(got, eager(denoiser, *given, controls))
    assert denoiser.compilations == 1
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    # One with a traceback would keep the plan.
    assert not [log.getMessage() for log in caplog.records if log.levelno >= logging.WARNING]
    (plan,) = denoiser._plans.values()
    gone = [weakref.ref(one) for one in (plan, plan._compiler, plan._buffers["latents",])]
    del plan
    assert denoiser.detach() is network
    assert {name: id(module) for name, module in network.named_modules()} == modules
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert set(eval_frame.cached_backends) <= known
    gone += [weakref.ref(denoiser), weakref.ref(network), weakref.ref(next(network.parameters()))]
    del denoiser, network, got, controls, given
    gc.collect()
    assert [one() for one in gone] == [None] * len(gone)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=["even", "odd, so that sizes are forced"])
def test_dynamo_compiles_the_network_under_every_kind(networks, family, shape):
    denoiser = CompiledDenoiser(networks[family], compiler="aot_eager").attach()
    given = sample(*shape)
    counters.clear()
    try:
        for count, kinds in enumerate([(), *((kind,) for kind in KINDS), KINDS], start=1):
            controls = make_controls(denoiser, shape, kinds, seed=1, regional=count % 2 == 0)
            for _ in range(2):
                wanted = eager(denoiser, *given, controls)
                assert_equal(denoiser.predict(*given, controls), wanted)
            assert denoiser.compilations == counters["stats"]["unique_graphs"] == count
        assert not counters["graph_break"]
    finally:
        denoiser.detach()


@pytest.mark.slow
def test_inductor_compiles_a_tiny_network(family):
    denoiser = CompiledDenoiser(shallow(family)).attach()
    for seed in range(2):
        given = sample(seed=seed)
        controls = make_controls(denoiser, SHAPES[0], seed=2 * seed)
        assert_equal(denoiser.predict(*given, controls), eager(denoiser, *given, controls))
    assert denoiser.compilations == 1


@pytest.mark.slow
def test_inductor_compiles_the_embedded_model():
    request = kq.Request("a red circle moving left on a dark blue background", seed=5, steps=4)
    with kq.Engine.load("sprites") as engine:
        (wanted,) = engine.generate_latents([request])
    with kq.Engine.load("sprites", backend="compiled") as engine:
        (got,) = engine.generate_latents([request])
        assert engine.denoiser.compilations == 1
    assert_equal(got, wanted)


# On a GPU.


def on_gpu(part):
    """A control, or a part of one, on the GPU."""
    if isinstance(part, torch.Tensor):
        return part.cuda()
    if isinstance(part, dict):
        return {key: on_gpu(value) for key, value in part.items()}
    if part is None or part == ():  # boards, which none of these has
        return part
    return replace(
        part, **{field.name: on_gpu(getattr(part, field.name)) for field in fields(part)}
    )


@pytest.mark.gpu
def test_graphs_with_controls_are_replayed_on_a_gpu(family):
    """Filled up, evicted and made again, in turn in one pool, and with tensors changed in place."""
    network = shallow(family)
    source = EagerDenoiser(network).attach()
    made = {
        (kinds, seed): make_controls(source, SHAPES[0], kinds, seed=seed)
        for kinds in [(), *((kind,) for kind in KINDS), KINDS]
        for seed in (1, 3)
    }
    source.detach()
    made = {key: on_gpu(controls) for key, controls in made.items()}
    network.cuda()
    denoiser = CompiledDenoiser(network, compiler="eager", rows=lambda _: 5).attach()
    samples = {seed: [tensor.cuda() for tensor in sample(seed=seed)] for seed in (1, 3)}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for _ in range(2):  # the second time plans are replayed after each other
            for (_, seed), controls in made.items():
                wanted = eager(denoiser, *samples[seed], controls)
                assert_equal(denoiser.predict(*samples[seed], controls), wanted)
        assert denoiser.compilations == len(made) // 2
        controls, given = made[KINDS, 1], samples[1]
        bank = next(iter(controls.motion.banks.values()))
        before = eager(denoiser, *given, controls)
        for tensor in (given[0], bank.query_key):
            tensor.mul_(0.5)
            wanted = eager(denoiser, *given, controls)
            assert_equal(denoiser.predict(*given, controls), wanted)
            assert_differ(wanted, before)
            before = wanted
        with torch.inference_mode():
            assert_equal(denoiser.predict(*given, controls), wanted)
    denoiser.detach()
    small = CompiledDenoiser(network, compiler="eager", most_plans=1).attach()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for kinds in ((), ("query",), ()):
            controls = made[kinds, 1]
            wanted = eager(small, *given, controls)
            assert_equal(small.predict(*given, controls), wanted)
        assert small.compilations == 3 and len(small.plans) == 1
    small.detach()


@pytest.mark.gpu
def test_graphs_are_replayed_on_a_gpu(family):
    denoiser = CompiledDenoiser(shallow(family).cuda(), compiler="eager").attach()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for seed, rows in itertools.product(range(3), (2, 3)):
            given = [tensor.cuda() for tensor in sample(rows, seed=seed)]
            got = denoiser.predict(*given)
            assert torch.equal(got, denoiser.predict(*given))
            assert_equal(got, eager(denoiser, *given))
        assert denoiser.compilations == 2
        assert all(plan._captured is not None for plan in denoiser._plans.values())
    denoiser.detach()
