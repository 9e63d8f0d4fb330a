"""The account of every kernel at the production shapes, for GPUs that need not be here.

Each operator's launches are compiled for each type and target (see `kinetiq.kernels._compile`),
and the machine code is read: registers, local memory, shared memory, matrix instructions. With
`--out`, `compile.ndjson` grows kernel by kernel, so that a long run in the background can be
followed and a killed one has left its part; at the end `compile.json` and `compile.md` say it in
order.
"""

import json
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from kinetiq.bench.figures import Figure
from kinetiq.bench.harness import Bench, BenchOptions, Progress
from kinetiq.errors import OutputError, WorkError
from kinetiq.kernels._compile import (
    AMD,
    NVIDIA,
    Account,
    CompileCase,
    Request,
    compile_apart,
    find_cases,
)

TYPES = ("fp16", "bf16")
_DONE = object()


def plan(cases: Sequence[CompileCase], *, quick: bool) -> list[Request]:
    """What is compiled: all of it, or forward kernels of AnimateDiff in fp16 for sm_90."""
    if quick:
        cases = [case for case in cases if case.forward and case.shape.startswith("animatediff")]
    types = TYPES[:1] if quick else TYPES
    targets = ("sm_90",) if quick else NVIDIA
    requests = _requests(cases, types, targets)
    if not quick:  # AMD's compiler is asked whether it can, and no more
        requests += _requests(cases, TYPES[:1], AMD)
    return requests


def _requests(
    cases: Sequence[CompileCase], types: Sequence[str], targets: Sequence[str]
) -> list[Request]:
    return [
        Request(case.operator, case.shape, case.forward, element, target)
        for target in targets
        for element in types
        for case in cases
    ]


def compile_all(requests: Sequence[Request], workers: int | None = None) -> Iterator[Account]:
    """Yield the accounts of all requests, compiled in several processes, as they come.

    Raises:
        WorkError: a compiling process died.
    """
    workers = workers or max(1, (os.cpu_count() or 1) // 2)
    groups: dict[tuple[str, str], list[Request]] = {}
    for request in requests:  # what shares a compiler's cache stays together
        groups.setdefault((request.target, request.element), []).append(request)
    shares: list[list[Request]] = [[] for _ in range(min(workers, len(groups)))]
    for group in groups.values():
        min(shares, key=len).extend(group)
    said: queue.Queue[Account | Exception | object] = queue.Queue()

    def work(share: list[Request]) -> None:
        try:
            for account in compile_apart(share):
                said.put(account)
        except Exception as error:  # raised again by the thread that reads
            said.put(error)
        said.put(_DONE)

    for share in shares:
        threading.Thread(target=work, args=(share,), daemon=True).start()
    left = len(shares)
    while left:
        entry = said.get()
        if isinstance(entry, Exception):
            raise entry
        if isinstance(entry, Account):
            yield entry
        else:
            left -= 1


def count(accounts: Sequence[Account]) -> dict[str, Figure]:
    """The figures of a list of accounts; those of AMD are counted apart."""
    ours = [account for account in accounts if account.request.target not in AMD]
    theirs = [account for account in accounts if account.request.target in AMD]
    forward = [account for account in ours if account.request.forward]
    figures = {
        "compile.total": Figure(len(ours)),
        "compile.failed": Figure(sum(bool(account.error) for account in ours)),
        "compile.forward_spills": Figure(sum(account.spill_bytes > 0 for account in forward)),
        "compile.without_matrix_units": Figure(sum(a.misses_matrix_units for a in ours)),
        "compile.query_attention.without_hgmma": Figure(sum(misses_hgmma(a) for a in forward)),
    }
    if theirs:
        figures["compile.amd_total"] = Figure(len(theirs))
        figures["compile.amd_failed"] = Figure(sum(bool(account.error) for account in theirs))
    groups: dict[str, list[Account]] = {}
    for account in ours:
        direction = "forward" if account.request.forward else "backward"
        if not account.error:
            groups.setdefault(f"compile.{account.request.operator}.{direction}", []).append(account)
    for name, group in sorted(groups.items()):  # the worst of each
        figures[f"{name}.registers"] = Figure(max(a.registers for a in group))
        spilled = max(a.spill_bytes for a in group)
        figures[f"{name}.spill_bytes"] = Figure(spilled, unit="B")
        figures[f"{name}.shared_bytes"] = Figure(max(a.shared_bytes for a in group), unit="B")
        figures[f"{name}.occupancy"] = Figure(min(a.occupancy or 0.0 for a in group))
        figures[f"{name}.padded_work"] = Figure(max(a.padded_work for a in group))
        figures[f"{name}.padded_head_dim"] = Figure(max(a.padded_head_dim for a in group))
    return figures


def misses_hgmma(account: Account) -> bool:
    """Whether a forward `query_attention` on sm_90 has no product of a whole warp group.

    The older HMMA leaves half of the unit's rate. Fewer than 64 tokens fill no warp group.
    """
    request = account.request
    if account.error or not account.dots or request.target != "sm_90" or not request.forward:
        return False
    found = account.matrix_instructions or {}
    return request.operator == "query_attention" and "HGMMA" not in found


def render(accounts: Sequence[Account]) -> str:
    """A Markdown table, one line a kernel."""
    names = ["kernel", "shape", "type", "target", "registers", "spilled bytes", "shared bytes"]
    names += ["occupancy", "matrix instructions", "padded work", "error"]
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for account in accounts:
        request = account.request
        found = sorted((account.matrix_instructions or {}).items())
        words: list[object] = [
            account.kernel.strip("_") or request.operator,
            request.shape,
            request.element,
            request.target,
            account.registers,
            account.spill_bytes,
            account.shared_bytes,
            "" if account.occupancy is None else f"{account.occupancy:.2f}",
            ", ".join(f"{number} {name}" for name, number in found)
            + (f"; {account.ordinary_dots} on ordinary units" if account.ordinary_dots else ""),
            f"{account.padded_work:.2f}",
            account.error.replace("|", "/"),
        ]
        lines.append(f"| {' | '.join(map(str, words))} |")
    return "\n".join(lines) + "\n"


def measure(options: BenchOptions, progress: Progress) -> dict[str, Figure]:
    """Compile, write the detail where it is wanted, and count."""
    requests = plan(find_cases(), quick=options.quick)
    if not requests:
        raise WorkError("bench compile: operators must expose COMPILED, found none that do")
    log = None if options.out is None else options.out / "compile.ndjson"
    accounts = _follow(progress.track(compile_all(requests), "compile", len(requests)), log)
    answered = {account.request for account in accounts}
    lost = [request for request in requests if request not in answered]
    if lost:
        raise WorkError(
            f"bench compile: each of {len(requests)} requests must have an account, "
            f"{len(lost)} have none, the first is {lost[0]}"
        )
    order = {request: place for place, request in enumerate(requests)}
    accounts.sort(key=lambda account: order[account.request])
    if options.out is not None:
        _write(options.out, accounts)
    wrong = [a for a in accounts if a.error or a.misses_matrix_units or misses_hgmma(a)]
    wrong += [a for a in accounts if a.request.forward and a.spill_bytes]
    if wrong:
        print(render(wrong))  # noqa: T201  goes to standard error
    return count(accounts)


def _follow(accounts: Iterable[Account], log: Path | None) -> list[Account]:
    """All accounts; each is in `log`, a JSON object a line, as soon as it is known."""
    if log is None:
        return list(accounts)
    kept = []
    with _writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("", encoding="utf-8")
    for account in accounts:  # whose own errors are not those of the log
        with _writing(log), log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(account)) + "\n")
        kept.append(account)
    return kept


def _write(folder: Path, accounts: Sequence[Account]) -> None:
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        rows = [asdict(account) for account in accounts]
        (folder / "compile.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        (folder / "compile.md").write_text(render(accounts), encoding="utf-8")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: must be writable, got: {error}") from error


BENCH = Bench("compile", "every kernel compiled for GPUs that need not be here", measure)
