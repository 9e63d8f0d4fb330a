"""What each control costs on the GPU at hand, and whether the engine is right there.

Cost is the time of clips under a control over that of as many plain clips, sampled in turn, the
VAE and what happens once a motion left out. MOFT guidance has the 25 steps that its window is laid
out for, the others 5, of which 0.4 is exactly two. Milliseconds are a step's, on the mean;
`share_of_floor` is that of the plain operations of the clips at 790 TFLOP/s, so what a control adds
counts as lost. Costs are of the network run eagerly in float16, but for those under `compiled`:
they are of bfloat16, whose plain plan the part `clips` has compiled before.

Right is what the CPU says: the embedded model's latents under every control, float32 within 1e-4
of the largest value, bfloat16 with at most twice the error that the CPU makes in that type. The
former is the largest error as a share of the largest value. The latter is a root mean square as a
share of the same of the values, of the worst clip: the largest of so many errors is less than half
as large on one machine as on another by chance, and the same code would pass on one of two.
A control that changes nothing cannot be right. One that changes a clip, from that of the control
that it is a kind of, by less than bfloat16 may err would pass there if it did nothing; these are
counted as untold.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinetiq.bench.clips import H200_RATE, peak_of
from kinetiq.bench.figures import Figure, load_targets
from kinetiq.bench.harness import BenchOptions, Progress
from kinetiq.bench.measure import time_ratio
from kinetiq.bench.steps import Budget, Keep, Outcome, Stage, Step, run_stages
from kinetiq.bench.subjects import (
    ANIMATEDIFF,
    Subject,
    compiled,
    embedded_subject,
    full_size_subject,
    random_embedding,
    random_lora,
)
from kinetiq.moft_guidance import MoftGuidance, MoftRegion
from kinetiq.motion_injection import MotionInjection
from kinetiq.query_injection import QueryInjection
from kinetiq.shots import ConsistentShots, Shot
from kinetiq.sprites.cases import transfer_pairs

STEPS, MOFT_STEPS = 5, 25
MOTIONS = 8
_BUILD = 45.0
_COMPILE = 200.0  # the network with and without a control
_COMPILED = ("query_cost.one_target", "injection_cost.one_target")
ELSEWHERE: Mapping[str, str] = {  # what the figures of the part leave open, and why
    "gpu.zeroscope: controls": "their rows are those of AnimateDiff, whose costs are measured",
    "gpu: controls in bfloat16, run eagerly": "float16 has the same rows and bytes",
    "gpu.compiled: four targets": "each number of rows is a plan, which takes minutes to compile",
    "gpu.compiled: embedding, LoRA and MOFT": "each kind of control is a plan, likewise",
    "gpu: costs of shots, of regions, and of an embedding with a LoRA": (
        "they are compared with the CPU, and are made of what is timed"
    ),
}
_CLOSE = {torch.float32: 1e-4}  # of the largest value
_SLACK = 2.0  # times the CPU's error in a half type
_SMALL = 0.02  # step of guidance: so that it changes more than bfloat16 errs, and no clip breaks
_KIND_OF = {  # what a control would be if what it has of its own did nothing; else plain
    "query_leak_reduced": "query",
    "query_region": "query",
    "motion_region": "motion",
    "embedding_with_lora": "lora",
    "lora_with_highway": "lora",
    "moft_own_keys": "moft",
    "moft_region": "moft",
}
_WORDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}

Controls = Callable[[Subject], Any]


@dataclass(frozen=True)
class Case:
    """A control whose cost is measured.

    Args:
        name: of its figure, behind the subject's stem.
        controls: for a subject: one for all clips, or a list of one each.
        clips: how many.
        steps: of the sampler.
        seconds: that the measurement may take.
    """

    name: str
    controls: Controls
    clips: int = 1
    steps: int = STEPS
    seconds: float = 15.0


def _query(subject: Subject) -> QueryInjection:
    return QueryInjection(subject.reference, until=0.4)


def _motion(subject: Subject) -> MotionInjection:
    return MotionInjection(subject.reference)


def _embedding(subject: Subject) -> Any:
    return random_embedding(subject, 0)


def _lora(subject: Subject) -> Any:
    return random_lora(subject, 0)


def _lora_with_highway(subject: Subject) -> Any:
    return random_lora(subject, 0, highway="all")


def _embedding_with_lora(subject: Subject) -> tuple[Any, ...]:
    return _embedding(subject), _lora(subject)


def _half(subject: Subject) -> np.ndarray:
    """The left half of the frame, as a region."""
    mask = np.zeros((subject.height, subject.width), np.float32)
    mask[:, : subject.width // 2] = 1
    return mask


def _shots(subject: Subject) -> ConsistentShots:
    """Two shots of the clips' own prompt, so that plain ones are these left alone.

    Masks are given: found ones hang on a threshold, which rounding may cross.
    """
    return ConsistentShots(
        "a red circle",
        [Shot("a red circle")] * 2,
        masks=[_half(subject)] * 2,
        preserve_until=0.4,
        steps=STEPS,
        frames=subject.frames,
        height=subject.height,
        width=subject.width,
        guidance_scale=subject.guidance_scale,
        sampler="ddim",
    )


def _different_motions(subject: Subject) -> list[Any]:
    return [random_embedding(subject, seed) for seed in range(MOTIONS)]


def _moft(subject: Subject, **switches: Any) -> MoftGuidance:
    return MoftGuidance(direction="left", step_size=_SMALL, **switches)


CASES = (
    Case("query_cost.one_target", _query),
    Case("query_cost.four_targets", _query, 4, seconds=45.0),
    Case("injection_cost.one_target", _motion),
    Case("injection_cost.four_targets", _motion, 4, seconds=45.0),
    Case("embedding_cost", _embedding),
    Case("lora_cost", _lora),
    Case("lora_cost_with_highway", _lora_with_highway),
    Case("different_motions_cost", _different_motions, MOTIONS, seconds=75.0),
    Case("moft_cost", _moft, steps=MOFT_STEPS, seconds=60.0),
)
COMPARED: dict[str, Case] = {
    "plain": Case("plain", lambda _: None),
    "query": Case("query", _query),
    "query_leak_reduced": Case(
        "query_leak_reduced", lambda s: QueryInjection(s.reference, reduce_leak=True)
    ),
    "query_region": Case("query_region", lambda s: QueryInjection(s.reference, region=_half(s))),
    "motion": Case("motion", _motion, 2),
    "motion_region": Case("motion_region", lambda s: MotionInjection(s.reference, region=_half(s))),
    "embedding": Case("embedding", _embedding),
    "embedding_with_lora": Case("embedding_with_lora", _embedding_with_lora),
    "lora": Case("lora", _lora),
    "lora_with_highway": Case("lora_with_highway", _lora_with_highway),
    "different_motions": Case(
        "different_motions", lambda s: [2.0 * one for one in _different_motions(s)], MOTIONS
    ),
    "moft": Case("moft", _moft),
    "moft_own_keys": Case("moft_own_keys", functools.partial(_moft, shared_keys_values=False)),
    "moft_region": Case(
        "moft_region",
        lambda s: MoftGuidance(regions=[MoftRegion(_half(s), direction="left")], step_size=_SMALL),
    ),
    "shots": Case("shots", _shots, 2),
}


def measure_controls(
    options: BenchOptions, budget: Budget, progress: Progress, keep: Keep = lambda *_: None
) -> Outcome:
    """Measure both models, and compare the GPU with the CPU."""
    outcome = run_stages(stages(options), options.device, budget, progress, "controls", keep)
    if options.device.startswith("cuda"):
        for name, why in ELSEWHERE.items():
            outcome.leave_out([name], f"not part of the bench: {why}")
    return outcome


def stages(options: BenchOptions) -> list[Stage]:
    """What there is to measure, the most wanted first."""
    device = options.device
    kind = "gpu" if device.startswith("cuda") else "cpu"
    repeats = 2 if options.quick else 5
    reference = transfer_pairs(1)[0].reference
    embedded = CASES[:3:2] if options.quick else CASES

    def costs(stem: str, cases: Sequence[Case]) -> list[Step]:
        return [
            Step(
                f"{stem}.{case.name}",
                case.seconds,
                functools.partial(cost, case=case, stem=stem, repeats=repeats),
            )
            for case in cases
        ]

    def compiled_cost(case: Case) -> Step:
        run = functools.partial(cost_compiled, case=case, stem="gpu.compiled", repeats=repeats)
        return Step(f"gpu.compiled.{case.name}", _COMPILE + case.seconds, run)

    def full_size(name: str, dtype: torch.dtype, steps: Sequence[Step]) -> Stage:
        build = functools.partial(full_size_subject, ANIMATEDIFF, device, dtype)
        return Stage(name, _BUILD, build, steps)

    targets = load_targets()
    first = [case for case in CASES if f"gpu.{case.name}" in targets]
    rest = [case for case in CASES if case not in first]
    compiled_first, *compiled_rest = (case for case in CASES if case.name in _COMPILED)
    return [
        full_size("animatediff", torch.float16, costs("gpu", first)),
        # What compiles needs most of a part's time, so it comes while that is there, or never.
        full_size("animatediff compiled", torch.bfloat16, [compiled_cost(compiled_first)]),
        Stage(
            "agreement",
            15.0,
            lambda: build_agreement(device, "cpu"),
            [
                Step(f"gpu.agreement.{name}", 15.0, functools.partial(agree, name=name))
                for name in COMPARED
            ],
        ),
        full_size("animatediff, other controls", torch.float16, costs("gpu", rest)),
        Stage(
            "embedded",
            10.0,
            lambda: embedded_subject(device, reference()),
            costs(f"{kind}.embedded", embedded),
            gpu=False,
        ),
        full_size(
            "animatediff compiled, other controls",
            torch.bfloat16,
            [compiled_cost(case) for case in compiled_rest],
        ),
    ]


def cost(subject: Subject, *, case: Case, stem: str, repeats: int) -> dict[str, Figure]:
    """The time of clips under a control over that of plain ones, and what a step takes."""
    controls = case.controls(subject)
    controlled = subject.resolve(subject.requests(case.clips, controls, steps=case.steps))
    plain = subject.resolve(subject.requests(case.clips, steps=case.steps))
    for requests in (controlled, plain):  # what compiles at first needs memory of its own
        subject.sample(requests)
    peaks = {
        name: peak_of(functools.partial(subject.sample, requests), subject.device)
        for name, requests in (("controlled", controlled), ("plain", plain))
    }
    ratio = time_ratio(
        lambda: subject.sample(controlled),
        lambda: subject.sample(plain),
        repeats=max(2, repeats // 2) if case.clips > 1 or case.steps > STEPS else repeats,
        warmup=0,
        device=str(subject.device),
    )
    found = {f"{stem}.{case.name}": ratio.figure}
    for name, timing, way in (
        (f"{stem}.{case.name}", ratio.ours, "controlled"),
        (f"{stem}.plain.batch_{case.clips}", ratio.baseline, "plain"),
    ):
        a_step = timing.p50 / case.steps
        found[f"{name}.milliseconds_per_step"] = Figure(1e3 * a_step, unit="ms", n=1)
        if peaks[way]:
            found[f"{name}.peak_memory"] = Figure(peaks[way] / 2**30, unit="GiB")
        if subject.flops:
            share = case.clips * subject.flops / a_step / H200_RATE
            found[f"{name}.share_of_floor"] = Figure(share)
    return found


def cost_compiled(subject: Subject, *, case: Case, stem: str, repeats: int) -> dict[str, Figure]:
    """The same with the network compiled; what that takes is left out."""
    with compiled(subject) as faster:
        faster.check(faster.engine.denoiser, case.clips)
        return cost(faster, case=case, stem=stem, repeats=repeats)


@dataclass(eq=False)
class Agreement:
    """The embedded model on two devices, in two types, and what disagreed so far.

    Args:
        tested: by type, where it is tried.
        trusted: by type, where it is believed.
        exact: latents in float32 where it is believed, by name and number of clips.
        disagreeing: names of the controls that were wrong.
        untold: names of those of which bfloat16 cannot tell that they do anything.
        compared: names of those that were compared.
    """

    tested: dict[torch.dtype, Subject]
    trusted: dict[torch.dtype, Subject]
    exact: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    disagreeing: list[str] = field(default_factory=list)
    untold: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)


def build_agreement(tested: str, trusted: str) -> Agreement:
    """The embedded model on both devices."""
    reference = transfer_pairs(1)[0].reference()
    one, other = (
        {dtype: embedded_subject(device, reference, dtype) for dtype in _WORDS}
        for device in (tested, trusted)
    )
    return Agreement(one, other)


def agree(state: Agreement, *, name: str) -> dict[str, Figure]:
    """How far the tested device is from the trusted one under a control.

    Errors are those of the worst clip, from the trusted device's float32.
    """
    case = COMPARED[name]
    exact = _exact(state, name, case.clips)
    figures: dict[str, Figure] = {}
    right = told = True
    former = _exact(state, _KIND_OF.get(name, "plain"), case.clips)
    effect = math.inf if name == "plain" else min(_spreads(former, exact))
    for dtype, word in _WORDS.items():
        got = _latents(state.tested[dtype], case)
        if dtype in _CLOSE:
            error, allowed = _apart(got, exact), _CLOSE[dtype]
        else:
            theirs = max(_spreads(_latents(state.trusted[dtype], case), exact))
            error, allowed = max(_spreads(got, exact)), _SLACK * theirs + torch.finfo(dtype).eps
            told = told and effect > allowed
        figures[f"gpu.agreement.{name}.{word}"] = Figure(error, n=case.clips)
        right = right and error <= allowed
    if name != "plain":
        changed = _apart(_exact(state, "plain", case.clips), exact)
        right = right and changed > 10 * _CLOSE[torch.float32]
    state.compared.append(name)
    if not right:
        state.disagreeing.append(name)
        print(f"bench gpu: {name} disagrees: {figures}")  # noqa: T201  goes to standard error
    if not told:
        state.untold.append(name)
        print(f"bench gpu: {name} changes less than bfloat16 errs: {effect:g}")  # noqa: T201  likewise
    return figures | {
        "gpu.agreement.untold": Figure(len(state.untold), n=len(state.compared)),
        "gpu.agreement.disagreeing": Figure(len(state.disagreeing), n=len(state.compared)),
        "gpu.agreement.not_compared": Figure(len(COMPARED) - len(state.compared), n=len(COMPARED)),
    }


def _exact(state: Agreement, name: str, clips: int) -> Tensor:
    """What to believe of a control, of so many clips."""
    if (name, clips) not in state.exact:
        case = replace(COMPARED[name], clips=clips)
        state.exact[name, clips] = _latents(state.trusted[torch.float32], case)
    return state.exact[name, clips]


def _latents(subject: Subject, case: Case) -> Tensor:
    """[clips, channels, frames, h, w] on the CPU; convolutions do without TensorFloat-32."""
    controls = case.controls(subject)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        if isinstance(controls, ConsistentShots):
            return torch.stack(subject.sample_shots(controls)).cpu()
        requests = subject.requests(case.clips, controls, steps=case.steps)
        return torch.stack(subject.sample(subject.resolve(requests))).cpu()


def _apart(got: Tensor, wanted: Tensor) -> float:
    """The largest error as a share of the largest value."""
    error = float((got.double() - wanted.double()).abs().max() / wanted.abs().max())
    return error if math.isfinite(error) else math.inf


def _spreads(got: Tensor, wanted: Tensor) -> list[float]:
    """Of each clip, the root mean square of errors as a share of that of the values."""
    errors = (got.double() - wanted.double()).flatten(1).norm(dim=1)
    shares = errors / wanted.double().flatten(1).norm(dim=1)
    return [share if math.isfinite(share) else math.inf for share in shares.tolist()]
