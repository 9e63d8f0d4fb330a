"""The back end "compiled": predictions by plans of fixed shape, each compiled once.

Values of controls, prompts, timesteps, seeds and motions never compile anything; another number of
rows, size, type, number of frames, length of prompts or set of kinds of control does, once. See
`kinetiq.plan_inputs` for how shapes are rounded, and `kinetiq.plan` for how a plan runs.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._dynamo import lookup_backend

from kinetiq.control_tensors import ControlTensors, KeyValueBank
from kinetiq.denoiser import NO_CONTROLS, EagerDenoiser, Watched
from kinetiq.errors import RequestError
from kinetiq.families import SiteKind
from kinetiq.generation import is_out_of_memory
from kinetiq.motion_embedding import site_size
from kinetiq.plan import Compilations, Compile, Compiler, Plan
from kinetiq.plan_inputs import (
    KINDS,
    Form,
    Forms,
    MotionSite,
    Path,
    PlanInput,
    bank_axes,
    list_forms,
    list_inputs,
    round_rows,
)
from kinetiq.profiling import span
from kinetiq.prompt_keys import PromptKeys

MOST_PLANS = 16
_log = logging.getLogger(__name__)


class CompiledDenoiser(EagerDenoiser):
    """A diffusers network whose predictions are compiled, and on a GPU captured in CUDA graphs.

    `features`, and `predict` inside `keeping`, `watching` or `eagerly`, look into the network or
    are differentiated, and run it as `EagerDenoiser` does; all other predictions run a plan or fail
    with words. Keys and values of prompts are computed once a prompt.

    Weights are not to be replaced while it is attached, as with `EagerDenoiser`; they may be
    changed in place. It is not for several threads at a time.

    Args:
        network: of a supported family.
        compiler: name of a back end of torch.compile, or a function that is one.
        most_plans: plans that are kept; the one that was not used for longest makes room.
        rows: rounds a number of rows up to that of a plan.
    """

    def __init__(
        self,
        network: Any,
        *,
        compiler: str | Compile = "inductor",
        most_plans: int = MOST_PLANS,
        rows: Callable[[int], int] = round_rows,
    ) -> None:
        super().__init__(network)
        if most_plans < 1:
            raise RequestError(f"most_plans: must be at least 1, got {most_plans}")
        self._compilations = Compilations()
        self._compile = lookup_backend(compiler) if isinstance(compiler, str) else compiler
        self._most_plans = most_plans
        self._round_rows = rows
        self._prompts = PromptKeys(network, self.sites)
        self._plans: OrderedDict[object, Plan] = OrderedDict()
        self._banks: WeakValueDictionary[tuple[Path, Form], PlanInput] = WeakValueDictionary()
        self._pool: Any = None
        self._looking = 0

    @property
    def compilations(self) -> int:
        """How often PyTorch compiled the network so far, as counted where Dynamo asks for it."""
        return self._compilations.count

    @property
    def plans(self) -> tuple[str, ...]:
        """The plans that are kept, in words, the least recently used first."""
        return tuple(plan.describe() for plan in self._plans.values())

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        controls: ControlTensors = NO_CONTROLS,
    ) -> Tensor:
        """Return the network's output; see `Denoiser.predict`.

        A shape that is new compiles first, which takes minutes for a full-size network.

        Raises:
            RequestError: our modules are not in the network, gradients are wanted, or a kind of
                control cannot be compiled.
            ShapeError: rows or banks do not fit the latents.
            WorkError: the network does not compile.
            MissingDependencyError: a compiler is missing.
            torch.OutOfMemoryError: memory ran out, also with all other plans dropped.
        """
        if self._looking:
            return super().predict(latents, timesteps, text, controls)
        self._require_attached("predict")
        _refuse_kinds(controls)
        self._refuse_gradients(latents, text, controls)
        with torch.inference_mode(False), torch.no_grad():
            inputs = list_inputs(latents, timesteps, self._prompts.of(text), controls)
            forms = list_forms(inputs, controls, self._motion_sites(controls), self._round_rows)
            with span("plan"):
                return self._run(forms, text, inputs)

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Predict as `EagerDenoiser` does in the block."""
        self._looking += 1
        try:
            yield
        finally:
            self._looking -= 1

    @contextmanager
    def keeping(self, sites: Collection[int], rows: Tensor) -> Iterator[Mapping[int, KeyValueBank]]:
        """Keep keys and values of eager predictions; see `Denoiser.keeping`."""
        with self.eagerly(), super().keeping(sites, rows) as kept:
            yield kept

    @contextmanager
    def watching(self, rows: Tensor, words: Tensor, tap: str) -> Iterator[Watched]:
        """Watch rows of eager predictions; see `Denoiser.watching`."""
        with self.eagerly(), super().watching(rows, words, tap) as watched:
            yield watched

    def detach(self) -> Any:
        """Drop all plans, put the stock modules back and return the network."""
        self._drop_plans()
        self._prompts = PromptKeys(self.network, self.sites)
        return super().detach()

    def _run(self, forms: Forms, text: Tensor, inputs: Mapping[Path, Tensor]) -> Tensor:
        """What the plan says; where memory runs out, once more with all others dropped."""
        plan = self._plan(forms, text)
        rows = len(inputs["latents",])
        try:
            return plan.run(inputs, rows)
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(self._plans) < 2:
                raise
        # Behind the handler, which would hold on to what did not fit.
        self._drop_plans(plan)
        return plan.run(inputs, rows)

    def _plan(self, forms: Forms, text: Tensor) -> Plan:
        key = (text.shape[1:], frozenset(forms.items()))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._prepared(forms, text)
            self._plans[key] = plan
            while len(self._plans) > self._most_plans:
                evicted = self._plans.popitem(last=False)[1]
                _log.info("the plan for %s makes room", evicted.describe())
                evicted.close()
        self._plans.move_to_end(key)
        return plan

    def _prepared(self, forms: Forms, text: Tensor) -> Plan:
        """A new plan; where memory runs out, once more with all others dropped."""
        make = partial(self._make, forms, text)
        try:
            return make()
        except RuntimeError as error:
            if not is_out_of_memory(error) or not self._plans:
                raise
        # Behind the handler, which would hold on to what did not fit.
        self._drop_plans()
        return make()

    def _make(self, forms: Forms, text: Tensor) -> Plan:
        device = text.device
        if device.type == "cuda" and self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        began = time.perf_counter()
        plan = Plan(
            self.network,
            self.signal,
            {path: self._input(path, form, device) for path, form in forms.items()},
            text=(text.shape[1], text.shape[2]),
            compiler=Compiler(self._compile, self._compilations),
            device=device,
            pool=self._pool,
        )
        try:
            plan.prepare()
        except BaseException:
            plan.close()
            raise
        seconds = time.perf_counter() - began
        _log.info("compiled for %s in %.1f s", plan.describe(), seconds)
        return plan

    def _input(self, path: Path, form: Form, device: torch.device) -> PlanInput:
        """What a plan reads; a bank is that of the plans that have one of its form already."""
        kept = self._banks.get((path, form))
        if kept is None:
            kept = PlanInput(path, form, device)
            if bank_axes(path):
                self._banks[path, form] = kept
        return kept

    def _drop_plans(self, but: Plan | None = None) -> None:
        """Let go of all plans but one; their memory is the GPU's again."""
        for key, plan in list(self._plans.items()):
            if plan is not but:
                del self._plans[key]
                plan.close()
        if self._pool is not None:
            if not self._plans:
                self._pool = None
            torch.cuda.empty_cache()

    def _refuse_gradients(self, latents: Tensor, text: Tensor, controls: ControlTensors) -> None:
        if not torch.is_grad_enabled():
            return
        given = list_inputs(latents, text, {}, controls).values()
        if any(tensor.requires_grad for tensor in (*given, *self.network.parameters())):
            raise RequestError(
                "compiled: must be asked for predictions without gradients, got inputs or weights "
                "that require them; predict under `torch.no_grad()` or inside `eagerly()`, or load "
                "the model with backend='eager'"
            )

    def _motion_sites(self, controls: ControlTensors) -> dict[int, MotionSite]:
        if controls.motion is None:
            return {}
        found = {}
        for index, site in enumerate(self.sites):
            if site.kind is SiteKind.TEMPORAL:
                attention = self.network.get_submodule(site.name)
                found[index] = MotionSite(
                    width=site.width,
                    query=len(attention.to_q.weight),
                    key=len(attention.to_k.weight),
                    value=len(attention.to_v.weight),
                    tokens=partial(self._tokens, site.name),
                )
        return found

    def _tokens(self, site: str, height: int, width: int) -> int:
        rows, columns = site_size(self.network, site, (height, width))
        return rows * columns


def _refuse_kinds(controls: ControlTensors) -> None:
    present = [field.name for field in fields(controls) if getattr(controls, field.name)]
    refused = [name for name in present if name not in KINDS]
    if refused:
        raise RequestError(
            f"compiled: controls must be of {', '.join(KINDS)}, got {', '.join(refused)}; predict "
            "inside `eagerly()`, or load the model with backend='eager'"
        )
