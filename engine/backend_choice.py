"""The best back end of this machine, by record.

`backend_ratios.json` maps kind of CPU → precision → back end → the time that a step of it takes
over eager's: the worst of the networks and numbers of threads that were measured, at the upper end
of its interval. Only back ends whose clips were equal to eager's within the tolerance of their
precision are in it. `kinetiq bench backends` draws it from the records of `kinetiq bench export`.
"""

import functools
import importlib.util
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kinetiq.backends import AUTO, EAGER

RATIOS_FILE = Path(__file__).with_name("backend_ratios.json")
Ratios = Mapping[str, Mapping[str, Mapping[str, float]]]
PRECISIONS = ("float32", "bfloat16")  # that a model is loaded in on a CPU
_EXPORTING = ("onnx", "onnx_ir", "onnxscript")
_PACKAGES = {  # what a back end imports beyond the core; all are of the extra "export"
    "onnxruntime": (*_EXPORTING, "onnxruntime"),
    "openvino": (*_EXPORTING, "openvino"),
}
_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")  # of x86, the newest first
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """A back end, and why it was chosen.

    Args:
        backend: one of `kinetiq.backends.BACKENDS`.
        why: half a sentence.
    """

    backend: str
    why: str


def cpu_kind() -> str:
    """What decides which back end is fast here: such as "x86_64 avx512_bf16"."""
    able = torch.cpu.get_capabilities()
    newest = next((name for name in _INSTRUCTIONS if able.get(name)), None)
    architecture = str(able["architecture"])
    return architecture if newest is None else f"{architecture} {newest}"


def choose_backend(
    dtype: torch.dtype | str, device: torch.device | str = "cpu", ratios: Ratios | None = None
) -> Choice:
    """The fastest back end that was measured to be exact on this kind of machine.

    Where nothing was measured it is "eager": what is not known to be faster is not taken.

    Args:
        dtype: of the network.
        device: that it is on.
        ratios: the data; None: the package's.
    """
    place, precision = torch.device(device), str(dtype).removeprefix("torch.")
    if place.type != "cpu":
        return Choice(EAGER, f"nothing is recorded for a {place.type} device")
    kind = cpu_kind()
    found = (read_ratios() if ratios is None else ratios).get(kind, {}).get(precision, {})
    if not found:
        return Choice(
            EAGER,
            f"nothing is recorded for {precision} on a CPU of kind {kind}; `kinetiq bench export` "
            "measures it",
        )
    missing: list[str] = []
    for backend in sorted(found, key=found.__getitem__):
        if found[backend] >= 1:
            break
        lacking = _missing_packages(backend)
        if not lacking:
            why = f"takes at most {found[backend]:.2f} of eager's time in {precision} on {kind}"
            return Choice(backend, "; ".join([why, *missing]))
        missing.append(
            f"{backend} takes {found[backend]:.2f} and lacks {', '.join(lacking)}: "
            'pip install ".[export]"'
        )
    slower = f"nothing recorded is faster in {precision} on {kind}"
    return Choice(EAGER, "; ".join(missing) or slower)


def take_backend(dtype: torch.dtype, device: torch.device) -> str:
    """The back end of `choose_backend`; the first time it is said which and why."""
    choice = choose_backend(dtype, device)
    _say(choice)
    return choice.backend


def settle_backend(backend: str, what: str) -> str:
    """The back end to load for work that nothing but "eager" does: of "auto", that one.

    Args:
        backend: that was asked for; another than "auto" is left as it is, and refused later.
        what: the work, as the beginning of a sentence.
    """
    if backend != AUTO:
        return backend
    _say(Choice(EAGER, f"{what}, which no other back end is sure to take"))
    return EAGER


@functools.cache
def read_ratios() -> Ratios:
    """The package's data."""
    ratios: Ratios = json.loads(RATIOS_FILE.read_text(encoding="utf-8"))
    return ratios


@functools.cache
def _say(choice: Choice) -> None:
    _LOG.warning("back end %s: %s", choice.backend, choice.why)  # a warning is shown unasked


def _missing_packages(backend: str) -> list[str]:
    return [name for name in _PACKAGES.get(backend, ()) if importlib.util.find_spec(name) is None]
