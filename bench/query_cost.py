"""What steering costs: the denoising loop with a reference over the same loop without one.

The rows say what to expect: guidance makes two rows a clip, and one source row for the first 0.4
of the steps makes 1.20 times as many for one target, 1.05 times for four that share it.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Bench, BenchOptions, Progress
from kinetiq.bench.measure import peak_memory, time_ratio
from kinetiq.clip import Clip
from kinetiq.control_tensors import ControlTensors
from kinetiq.controls import ResolvedControls, resolve_controls
from kinetiq.denoiser import EagerDenoiser
from kinetiq.engine import Engine
from kinetiq.families import SiteKind
from kinetiq.generation import denoise
from kinetiq.motion_injection import MotionInjection
from kinetiq.motion_training import EmbeddingOptions, train_embedding
from kinetiq.query_injection import QueryInjection
from kinetiq.request import ResolvedRequest
from kinetiq.sampler import build_sampler_table
from kinetiq.source import resolve_source
from kinetiq.sprites import components
from kinetiq.sprites.cases import transfer_pairs

STEPS = 5  # 0.4 of them is exactly two
MEMORY_STEPS = 2  # the peak is that of one step, and half of two is exactly one


class Loop:
    """A denoising loop over a network with random prompts and a random reference."""

    def __init__(
        self,
        network: nn.Module,
        *,
        frames: int,
        side: int,
        text_shape: tuple[int, int],
        steps: int = STEPS,
    ) -> None:
        self.denoiser = EagerDenoiser(network).attach()
        parameter = next(network.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.shape = (4, frames, side, side)
        generator = torch.Generator().manual_seed(0)
        self.text = torch.randn(text_shape, generator=generator).to(self.device)
        pixels = np.random.default_rng(0).random((frames, 16, 16, 3), dtype=np.float32)
        self.reference = Clip.from_array(pixels)
        self.clean = torch.randn(self.shape, generator=generator).to(self.device)
        self.table = build_sampler_table("ddim", components.SCHEDULER, steps)

    def request(self, control: Any, seed: int) -> ResolvedRequest:
        """A guided clip under this control, or under none."""
        controls = ResolvedControls()
        if control is not None:
            controls = resolve_controls(
                (control,),
                lambda source: resolve_source(source, self.clean),
                self.table.steps,
                self.denoiser.sites,
            )
        _, frames, height, width = self.shape
        return ResolvedRequest(
            prompt="x",
            negative_prompt="",
            seed=seed,
            guidance_scale=7.5,
            frames=frames,
            latent_height=height,
            latent_width=width,
            fps=8.0,
            sampler=self.table,
            controls=controls,
        )

    def run(self, control: Any, clips: int = 1) -> None:
        """Sample `clips` clips together."""
        requests = [(seed, self.request(control, seed)) for seed in range(clips)]
        results = denoise(
            requests,
            self.denoiser,
            lambda _: self.text,
            channels=self.shape[0],
            device=self.device,
            dtype=self.dtype,
            max_clips=clips,
        )
        for _, latents in results:
            if not isinstance(latents, Tensor):
                raise latents

    def run_recorded(self, until: float = 0.4) -> None:
        """The usual way: a first pass records all queries by hooks, a second one injects them."""
        spatial = [s.name for s in self.denoiser.sites if s.kind is SiteKind.SPATIAL]
        modules = {n: self.denoiser.network.get_submodule(f"{n}.to_q") for n in spatial}
        cache: list[dict[str, Tensor]] = []
        sample = self.clean
        injected = round(until * self.table.steps)
        with torch.inference_mode():
            for step in range(injected):
                seen: dict[str, Tensor] = {}
                hooks = [
                    module.register_forward_hook(functools.partial(_keep, seen, name))
                    for name, module in modules.items()
                ]
                self._predict(sample[None], step)
                for hook in hooks:
                    hook.remove()
                cache.append(seen)
            for step in range(self.table.steps):
                hooks = []
                if step < injected:
                    hooks = [
                        module.register_forward_hook(functools.partial(_inject, cache[step][name]))
                        for name, module in modules.items()
                    ]
                output = self._predict(torch.stack([sample, sample]), step)
                for hook in hooks:
                    hook.remove()
                row = self.table.row(step)
                mixed = output[1].float() + 7.5 * (output[0] - output[1]).float()
                clean = row.clean_from_sample * sample + row.clean_from_output * mixed
                sample = row.next_from_sample * sample + row.next_from_clean * clean

    def _predict(self, latents: Tensor, step: int) -> Tensor:
        rows = len(latents)
        timesteps = torch.full((rows,), self.table.row(step).timestep, device=self.device)
        text = self.text[None].expand(rows, -1, -1).to(self.dtype)
        return self.denoiser.predict(latents.to(self.dtype), timesteps, text, ControlTensors())


def embedded_loop(device: str) -> Loop:
    """The embedded network's configuration with random weights."""
    torch.manual_seed(0)
    network = components.build_unet().to(device).eval().requires_grad_(False)
    text = (components.MAX_TOKENS, components.TEXT_WIDTH)
    return Loop(network, frames=components.FRAMES, side=components.SIZE // 2, text_shape=text)


def full_size_loop(device: str, frames: int = 8, side: int = 16, steps: int = STEPS) -> Loop:
    """AnimateDiff on SD 1.5 with random bf16 weights."""
    torch.manual_seed(0)
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        network = _full_size_network(device)
    finally:
        torch.set_default_dtype(former)
    network.eval().requires_grad_(False)
    return Loop(network, frames=frames, side=side, text_shape=(77, 768), steps=steps)


def _full_size_network(device: str) -> nn.Module:
    from diffusers import UNetMotionModel

    with torch.device(device):
        network: nn.Module = UNetMotionModel(cross_attention_dim=768)
    return network


def measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    """Measure the embedded network, then the full-size one."""
    figures: dict[str, Figure] = {}
    repeats = 3 if options.quick else 9
    embedded = embedded_loop(options.device)
    for name, call, baseline in progress.track(_cases(embedded), "embedded"):
        ratio = time_ratio(call, baseline, repeats=repeats, warmup=1, device=options.device)
        figures[f"query_cost.{name}"] = ratio.figure
    if options.quick:
        return figures
    figures["query_cost.times_cheaper_than_embedding"] = _times_cheaper(options.device)
    large = torch.device(options.device).type == "cuda"
    full = full_size_loop(options.device, *((16, 64) if large else (8, 16)))
    # On a CPU one loop of the full-size network takes a minute, and four targets take four.
    repeats, warmup = (9, 1) if large else (1, 0)
    for name, call, baseline in progress.track(_cases(full)[:3], "full size"):
        ratio = time_ratio(call, baseline, repeats=repeats, warmup=warmup, device=options.device)
        figures[f"query_cost.full_size.{name}"] = ratio.figure
    del full
    figures |= _memory(options.device, progress)
    return figures


def _times_cheaper(device: str) -> Figure:
    """To learn an embedding by default and generate with it, over one clip by query injection."""
    with TemporaryDirectory() as folder, Engine.load("sprites", device=device) as engine:
        pair = transfer_pairs(1)[0]
        prompt = pair.caption.text
        query = QueryInjection(pair.reference())
        engine.generate(prompt, query, steps=2)  # what happens at first use belongs to neither
        began = time.perf_counter()
        engine.generate(prompt, query)
        injected = time.perf_counter() - began
        began = time.perf_counter()
        path = Path(folder) / "motion.safetensors"
        options = EmbeddingOptions(previews=0)
        motion = train_embedding(engine, pair.reference(), prompt, path, options)
        engine.generate(prompt, motion)
        learned = time.perf_counter() - began
    return Figure(learned / injected, n=1)


def _cases(loop: Loop) -> list[tuple[str, Callable[[], None], Callable[[], None]]]:
    query, motion = QueryInjection(loop.reference, until=0.4), MotionInjection(loop.reference)
    plain = functools.partial(loop.run, None)
    four = functools.partial(loop.run, None, 4)
    return [
        ("one_target", functools.partial(loop.run, query), plain),
        ("four_targets", functools.partial(loop.run, query, 4), four),
        ("recorded", loop.run_recorded, plain),
        ("injection_one_target", functools.partial(loop.run, motion), plain),
        ("injection_four_targets", functools.partial(loop.run, motion, 4), four),
    ]


def _memory(device: str, progress: Progress) -> dict[str, Figure]:
    """Weights and what the loop adds to them, as ratios to plain sampling.

    What an interpreter and its libraries take is left out: it is no part of the method.
    """
    side = 64 if torch.device(device).type == "cuda" else 16
    prepare = functools.partial(full_size_loop, device, 16, side, MEMORY_STEPS)
    ways = {"plain": _run_plain, "query": _run_query, "recorded": _run_recorded}
    network = _full_size_network("meta")
    weights = sum(2 * parameter.numel() for parameter in network.parameters())
    peaks = {
        name: weights + peak_memory(prepare, run, device=device).growth
        for name, run in progress.track(ways.items(), "memory", len(ways))
    }
    return {
        "query_cost.peak_memory": Figure(peaks["query"] / peaks["plain"], n=1),
        "query_cost.recorded_peak_memory": Figure(peaks["recorded"] / peaks["plain"], n=1),
    }


def _run_plain(loop: Loop) -> None:
    loop.run(None)


def _run_query(loop: Loop) -> None:
    loop.run(QueryInjection(loop.reference, until=0.5))


def _run_recorded(loop: Loop) -> None:
    loop.run_recorded(until=0.5)


def _keep(seen: dict[str, Tensor], name: str, _: nn.Module, __: Any, output: Tensor) -> None:
    seen[name] = output.clone()


def _inject(queries: Tensor, _: nn.Module, __: Any, output: Tensor) -> Tensor:
    rows = len(output) // len(queries)
    return queries.repeat(rows, *([1] * (queries.ndim - 1)))


BENCH = Bench("query_cost", "time and memory of steering over plain sampling", measure)
