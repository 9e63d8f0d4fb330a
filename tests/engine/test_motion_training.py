"""Motions are learned, and nothing else: gradients, losses, memory, interruptions, files."""

import dataclasses
import json
import signal
import stat
import subprocess
import sys
import types
from contextlib import ExitStack, contextmanager, nullcontext
from typing import ClassVar

import attrs
import numpy as np
import pytest
import tiny
import torch
from closeness import assert_as_good_as
from safetensors.torch import save_file
from stock import predict_stock
from torch.utils._python_dispatch import TorchDispatchMode

import kinetiq as kq
from kinetiq import motion_training, recomputation
from kinetiq.clip import Clip
from kinetiq.control_tensors import ControlTensors, LoraBank, LoraControl, SkipControl
from kinetiq.denoiser import NO_CONTROLS, EagerDenoiser
from kinetiq.errors import (
    CheckpointError,
    ClipError,
    OutputError,
    RequestError,
    TrainingError,
)
from kinetiq.families import SiteKind
from kinetiq.motion_embedding import MotionEmbedding
from kinetiq.motion_file import MotionInfo
from kinetiq.motion_lora import MotionLora, lora_paths, resolve_motion_lora
from kinetiq.motion_losses import LOSSES, Diffusion, mean_squared_error, motion_loss
from kinetiq.motion_training import (
    CachedClip,
    EmbeddingLearner,
    EmbeddingOptions,
    LoraLearner,
    LoraOptions,
    LossScale,
    Spatial,
    StepDraw,
    block_of,
    choose_blocks,
    draw_step,
    frames_go_around,
    measure_blocks,
    motion_step,
    named_parameters,
    train_embedding,
    train_lora,
)
from kinetiq.recomputation import Recomputation
from kinetiq.spatial_lora import Adapter, Bypass, draw_low_rank, spatial_linears

FRAMES = 3
DIFFUSION = Diffusion(torch.linspace(0.999, 0.01, 1000), "epsilon")


@pytest.fixture
def double(family):
    return EagerDenoiser(tiny.NETWORKS[family]().double()).attach()


def clip_of(dtype=torch.float32, frames=FRAMES, height=8, width=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    latents = torch.randn(4, frames, height, width, generator=rng)
    return CachedClip(latents.to(dtype), torch.randn(5, tiny.CROSS_WIDTH, generator=rng).to(dtype))


def draw_of(given, **changes):
    rng = torch.Generator().manual_seed(9)
    noise = torch.randn(given.latents.shape, generator=rng)
    draw = StepDraw(0, 400, noise, anchor=1, frame=2, with_spatial=True, seed=5)
    return dataclasses.replace(draw, **changes)


@pytest.fixture
def at_the_end():
    """Callbacks that take out of a network what a test put in."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def embedding_learner(at_the_end):
    def make(denoiser, clip, sites=(), seed=None):
        """With `seed`, not at zero."""
        blocks = measure_blocks(denoiser, choose_blocks(denoiser.sites, sites), clip)
        learner = EmbeddingLearner(denoiser, blocks, clip.latents.shape[1], clip.latents.device)
        at_the_end.callback(learner.close)
        return perturbed(learner, clip, seed)

    return make


@pytest.fixture
def lora_learner(at_the_end):
    def make(denoiser, clip, target="k", seed=None, **highway):
        """With `seed`, not at zero."""
        paths = lora_paths(denoiser.network, denoiser.family, target)
        generator = torch.Generator().manual_seed(0)
        learner = LoraLearner(denoiser, paths, 2, 0.0, generator, **highway)
        at_the_end.callback(learner.close)
        return perturbed(learner, clip, seed)

    return make


def perturbed(learner, clip, seed):
    for number, parameter in enumerate(learner.parameters.values()):
        parameter.data = parameter.data.to(clip.latents.dtype)
        if seed is not None:
            rng = torch.Generator().manual_seed(seed + number)
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=rng)
    return learner


@pytest.fixture(params=["embedding", "lora"])
def make_learner(request):
    return request.getfixturevalue(f"{request.param}_learner")


@pytest.fixture
def spatial_of(at_the_end):
    def make(denoiser, clips=1):
        """Adapters that are not at zero."""
        network, paths = denoiser.network, spatial_linears(denoiser.network, denoiser.family)
        generator = torch.Generator().manual_seed(3)
        weights = tuple(draw_low_rank(network, paths, 2, generator) for _ in range(clips))
        dtype = next(network.parameters()).dtype
        for one in weights:
            for low in one.values():
                low.down.data = low.down.data.to(dtype)
                low.up.data = 0.3 * torch.randn(low.up.shape, generator=generator).to(dtype)
        adapter = Adapter(network, paths)
        at_the_end.callback(adapter.detach)
        return Spatial(adapter, weights)

    return make


def step(denoiser, learner, clip, draw=None, **options):
    return motion_step(denoiser, DIFFUSION, learner, clip, draw or draw_of(clip), **options)


def predict(denoiser, clip, draw, controls, frames=slice(None)):
    noised = DIFFUSION.noise(clip.latents, draw.noise.to(clip.latents), draw.timestep)
    timestep = torch.tensor([draw.timestep])
    return denoiser.predict(noised[None, :, frames], timestep, clip.text[None], controls)


class TestTheMotionAlone:
    def test_untrained_it_changes_nothing(self, denoiser, make_learner):
        clip = clip_of()
        learner = make_learner(denoiser, clip)
        base = predict(denoiser, clip, draw_of(clip), NO_CONTROLS)
        with torch.no_grad(), learner.acting():
            moved = predict(denoiser, clip, draw_of(clip), learner.controls())
        learner.close()
        assert torch.equal(base, moved)

    def test_only_the_motion_gets_gradients_and_nothing_is_changed(
        self, denoiser, make_learner, spatial_of
    ):
        clip = clip_of()
        learner, spatial = make_learner(denoiser, clip, seed=1), spatial_of(denoiser)
        before = {name: value.clone() for name, value in denoiser.network.state_dict().items()}
        motion = {name: value.detach().clone() for name, value in learner.parameters.items()}
        found = step(denoiser, learner, clip, spatial=spatial)
        assert [g.shape for g in found.gradients] == [p.shape for p in motion.values()]
        assert all(gradient.any() for gradient in found.gradients)
        trained = named_parameters(spatial.weights[0])
        assert [g.shape for g in found.spatial_gradients] == [p.shape for p in trained.values()]
        assert all(gradient.any() for gradient in found.spatial_gradients)
        for parameter in (*denoiser.network.parameters(), *learner.parameters.values()):
            assert parameter.grad is None
        assert not any(p.requires_grad for p in denoiser.network.parameters())
        assert all(torch.equal(motion[n], value) for n, value in learner.parameters.items())
        learner.close()
        spatial.adapter.detach()
        after = denoiser.network.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_before_the_first_trained_layer_there_is_no_graph(
        self, denoiser, embedding_learner, spatial_of, at_the_end
    ):
        """A spatial adapter that stands there must not begin one."""
        clip, seen = clip_of(), {}
        learner, spatial = embedding_learner(denoiser, clip, ("up_blocks.2",)), spatial_of(denoiser)
        for name in ("down_blocks.0", "up_blocks.1", "up_blocks.2"):
            handle = denoiser.network.get_submodule(name).register_forward_hook(
                lambda _, __, out, name=name: seen.setdefault(name, []).append(
                    (out[0] if isinstance(out, tuple) else out).requires_grad
                )
            )
            at_the_end.callback(handle.remove)
        step(denoiser, learner, clip, spatial=spatial)
        # Single frames first, for the adapters; then the clip, for the motion.
        assert seen["down_blocks.0"] == seen["up_blocks.1"] == [True, False]
        assert seen["up_blocks.2"] == [True, True]

    def test_the_spatial_pass_sees_one_frame_without_the_motion(
        self, denoiser, make_learner, spatial_of, at_the_end
    ):
        clip, seen = clip_of(), []
        learner, spatial = make_learner(denoiser, clip, seed=1), spatial_of(denoiser)
        handle = denoiser.network.register_forward_pre_hook(
            lambda _, given: seen.append(given[0].shape[2])
        )
        at_the_end.callback(handle.remove)
        found = step(denoiser, learner, clip, spatial=spatial)
        handle.remove()
        assert seen == [1, FRAMES]
        learner.close()
        draw = draw_of(clip)
        with torch.no_grad(), spatial.adapter.acting(spatial.weights[0]):
            guess = predict(denoiser, clip, draw, NO_CONTROLS, slice(2, 3))
        wanted = mean_squared_error(guess, draw.noise[None, :, 2:3])
        assert found.spatial_loss == pytest.approx(wanted.item(), rel=1e-5)

    def test_a_step_without_the_adapter_is_as_if_there_were_none(
        self, denoiser, make_learner, spatial_of
    ):
        clip = clip_of()
        learner = make_learner(denoiser, clip, seed=1)
        alone = step(denoiser, learner, clip)
        spatial = spatial_of(denoiser)
        skipped = step(denoiser, learner, clip, draw_of(clip, with_spatial=False), spatial=spatial)
        assert skipped.spatial_loss is None and skipped.spatial_gradients == ()
        assert torch.equal(skipped.loss, alone.loss)
        assert all(map(torch.equal, skipped.gradients, alone.gradients))
        assert not torch.equal(step(denoiser, learner, clip, spatial=spatial).loss, alone.loss)

    def test_each_reference_has_its_own_adapter(self, networks, embedding_learner, spatial_of):
        denoiser = EagerDenoiser(networks["animatediff"]).attach()
        clip = clip_of()
        learner, spatial = embedding_learner(denoiser, clip), spatial_of(denoiser, clips=2)
        losses = {
            step(denoiser, learner, clip, draw_of(clip, clip=number), spatial=spatial).loss.item()
            for number in (0, 1)
        }
        spatial.adapter.detach()
        denoiser.detach()
        assert len(losses) == 2


class TestGradients:
    @pytest.mark.parametrize("part", ["motion", "spatial"])
    def test_are_those_of_finite_differences(self, double, make_learner, part, spatial_of):
        """Along a direction in all tensors at once."""
        clip = clip_of(torch.float64)
        learner, spatial = make_learner(double, clip, seed=1), spatial_of(double)

        def run():
            return step(double, learner, clip, spatial=spatial)

        found = run()
        if part == "motion":
            parameters, gradients = learner.parameters, found.gradients
            value = lambda: run().loss
        else:
            parameters = named_parameters(spatial.weights[0])
            gradients, value = found.spatial_gradients, lambda: run().spatial_loss
        rng = torch.Generator().manual_seed(0)
        directions = [
            torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
            for parameter in parameters.values()
        ]
        ends = []
        for size in (1e-5, -1e-5):
            for parameter, direction in zip(parameters.values(), directions, strict=True):
                parameter.data += size * direction
            ends.append(value().item())
            for parameter, direction in zip(parameters.values(), directions, strict=True):
                parameter.data -= size * direction
        slope = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)

    @pytest.mark.parametrize("loss", LOSSES)
    def test_equal_the_recipe_written_the_plain_way(self, double, make_learner, loss, spatial_of):
        """One graph over both passes, spatial adapters recorded throughout, as it was released."""
        denoiser, clip = double, clip_of(torch.float64)
        draw = draw_of(clip)
        learner, spatial = make_learner(denoiser, clip, seed=1), spatial_of(denoiser)
        adapters = list(named_parameters(spatial.weights[0]).values())
        motion = list(learner.parameters.values())
        target = draw.noise[None].double()
        with spatial.adapter.acting(spatial.weights[0]):
            one = predict(denoiser, clip, draw, NO_CONTROLS, slice(2, 3))
            spatial_loss = mean_squared_error(one, target[:, :, 2:3])
            with learner.acting():
                value = motion_loss(
                    loss, predict(denoiser, clip, draw, learner.controls()), target, 1
                )
        wanted = torch.autograd.grad(value, motion, retain_graph=True)
        spatial_wanted = torch.autograd.grad(spatial_loss, adapters)
        found = step(denoiser, learner, clip, loss=loss, spatial=spatial)
        assert_close([found.loss, *found.gradients], [value, *wanted])
        assert_close(
            [found.spatial_loss, *found.spatial_gradients], [spatial_loss, *spatial_wanted]
        )

    def test_a_lora_by_hooks_is_the_one_that_the_bank_applies(self, denoiser, lora_learner):
        clip = clip_of()
        draw = draw_of(clip)
        learner = lora_learner(denoiser, clip, "all", seed=1)
        weights = learner._weights
        with torch.no_grad(), learner.acting():
            got = predict(denoiser, clip, draw, learner.controls())
        one = torch.ones(1)
        banks = {
            path: LoraBank(*(torch.stack([torch.zeros_like(part), part]) for part in low))
            for path, low in weights.items()
        }
        controls = ControlTensors(lora=LoraControl(one.long(), one, banks))
        with torch.no_grad():
            wanted = predict(denoiser, clip, draw, controls)
        base = predict(denoiser, clip, draw, NO_CONTROLS)
        assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        assert (got - base).abs().max() > 0.01 * wanted.abs().max()

    def test_the_loss_goes_down_on_a_fixed_batch(self, denoiser, make_learner):
        clip = clip_of()
        learner = make_learner(denoiser, clip)
        optimizer = torch.optim.AdamW(list(learner.parameters.values()), lr=0.02)
        losses = []
        for _ in range(12):
            found = step(denoiser, learner, clip)
            for parameter, gradient in zip(
                learner.parameters.values(), found.gradients, strict=True
            ):
                parameter.grad = gradient
            optimizer.step()
            losses.append(found.loss.item())
        assert losses[-1] < 0.97 * losses[0]

    def test_in_bfloat16_they_are_those_of_bfloat16(self, networks, embedding_learner):
        denoiser = EagerDenoiser(networks["animatediff"]).attach()
        clip = clip_of()
        learner = embedding_learner(denoiser, clip, seed=1)
        wide, narrow = (
            step(denoiser, learner, clip),
            step(denoiser, learner, clip, autocast=torch.bfloat16),
        )
        network = denoiser.detach()
        plain_loss, plain = plain_bfloat16(network, learner, clip, draw_of(clip))
        assert_as_good_as(narrow.loss, plain_loss, wide.loss)
        assert not torch.equal(narrow.loss, wide.loss)
        assert {gradient.dtype for gradient in narrow.gradients} == {torch.float32}
        for name, mine, its, exact in zip(
            learner.parameters, narrow.gradients, plain, wide.gradients, strict=True
        ):
            error, allowed = (float((got - exact).norm()) for got in (mine, its))
            assert 0 < error <= 3 * allowed, name

    def test_a_loss_scale_changes_nothing_but_what_the_backward_pass_sees(
        self, networks, embedding_learner, spatial_of
    ):
        denoiser = EagerDenoiser(networks["animatediff"]).attach()
        clip = clip_of()
        learner, spatial = embedding_learner(denoiser, clip, seed=1), spatial_of(denoiser)
        plain = step(denoiser, learner, clip, spatial=spatial)
        scaled = step(denoiser, learner, clip, spatial=spatial, loss_scale=2.0**10)
        spatial.adapter.detach()
        denoiser.detach()
        assert torch.equal(scaled.loss, plain.loss)
        assert_close(scaled.gradients, plain.gradients)
        assert_close(scaled.spatial_gradients, plain.spatial_gradients)


class TestRecomputation:
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_finds_the_same_gradients(self, denoiser, make_learner, dropout, spatial_of):
        clip = clip_of()
        learner, spatial = make_learner(denoiser, clip, seed=1), spatial_of(denoiser)
        spatial.adapter._dropout = dropout
        plain = step(denoiser, learner, clip, spatial=spatial)
        names = [name for name, _ in denoiser.network.named_modules()]
        again = step(
            denoiser,
            learner,
            clip,
            spatial=spatial,
            recomputation=Recomputation(denoiser, learner.trained),
        )
        assert [name for name, _ in denoiser.network.named_modules()] == names
        assert torch.equal(again.loss, plain.loss)
        assert all(map(torch.equal, again.gradients, plain.gradients))
        assert all(map(torch.equal, again.spatial_gradients, plain.spatial_gradients))

    def test_computes_cheap_results_again_and_costly_ones_once(
        self, denoiser, monkeypatch, embedding_learner
    ):
        monkeypatch.setattr(recomputation, "KEPT_FROM", 100)
        clip = clip_of()
        learner = embedding_learner(denoiser, clip, seed=1)
        counts = []
        for options in ({}, {"recomputation": Recomputation(denoiser, learner.trained)}):
            with Count() as count:
                step(denoiser, learner, clip, **options)
            counts.append(count.calls)
        plain, again = counts
        convolution, norm = "aten.convolution.default", "aten.native_group_norm.default"
        wide = [c for c in plain if c[0] == convolution and c[1] >= 100]
        assert wide and all(again[call] == plain[call] for call in wide)
        assert again[norm, 0] > plain[norm, 0]

    def test_work_is_counted_for_each_element(self):
        rows, aten, ours = torch.empty(2, 3, 5, 8), torch.ops.aten, torch.ops.kinetiq
        matrix = torch.empty(4, 6)
        for operator, given, wanted in (
            (aten.mm.default, (matrix, matrix.T), 6),
            (aten.addmm.default, (torch.empty(4), matrix, matrix.T), 6),
            (aten.bmm.default, (matrix[None], matrix.T[None]), 6),
            (aten.convolution.default, (None, torch.empty(7, 5, 3, 3)), 45),
            (aten._scaled_dot_product_flash_attention_for_cpu.default, (rows, rows, rows), 10),
            (ours.query_attention.default, (rows, rows, rows), 10),
            (ours.frame_attention.default, (rows, rows, rows), 6),
            (aten.silu.default, (rows,), 0),
            (aten.native_group_norm.default, (rows,), 0),
        ):
            assert recomputation.work_an_element(operator, given) == wanted, operator

    def test_keeps_less(self, denoiser, embedding_learner):
        """Bytes that the graph holds when the forward pass has ended."""
        clip = clip_of()
        learner = embedding_learner(denoiser, clip, seed=1)
        held = []
        for active in (False, True):
            seen = {}

            def pack(tensor, seen=seen):
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            recompute = Recomputation(denoiser, learner.trained)
            with (
                torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
                recompute.active() if active else nullcontext(),
            ):
                predict(denoiser, clip, draw_of(clip), learner.controls())
            held.append(sum(seen.values()))
        assert held[1] < 0.5 * held[0]

    def test_leaves_other_passes_alone(self, denoiser):
        clip = clip_of()
        base = predict(denoiser, clip, draw_of(clip), NO_CONTROLS)
        trained = [site.name for site in denoiser.sites if site.kind is SiteKind.TEMPORAL]
        with torch.no_grad(), Recomputation(denoiser, trained).active():
            assert torch.equal(predict(denoiser, clip, draw_of(clip), NO_CONTROLS), base)
        assert torch.equal(predict(denoiser, clip, draw_of(clip), NO_CONTROLS), base)


class TestHighway:
    HIGHWAY: ClassVar = {"highway": "all", "beta": 1.3}

    def test_a_lora_is_trained_as_it_is_applied_with_it(self, denoiser, lora_learner):
        clip = clip_of()
        learner = lora_learner(denoiser, clip, "all", seed=1, **self.HIGHWAY)
        made = learner.export(MotionInfo(**INFO, family=denoiser.family.name), None)
        assert {"highway": made.highway, "beta": made.beta} == self.HIGHWAY
        resolved = resolve_motion_lora(
            made, denoiser.network, denoiser.family, denoiser.skips, steps=1
        )
        one = torch.ones(1)
        banks = {
            path: LoraBank(behind_zeros(bank.down), behind_zeros(bank.up))
            for path, bank in resolved.banks.items()
        }
        skip = SkipControl(
            *(torch.tensor(v)[:, None] for v in (resolved.highway.source, resolved.highway.gain))
        )
        controls = ControlTensors(lora=LoraControl(one.long(), one, banks), skip=skip)
        draw = draw_of(clip)
        with torch.no_grad():
            guess = predict(denoiser, clip, draw, controls)
        wanted = motion_loss("hybrid", guess, draw.noise[None], 1)
        found = step(denoiser, learner, clip)
        learner.close()
        plain = lora_learner(denoiser, clip, "all", seed=1)
        without = step(denoiser, plain, clip)
        plain.close()
        assert found.loss == pytest.approx(wanted.item(), rel=1e-4)
        assert without.loss != pytest.approx(wanted.item(), rel=1e-2)

    @pytest.mark.parametrize("autocast", [None, torch.bfloat16])
    @pytest.mark.parametrize("which", ["all", "released"])
    def test_recomputation_finds_the_same_gradients(self, denoiser, which, autocast, lora_learner):
        clip = clip_of()
        learner = lora_learner(denoiser, clip, "all", seed=1, highway=which)
        plain = step(denoiser, learner, clip, autocast=autocast)
        recompute = Recomputation(denoiser, learner.trained)
        again = step(denoiser, learner, clip, autocast=autocast, recomputation=recompute)
        assert torch.equal(again.loss, plain.loss)
        assert all(map(torch.equal, again.gradients, plain.gradients))
        assert denoiser.signal.before_temporal == {}

    def test_gradients_are_those_of_finite_differences(self, double, lora_learner):
        clip = clip_of(torch.float64)
        learner = lora_learner(double, clip, "all", seed=1, **self.HIGHWAY)
        found = step(double, learner, clip)
        rng = torch.Generator().manual_seed(0)
        slope, ends = 0.0, []
        directions = [
            torch.randn(p.shape, generator=rng, dtype=torch.float64)
            for p in learner.parameters.values()
        ]
        for gradient, direction in zip(found.gradients, directions, strict=True):
            slope += (gradient * direction).sum().item()
        for size in (1e-5, -2e-5):
            for parameter, direction in zip(learner.parameters.values(), directions, strict=True):
                parameter.data += size * direction
            ends.append(step(double, learner, clip).loss.item())
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4)

    def test_previews_and_what_is_made_have_it(self, animatediff, tmp_path, monkeypatch):
        shown, real = [], kq.Engine.generate

        def generate(self, prompt, motion, **options):
            shown.append((motion.highway, motion.beta))
            return real(self, prompt, motion, steps=1, **options)

        monkeypatch.setattr(kq.Engine, "generate", generate)
        options = LoraOptions(**{**SMALL, "previews": 4}, recompute=True, **self.HIGHWAY)
        out = tmp_path / "a.safetensors"
        made = train_lora(animatediff, [reference()], ["a panda"], out, options)
        assert shown == [("all", 1.3)] == [(made.highway, made.beta)]
        with pytest.raises(CheckpointError, match="holds a run with highway 'all' instead of None"):
            train_lora(animatediff, [reference()], ["a panda"], out, LoraOptions(**SMALL))

    def test_a_network_without_such_skips_leaves_no_folder(
        self, animatediff, tmp_path, monkeypatch
    ):
        bare = tuple(s for s in animatediff.denoiser.skips if s.temporal is None)
        monkeypatch.setattr(animatediff.denoiser, "skips", bare)
        options = LoraOptions(**SMALL, highway="all")
        with pytest.raises(RequestError, match="highway: 'all' needs a skip connection behind"):
            train_lora(animatediff, [reference()], ["a"], tmp_path / "a.safetensors", options)
        assert not any(tmp_path.iterdir())


class TestSites:
    def test_default_is_down_and_up_at_the_greatest_width(self, denoiser):
        chosen = choose_blocks(denoiser.sites, ())
        temporal = [site for site in denoiser.sites if site.kind is SiteKind.TEMPORAL]
        widest = max(site.width for site in temporal if site.place in ("down", "up"))
        wanted = [
            block_of(site.name)
            for site in temporal
            if site.width == widest and site.place in ("down", "up")
        ]
        assert chosen == tuple(dict.fromkeys(wanted)) and chosen

    def test_by_place_and_width_or_by_name(self, denoiser):
        narrow = choose_blocks(denoiser.sites, (("down", 16), "up_blocks.2"))
        assert narrow and all(name.startswith(("down_blocks.0", "up_blocks.2")) for name in narrow)
        attention = next(s.name for s in denoiser.sites if s.kind is SiteKind.TEMPORAL)
        assert choose_blocks(denoiser.sites, (attention,)) == (block_of(attention),)

    @pytest.mark.parametrize("wanted", [("down", 17), "up_blocks.7", ("left", 16)])
    def test_a_site_that_is_not_there_is_named_with_those_that_are(self, denoiser, wanted):
        with pytest.raises(RequestError, match=r"sites: must be among down:16, .*got .*"):
            choose_blocks(denoiser.sites, (wanted,))

    def test_token_sizes_are_those_of_a_dry_run_also_where_levels_round_up(
        self, denoiser, embedding_learner
    ):
        clip = clip_of(height=12, width=4)
        blocks = choose_blocks(denoiser.sites, ("down_blocks", "up_blocks"))
        sizes = measure_blocks(denoiser, blocks, clip)
        assert sizes[blocks[0]] == (12, 4) and set(sizes) == set(blocks)
        assert {(12, 4), (6, 2)} <= set(sizes.values())
        learner = embedding_learner(denoiser, clip, ("down_blocks", "up_blocks"))
        for name, parameter in learner.parameters.items():
            part, _, path = name.partition(".")
            if part == "value":
                assert parameter.shape[:3] == (FRAMES, *sizes[block_of(path)])
            else:
                assert parameter.shape[:1] == (FRAMES,) and parameter.ndim == 2
            assert not parameter.any()
        assert all(gradient.any() for gradient in step(denoiser, learner, clip).gradients)


class TestDraws:
    def test_follow_from_seed_and_step_alone(self):
        clips = [clip_of(), clip_of(seed=1)]
        one, same = (draw_step(7, 3, clips, 1000, 0.2) for _ in "ab")
        torch.manual_seed(1)
        assert torch.equal(one.noise, same.noise)
        other = draw_step(7, 4, clips, 1000, 0.2)
        assert not torch.equal(one.noise, other.noise)

    def test_are_uniform(self):
        clips = [clip_of(frames=2, height=1, width=1), clip_of(frames=2, height=1, width=1)]
        draws = [draw_step(0, step, clips, 1000, 0.2) for step in range(2000)]
        timesteps = np.array([draw.timestep for draw in draws])
        counts = np.histogram(timesteps, bins=10, range=(0, 1000))[0]
        assert counts.min() > 140 and counts.max() < 260  # 200 each, four standard deviations
        for share, wanted in (
            (np.mean([draw.clip for draw in draws]), 0.5),
            (np.mean([draw.anchor for draw in draws]), 0.5),
            (np.mean([draw.frame for draw in draws]), 0.5),
            (np.mean([draw.with_spatial for draw in draws]), 0.8),
        ):
            assert share == pytest.approx(wanted, abs=0.045)
        noise = torch.stack([draw.noise for draw in draws])
        assert noise.std() == pytest.approx(1, rel=0.03)


def test_single_frames_go_the_way_that_the_network_knows_them(networks):
    """Told by what each way makes of them, whichever is nearer to the noise."""
    denoiser = EagerDenoiser(networks["animatediff"]).attach()
    clip = clip_of()
    bypass = Bypass(denoiser.network, denoiser.family)
    through = denoiser.predict
    known = {"around": False}

    def guess(latents, timesteps, text, controls=NO_CONTROLS):
        out = through(latents, timesteps, text, controls)
        is_around = any(type(m).__name__ == "_Unchanged" for m in denoiser.network.modules())
        return out if is_around == known["around"] else out + 100

    denoiser.predict = guess
    for known["around"] in (False, True):
        assert frames_go_around(denoiser, DIFFUSION, [clip], bypass, 0) is known["around"]
    denoiser.detach()


def test_the_loss_scale_halves_on_overflow_and_doubles_after_a_long_while():
    scale = LossScale(2.0**16)
    assert scale.after(False) == LossScale(2.0**15)
    for _ in range(1999):
        scale = scale.after(True)
    assert scale.value == 2.0**16
    assert scale.after(True) == LossScale(2.0**17)
    assert scale.after(False) == LossScale(2.0**15)


def plain_bfloat16(network, learner, clip, draw):
    """Loss and gradients by stock modules under autocast, the embedding added by hooks."""
    parameters, target = learner.parameters, draw.noise[None]

    def add(embedding):
        return lambda _, given: (given[0] + embedding, *given[1:])

    with ExitStack() as stack:
        for name in learner.trained:
            query_key = parameters[f"query_key.{block_of(name)}"]  # [frames, C], for all tokens
            value = parameters[f"value.{name}"].flatten(1, 2).transpose(0, 1)
            added = {"to_q": query_key, "to_k": query_key, "to_v": value}
            for projection, embedding in added.items():
                module = network.get_submodule(f"{name}.{projection}")
                stack.callback(module.register_forward_pre_hook(add(embedding)).remove)
        noised = DIFFUSION.noise(clip.latents[None], target, draw.timestep)
        with torch.autocast("cpu", torch.bfloat16):
            guess = predict_stock(network, "animatediff", noised, draw.timestep, clip.text[None])
        loss = motion_loss("hybrid", guess.float(), target, draw.anchor)
        return loss.detach(), torch.autograd.grad(loss, list(parameters.values()))


class Count(TorchDispatchMode):
    """Calls of each operator, convolutions by the multiplications of an element."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        key = (name, args[1][0].numel() if name == "aten.convolution.default" else 0)
        self.calls[key] = self.calls.get(key, 0) + 1
        return func(*args, **(kwargs or {}))


INFO = {"kind": "lora", "frames": FRAMES, "height": 8, "width": 8}


def behind_zeros(bank):
    return torch.cat([torch.zeros_like(bank), bank])


def assert_close(got, wanted):
    """Up to rounding that grew through a network."""
    for mine, other in zip(got, wanted, strict=True):
        assert (mine - other).abs().max() <= 1e3 * torch.finfo(other.dtype).eps * other.abs().max()


SMALL = {
    "steps": 4,
    "frames": 3,
    "inversion_steps": 2,
    "save_every": 2,
    "previews": 0,
    "spatial_rank": 2,
}


@pytest.fixture(scope="module", params=tiny.NETWORKS)
def engine(request, tiny_folder):
    with kq.Engine.load(tiny_folder(request.param)) as made:
        yield made


@pytest.fixture
def animatediff(tiny_folder):
    with kq.Engine.load(tiny_folder("animatediff")) as made:
        yield made


SEVERAL = {name: value for name, value in SMALL.items() if name != "inversion_steps"}


def reference(frames=5, seed=0):
    rng = np.random.default_rng(seed)
    return Clip(rng.integers(0, 256, (frames, 20, 16, 3), dtype=np.uint8), 8.0)


def tensors_of(motion):
    if isinstance(motion, MotionEmbedding):
        parts = {"query_key": motion.query_key, "value": motion.value}
    else:
        parts = {"down": motion.down, "up": motion.up}
    named = {f"{part}.{n}": value for part, of in parts.items() for n, value in of.items()}
    return named if motion.noise is None else {**named, "noise": motion.noise}


def assert_same(one, other):
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys() and one.info == other.info
    assert all(torch.equal(first[name], second[name]) for name in first)


KILLED = """
import json, os, pathlib, signal, sys
import numpy as np
import kinetiq as kq
from kinetiq.motion_training import EmbeddingOptions, train_embedding
folder, out, file, time, options = sys.argv[1:]
left, replace = int(time), pathlib.Path.replace
def dying(self, target):
    global left
    left -= pathlib.Path(target).name == file
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
pathlib.Path.replace = dying
frames = np.random.default_rng(0).integers(0, 256, (5, 20, 16, 3), dtype=np.uint8)
with kq.Engine.load(folder) as engine:
    reference = kq.Clip(frames, 8.0)
    train_embedding(engine, reference, "a panda", pathlib.Path(out), EmbeddingOptions(**json.loads(options)))
"""
CLIP = Clip(np.zeros((3, 16, 16, 3), np.uint8), 8.0)


class Killed(Exception):  # noqa: N818  stands for a signal
    pass


def kill_at(step):
    def progress(stage, done, total):
        if (stage, done) == ("training", step):
            raise Killed

    return progress


class TestRuns:
    def test_an_embedding_is_learned_and_written_with_what_it_is(
        self, engine, tmp_path, monkeypatch
    ):
        shown, real = [], kq.Engine.generate

        def generate(self, prompt, motion, **options):
            shown.append((prompt, motion, options))
            return real(self, prompt, motion, steps=2, **options)

        monkeypatch.setattr(kq.Engine, "generate", generate)
        out, before = tmp_path / "dance.safetensors", engine.checkpoint.unet.state_dict()
        before = {name: value.clone() for name, value in before.items()}
        lines = []
        made = train_embedding(
            engine,
            reference(),
            "a dancing panda",
            out,
            EmbeddingOptions(**{**SMALL, "previews": 2, "preview_prompt": "a dancing bear"}),
            report=lines.append,
        )
        assert_same(made, MotionEmbedding.read(out))
        family = engine.family.name
        clip = reference().resample(3).resize(16, 16)
        assert attrs.asdict(made.info) == {
            "kind": "embedding",
            "family": family,
            "frames": 3,
            "height": 8,
            "width": 8,
            "checkpoint": engine.checkpoint.name,
            "loss": "hybrid",
            "steps": 4,
            "prompt": "a dancing panda",
            "reference": clip.fingerprint,
            "version": kq.__version__,
            "target": "",
            "rank": 0,
            "sites": tuple(sorted(choose_blocks(engine.denoiser.sites, ()))),
        }
        blocks = choose_blocks(engine.denoiser.sites, ())
        assert tuple(made.query_key) == blocks
        assert set(made.value) == {f"{b}.{a}" for b in blocks for a in ("attn1", "attn2")}
        assert all(tensor.any() for tensor in tensors_of(made).values())
        assert made.noise.shape == (4, 3, 8, 8)
        folder = tmp_path / "dance.training"
        early = MotionEmbedding.read(folder / "step-000002.safetensors")
        assert early.info == attrs.evolve(made.info, steps=2)
        assert (early.query_key[blocks[0]] != made.query_key[blocks[0]]).any()
        assert [motion.info.steps for _, motion, _ in shown] == [2, 4]
        assert_same(shown[0][1], early)
        for prompt, _, asked in shown:
            assert prompt == "a dancing bear"
            assert (asked["frames"], asked["height"], asked["seed"]) == (3, None, 0)
        assert Clip.read(folder / "step-000002.gif").num_frames == 3
        assert [line.step for line in lines] == [2, 4]
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert log == [dataclasses.asdict(line) for line in lines]
        assert all(line.loss > 0 and line.loss_scale == 1 for line in lines)
        assert all(line.leads_around in (False, True) for line in lines)
        after = engine.checkpoint.unet.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert not any(m._forward_hooks for m in engine.checkpoint.unet.modules())

    def test_a_lora_of_several_clips(self, engine, tmp_path):
        out = tmp_path / "jump.safetensors"
        options = LoraOptions(**{**SEVERAL, "steps": 6}, target="k_out", rank=3, seed=4)
        clips = [reference(), reference(seed=1)]
        made = train_lora(engine, clips, ["a jumping frog", "a jumping cat"], out, options)
        assert_same(made, MotionLora.read(out))
        paths = lora_paths(engine.checkpoint.unet, engine.family, "k_out")
        assert tuple(made.down) == tuple(made.up) == paths
        assert {low.shape[0] for low in made.down.values()} == {3}
        assert all(tensor.any() for tensor in made.up.values())
        assert (made.info.kind, made.info.steps) == ("lora", 6)
        assert (made.info.target, made.info.rank) == ("k_out", 3)
        assert made.noise is None  # it would be that of one of them
        assert made.info.prompt == "a jumping frog | a jumping cat"
        assert len(made.info.reference) == 64 != clips[0].fingerprint
        seen = {draw_step(4, step, [clip_of(), clip_of()], 1000, 0.2).clip for step in range(6)}
        assert seen == {0, 1}  # both were learned from

    @pytest.mark.parametrize("kill", [1, 2, 3])
    def test_a_killed_run_continues_to_the_same_bits(
        self, animatediff, tmp_path, kill, monkeypatch
    ):
        options = EmbeddingOptions(**SMALL)
        given = (animatediff, reference(), "a panda")
        whole = train_embedding(*given, tmp_path / "whole.safetensors", options)
        cut = tmp_path / "cut.safetensors"
        with pytest.raises(Killed):
            train_embedding(*given, cut, options, progress=kill_at(kill))
        assert not cut.exists()
        # What was cached is not computed again.
        monkeypatch.setattr(motion_training, "invert", None)
        monkeypatch.setattr(kq.Engine, "encode", None)
        again = train_embedding(*given, cut, options)
        assert_same(again, whole)
        first, second = (
            motion_training._read_tensors(tmp_path / f"{name}.training" / "state.safetensors")[0]
            for name in ("whole", "cut")
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize(
        ("file", "time"),
        [("cache.safetensors", 1), ("state.safetensors", 2), ("killed.safetensors", 1)],
    )
    def test_a_run_that_a_signal_killed_continues_to_the_same_bits(
        self, animatediff, tiny_folder, tmp_path, file, time
    ):
        """SIGKILL, which nothing can catch, when a file is whole and has not yet its name."""
        options = EmbeddingOptions(**SMALL)
        out = tmp_path / "killed.safetensors"
        given = [str(tiny_folder("animatediff")), str(out), file, str(time), json.dumps(SMALL)]
        done = subprocess.run(
            [sys.executable, "-c", KILLED, *given], check=False, cwd="/", capture_output=True
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not out.exists()
        again = train_embedding(animatediff, reference(), "a panda", out, options)
        whole = tmp_path / "whole.safetensors"
        assert_same(again, train_embedding(animatediff, reference(), "a panda", whole, options))
        log = (tmp_path / "killed.training" / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in log] == [2, 4]

    def test_a_killed_lora_continues_to_the_same_bits(self, animatediff, tmp_path):
        options = LoraOptions(**SEVERAL, dropout=0.1)
        given = (animatediff, [reference(), reference(seed=1)], ["a panda", "a cat"])
        whole = train_lora(*given, tmp_path / "whole.safetensors", options)
        cut = tmp_path / "cut.safetensors"
        with pytest.raises(Killed):
            train_lora(*given, cut, options, progress=kill_at(3))
        assert_same(train_lora(*given, cut, options), whole)

    def test_a_finished_run_can_go_further(self, animatediff, tmp_path):
        out = tmp_path / "a.safetensors"
        given = (animatediff, reference(), "a panda")
        short = EmbeddingOptions(**{**SMALL, "steps": 2})
        train_embedding(*given, out, short)
        further = train_embedding(*given, out, dataclasses.replace(short, steps=4))
        straight = train_embedding(
            *given, tmp_path / "b.safetensors", dataclasses.replace(short, steps=4)
        )
        assert_same(further, straight)

    def test_what_a_lora_was_trained_with_is_what_previews_and_files_use(
        self, animatediff, tmp_path, monkeypatch
    ):
        shown = []
        monkeypatch.setattr(
            kq.Engine, "generate", lambda *given, **_: shown.append(given[2]) or CLIP
        )
        out = tmp_path / "a.safetensors"
        options = LoraOptions(**{**SMALL, "previews": 4}, highway="all", beta=1.3)
        made = train_lora(animatediff, [reference()], ["a panda"], out, options)
        read = MotionLora.read(out)
        assert read == made == shown[0]
        assert (read.highway, read.beta, read.info.target, read.info.rank) == ("all", 1.3, "k", 32)

    @pytest.mark.parametrize(
        ("name", "change"), [("kinetiq", "0.0.1"), ("device", "a GPU"), ("kinetiq", None)]
    )
    def test_what_else_decides_bits_is_said_where_it_differs(
        self, animatediff, tmp_path, name, change
    ):
        given = (animatediff, reference(), "a panda", tmp_path / "a.safetensors")
        train_embedding(*given, EmbeddingOptions(**{**SMALL, "steps": 1}))
        path = tmp_path / "a.training" / "options.json"
        said = json.loads(path.read_text())
        assert said["kinetiq"] == kq.__version__ and said["device"] == "cpu"
        del said[name]  # as in a folder of an earlier version
        path.write_text(json.dumps({**said, **({} if change is None else {name: change})}))
        message = f"was begun with {name} '{change}', now '.*': it goes on, and may come to other"
        expected = (
            nullcontext() if change is None else pytest.warns(kq.KinetiqWarning, match=message)
        )
        with expected:
            train_embedding(*given, EmbeddingOptions(**{**SMALL, "steps": 2}))
        assert json.loads(path.read_text())["kinetiq"] == kq.__version__

    def test_the_way_of_single_frames_is_kept(self, animatediff, tmp_path, monkeypatch):
        given = (animatediff, reference(), "a panda", tmp_path / "a.safetensors")
        lines = []
        for steps, found in ((1, True), (2, False)):
            monkeypatch.setattr(motion_training, "frames_go_around", lambda *_, found=found: found)
            options = EmbeddingOptions(**{**SMALL, "steps": steps})
            train_embedding(*given, options, report=lines.append)
        assert [line.leads_around for line in lines] == [True, True]
        said = json.loads((tmp_path / "a.training" / "options.json").read_text())
        assert said["leads_around"] is True

    def test_what_only_encodes_leaves_a_gpu_while_the_motion_is_learned(self):
        class Part:
            def __init__(self):
                self.places = []

            def to(self, device):
                self.places.append(str(device))

        parts = Part(), Part()
        checkpoint = types.SimpleNamespace(
            vae=parts[0], text_encoder=parts[1], device=torch.device("cuda", 0)
        )
        with motion_training._set_aside(types.SimpleNamespace(checkpoint=checkpoint)):
            assert all(part.places == ["cpu"] for part in parts)
        assert all(part.places == ["cpu", "cuda:0"] for part in parts)

    def test_recomputation_learns_the_same(self, animatediff, tmp_path):
        given = (animatediff, reference(), "a panda")
        made = [
            train_embedding(
                *given, tmp_path / f"{r}.safetensors", EmbeddingOptions(**SMALL, recompute=r)
            )
            for r in (False, True)
        ]
        assert_same(*made)

    @pytest.mark.parametrize("what", ["loss", "spatial loss", "norm of the gradient"])
    def test_what_is_not_finite_stops_the_run(self, animatediff, tmp_path, monkeypatch, what):
        real, calls = motion_training.motion_step, []

        def broken(*given, **options):
            calls.append(1)
            found = real(*given, **options)
            if len(calls) < 3:
                return found
            bad = torch.tensor(float("nan"))
            if what == "norm of the gradient":
                return dataclasses.replace(found, gradients=tuple(g * bad for g in found.gradients))
            return dataclasses.replace(found, **{what.replace(" ", "_"): bad})

        monkeypatch.setattr(motion_training, "motion_step", broken)
        out = tmp_path / "a.safetensors"
        message = (
            rf"train: the {what} must be finite, got nan at step 3 of 4; try a learning_rate below "
            "0.02$"
        )
        with pytest.raises(TrainingError, match=message):
            train_embedding(animatediff, reference(), "a panda", out, EmbeddingOptions(**SMALL))
        assert not out.exists()
        assert not any(m._forward_hooks for m in animatediff.checkpoint.unet.modules())
        monkeypatch.undo()
        options = EmbeddingOptions(**SMALL)
        assert train_embedding(animatediff, reference(), "a panda", out, options)  # goes on


class TestFolders:
    def run(self, engine, out, **options):
        options = EmbeddingOptions(**{**SMALL, **options})
        return train_embedding(engine, reference(), "a panda", out, options)

    @pytest.mark.parametrize("file_mode", [0o022], indirect=True, ids=["umask 022"])
    def test_files_have_the_permissions_of_any_new_file(self, animatediff, tmp_path, file_mode):
        self.run(animatediff, tmp_path / "a.safetensors", steps=1)
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        assert {"a.safetensors", "state.safetensors", "cache.safetensors"} <= {
            file.name for file in files
        }
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {file_mode}

    def test_steps_are_not_taken_back(self, animatediff, tmp_path):
        out, state = tmp_path / "a.safetensors", tmp_path / "a.training" / "state.safetensors"
        self.run(animatediff, out)
        before = {p: p.read_bytes() for p in (out, state, state.with_name("options.json"))}
        message = r"steps must be at least 4, which the run in .* has taken, got 3; .*step-NNNNNN\."
        with pytest.raises(RequestError, match=message):
            self.run(animatediff, out, steps=3)
        assert all(path.read_bytes() == content for path, content in before.items())
        assert self.run(animatediff, out).info.steps == 4

    def test_what_is_refused_leaves_no_folder(self, animatediff, tmp_path, monkeypatch):
        out = tmp_path / "a.safetensors"
        with pytest.raises(RequestError, match="sites: must be among"):
            self.run(animatediff, out, sites=("up_blocks.7",))
        with pytest.raises(RequestError, match="float32 or bfloat16 on a CPU, got float16"):
            self.run(animatediff, out, dtype="float16")

        def unknown(*_):
            raise RequestError("noise schedule: must have betas")

        monkeypatch.setattr(motion_training, "read_diffusion", unknown)
        with pytest.raises(RequestError, match="noise schedule"):
            self.run(animatediff, out)
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("content", ["[]", "null", "3"])
    def test_options_of_another_form(self, animatediff, tmp_path, content):
        path = tmp_path / "a.training" / "options.json"
        path.parent.mkdir()
        path.write_text(content)
        with pytest.raises(CheckpointError, match=r"options.json must hold .* as a JSON object"):
            self.run(animatediff, tmp_path / "a.safetensors")
        assert path.read_text() == content

    @pytest.mark.parametrize("said", [None, {"step": "2", "seconds": "1", "loss_scale": "x"}])
    def test_a_state_that_does_not_say_how_far_it_is(self, animatediff, tmp_path, said):
        out = tmp_path / "a.safetensors"
        self.run(animatediff, out, steps=1)
        path = tmp_path / "a.training" / "state.safetensors"
        tensors, _ = motion_training._read_tensors(path)
        save_file(tensors, path, metadata=said)
        with pytest.raises(CheckpointError, match=r"metadata of .* must say how far the run was"):
            self.run(animatediff, out, steps=1)

    def test_the_log_has_each_save_once_wherever_a_run_was_killed(
        self, animatediff, tmp_path, monkeypatch
    ):
        out, log = tmp_path / "a.safetensors", tmp_path / "a.training" / "log.jsonl"

        def steps():
            return [json.loads(line)["step"] for line in log.read_text().splitlines()]

        real = motion_training.replacing

        @contextmanager
        def killed(path, *given):
            if path.name == "state.safetensors" and steps() == [1, 2]:
                raise Killed
            with real(path, *given) as temporary:
                yield temporary

        monkeypatch.setattr(motion_training, "replacing", killed)
        with pytest.raises(Killed):  # between the log and the state
            self.run(animatediff, out, save_every=1)
        monkeypatch.undo()
        self.run(animatediff, out, save_every=1, steps=2)
        assert steps() == [1, 2]
        with log.open("a") as file:
            file.write('{"step": 3, "lo')  # in the midst of a line
        self.run(animatediff, out, save_every=1)
        assert steps() == [1, 2, 3, 4]

    def test_a_log_that_is_none(self, animatediff, tmp_path):
        out, log = tmp_path / "a.safetensors", tmp_path / "a.training" / "log.jsonl"
        self.run(animatediff, out, steps=1)
        log.write_text("hello\n")
        with pytest.raises(CheckpointError, match=r"log.jsonl must hold one JSON object with a st"):
            self.run(animatediff, out, steps=2)


class TestRefusals:
    @pytest.mark.parametrize("seed", [0, 255])
    def test_a_reference_that_does_not_move(self, animatediff, tmp_path, seed):
        still = Clip(np.full((8, 16, 16, 3), seed, dtype=np.uint8), 8.0)
        options = LoraOptions(**SEVERAL)
        clips = [reference(), still]
        message = r"train: reference 2 must move, and all of its 3 frames at 16x16 are the same"
        with pytest.raises(ClipError, match=message):
            train_lora(animatediff, clips, ["a", "b"], tmp_path / "a.safetensors", options)
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"loss": "mse", "spatial_rank": 3}, "spatial_rank 3 acts with the loss 'hybrid', got"),
            ({"loss": "vmc", "spatial_learning_rate": 1e-3}, r"spatial_learning_rate 0\.001 acts"),
            (
                {"loss": "debiased", "spatial_skip": 0.5},
                r"spatial_skip 0\.5 acts with the loss 'hy",
            ),
            ({"previews": 0, "preview_prompt": "a"}, "preview_prompt 'a' acts with previews, and"),
        ],
    )
    def test_options_that_change_nothing(self, options, message):
        for kind in (EmbeddingOptions, LoraOptions):
            with pytest.raises(RequestError, match=f"train: {message}"):
                kind(**options)

    def test_dropout_needs_something_low_rank(self):
        with pytest.raises(RequestError, match=r"dropout 0\.5 acts with the loss 'hybrid', got 'm"):
            EmbeddingOptions(loss="mse", dropout=0.5)
        assert LoraOptions(loss="mse", dropout=0.5).dropout == 0.5

    def test_steps_of_an_inversion_that_is_not_made(self, animatediff, tmp_path):
        clips = [reference(), reference(seed=1)]
        with pytest.raises(RequestError, match="inversion_steps 2 acts with one reference, got 2"):
            train_lora(animatediff, clips, "ab", tmp_path / "a.safetensors", LoraOptions(**SMALL))
        assert not any(tmp_path.iterdir())

    def test_a_reference_that_is_too_short(self, animatediff, tmp_path):
        message = r"reference 1 must have at least 6 frames.*got 5; .* ask for --frames 5"
        with pytest.raises(ClipError, match=message):
            train_embedding(
                animatediff,
                reference(),
                "a panda",
                tmp_path / "a.safetensors",
                EmbeddingOptions(**{**SMALL, "frames": 6}),
            )
        assert not any(tmp_path.iterdir())

    def test_another_run_in_the_folder(self, animatediff, tmp_path):
        out = tmp_path / "a.safetensors"
        given = (animatediff, reference(), "a panda")
        options = EmbeddingOptions(**{**SMALL, "steps": 1})
        train_embedding(*given, out, options)
        with pytest.raises(CheckpointError, match="holds a run with seed 0 instead of 1"):
            train_embedding(*given, out, dataclasses.replace(options, seed=1))
        with pytest.raises(CheckpointError, match="references"):
            train_embedding(animatediff, reference(seed=3), "a panda", out, options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"loss": "l1"}, "loss must be one of hybrid, debiased, mse, vmc, got 'l1'"),
            ({"steps": 0}, "steps must be a whole number from 1 to 1000000, got 0"),
            ({"learning_rate": 0}, "learning_rate must be a number above 0 to 10, got 0"),
            ({"learning_rate": float("nan")}, "learning_rate must be a number .* got nan"),
            ({"dtype": "float64"}, "dtype must be float32, bfloat16 or float16, got 'float64'"),
            ({"dropout": 1.0}, "dropout must be a number from 0 to 0.99, got 1.0"),
            ({"spatial_skip": -0.1}, "spatial_skip must be a number from 0 to 1, got -0.1"),
            ({"seed": -1}, "seed must be a whole number"),
        ],
    )
    def test_options_without_a_meaning(self, options, message):
        for kind in (EmbeddingOptions, LoraOptions):
            with pytest.raises(RequestError, match=f"train: {message}"):
                kind(**options)

    def test_options_of_a_lora(self):
        with pytest.raises(RequestError, match=r"target must be one of k, .*got 'w'"):
            LoraOptions(target="w")
        with pytest.raises(RequestError, match="rank must be a whole number from 1 to 1024"):
            LoraOptions(rank=0)
        with pytest.raises(RequestError, match="highway must be one of all, released, or none"):
            LoraOptions(highway="some")
        with pytest.raises(RequestError, match="beta must be a number from 0 to inf, got -1"):
            LoraOptions(highway="all", beta=-1)
        with pytest.raises(
            RequestError, match=r"train: beta acts with a highway, got 1\.2 without"
        ):
            LoraOptions(beta=1.2)

    def test_what_does_not_fit_the_model(self, animatediff, tmp_path):
        out = tmp_path / "a.safetensors"

        def run(error, message, *, prompt="a panda", where=out, **options):
            with pytest.raises(error, match=message):
                train_embedding(
                    animatediff,
                    reference(),
                    prompt,
                    where,
                    EmbeddingOptions(**{**SMALL, **options}),
                )

        run(RequestError, "height: must be a multiple of 2", height=15)
        run(RequestError, "frames: must be at least 2 for a motion, got 1", frames=1)
        run(RequestError, "prompt: must hold at least one word", prompt=" ")
        run(RequestError, "out must end in .safetensors", where=tmp_path / "a.pt")
        run(OutputError, "the folder .* must exist", where=tmp_path / "no" / "a.safetensors")
        run(RequestError, "float32 or bfloat16 on a CPU, got float16", dtype="float16")
        assert not any(tmp_path.glob("*.safetensors"))
        with pytest.raises(RequestError, match="a prompt for each, got 2 references and 1 prompts"):
            train_lora(animatediff, [reference()] * 2, ["a panda"], out)


@pytest.mark.parametrize("autocast", [torch.float16, None], ids=["autocast", "weights"])
def test_overflow_in_float16_skips_the_step_and_halves_the_scale(
    animatediff, tmp_path, monkeypatch, autocast
):
    """float16 itself needs a GPU; what is done about overflow does not."""
    real, scales = motion_training.motion_step, []

    def overflowing(*given, loss_scale, **options):
        scales.append(loss_scale)
        found = real(*given, **{**options, "autocast": None}, loss_scale=1.0)
        if loss_scale < 2.0**15:
            return found
        return dataclasses.replace(found, gradients=tuple(g / 0 for g in found.gradients))

    monkeypatch.setattr(motion_training, "motion_step", overflowing)
    monkeypatch.setattr(motion_training, "_autocast", lambda *_: autocast)
    out, lines = tmp_path / "a.safetensors", []
    options = EmbeddingOptions(**{**SMALL, "save_every": 1, "dtype": "float16"})
    train_embedding(animatediff, reference(), "a panda", out, options, report=lines.append)
    assert scales == [2.0**16, 2.0**15, 2.0**14, 2.0**14]
    assert [line.loss is None for line in lines] == [True, True, False, False]
    assert [line.loss_scale for line in lines] == [2.0**15, 2.0**14, 2.0**14, 2.0**14]
    monkeypatch.setattr(motion_training, "_FIRST_LOSS_SCALE", 1.0)
    monkeypatch.setattr(
        motion_training,
        "motion_step",
        lambda *g, **o: dataclasses.replace(
            real(*g, **{**o, "autocast": None}),
            gradients=tuple(torch.full_like(p, float("inf")) for p in g[2].parameters.values()),
        ),
    )
    with pytest.raises(TrainingError, match=r"overflow at step 1 .* train with dtype bfloat16"):
        train_embedding(animatediff, reference(), "a panda", tmp_path / "b.safetensors", options)
