"""From records of `bench export` to the data by which the engine chooses a back end."""

import json
import re
from collections.abc import Sequence

from kinetiq.backend_choice import Ratios
from kinetiq.bench.records import Record, newest

_WORDS = {"fp32": "float32", "bf16": "bfloat16"}  # no model is loaded in float16 on a CPU
_RATIO = re.compile(rf"export\.(?:\w+\.)*(?P<backend>[a-z]+)_(?P<word>{'|'.join(_WORDS)})\.ratio")


def draw_ratios(records: Sequence[Record]) -> Ratios:
    """Kind of CPU → precision → back end → time over eager's, see `kinetiq.backend_choice`.

    Of each kind the newest full run on it counts. A back end is left out where the run did not show
    that its clips are as good as eager's: where the figure of their error has no target, or misses
    it.
    """
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kind = record.environment["machine"].get("cpu_kind")
        if kind is not None:
            kinds.setdefault(kind, []).append(record)
    drawn = {}
    for kind, same in sorted(kinds.items()):
        latest = newest(same, "export", quick=False)
        if latest is not None:
            drawn[kind] = _of_record(latest)
    return drawn


def _of_record(record: Record) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name in record.figures:
        matched = _RATIO.fullmatch(name)
        if matched is None or not _is_exact(record, matched["backend"], matched["word"]):
            continue
        figure = record.figure(name)
        slowest = figure.value if figure.high is None else figure.high
        ratios = found.setdefault(_WORDS[matched["word"]], {})
        ratios[matched["backend"]] = max(ratios.get(matched["backend"], 0.0), round(slowest, 3))
    return found


def _is_exact(record: Record, backend: str, word: str) -> bool:
    error = "latent_error" if word == "fp32" else "error_ratio"
    name = f"export.{backend}_{word}.{error}"
    return name in record.targets and name not in record.missed


def render_ratios(ratios: Ratios) -> str:
    """The file's text."""
    return json.dumps(ratios, indent=2, sort_keys=True) + "\n"
