"""The command line `kinetiq bench`; `bench` is mounted by the main command.

Exit status: 0 when it measured, also when targets were missed; 1 when it could not measure, or
when the README differs from the records; 2 for bad input.
"""

import contextlib
import difflib
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import click

from kinetiq.bench.environment import PAGES, find_checkout
from kinetiq.bench.figures import Target, load_targets
from kinetiq.bench.harness import (
    BENCHES,
    Bench,
    BenchOptions,
    Progress,
    Registry,
    choose_device,
    run_bench,
    unmet_needs,
)
from kinetiq.bench.parts import measure_parts, merge_folders, part_file
from kinetiq.bench.records import Record, append_record, read_folder, read_records
from kinetiq.bench.report import align, compare, render_comparison, render_page, render_result
from kinetiq.command_line import PlainGroup, say_error
from kinetiq.errors import InputError, OutputError, RequestError, WorkError
from kinetiq.files import write_text

_Function = TypeVar("_Function", bound=Callable[..., Any])
_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)


class BenchGroup(PlainGroup):
    """A group whose commands are its own and one for each bench of a registry."""

    def __init__(self, registry: Registry, **settings: Any) -> None:
        super().__init__(**settings)
        self.registry = registry

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The benches in their order, then the group's own commands."""
        return [*self.registry.modules, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The group's own command, or the one that runs the bench of this name."""
        own = super().get_command(ctx, cmd_name)
        if own is None and cmd_name in self.registry.modules:
            return _bench_command(self.registry, cmd_name)
        return own

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with our words for an unknown name."""
        name = args[0]
        known = self.list_commands(ctx)
        if name not in known and not name.startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f'NAME must be one of {", ".join(known)}, got "{name}"')
        return super().resolve_command(ctx, args)


def make_group(registry: Registry) -> BenchGroup:
    """The command group over the benches of `registry`."""
    group = BenchGroup(
        registry,
        name="bench",
        short_help="Measure what this package claims.",
        help=(
            "Measure what this package claims. Each NAME below is a bench; its figures are "
            "compared with their targets and recorded."
        ),
    )
    own = (_all_command(registry), _list_command(registry), _readme, _backends, _compare)
    for command in own:
        group.add_command(command)
    return group


def _measuring_options(function: _Function) -> _Function:
    """The options that `kinetiq bench NAME` and `kinetiq bench all` share."""
    options = [
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--quick", is_flag=True, help="Measure a small sample, in under a minute."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
        click.option("--device", help="cpu, cuda or cuda:N; a GPU where there is one."),
        click.option(
            "--record/--no-record",
            default=None,
            help="Append to the records; done by default where there is a folder for them.",
        ),
        click.option(
            "--results", type=_FOLDER, help="Folder of records; bench/results of the checkout."
        ),
        click.option("--out", type=_FOLDER, help="Folder for clips and plots made on the way."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _bench_command(registry: Registry, name: str) -> click.Command:
    parts: tuple[str, ...] = ()
    try:
        bench = registry.load(name)
        summary, parts = bench.summary, bench.parts
    except WorkError as error:  # a bench that cannot be loaded must not take the others' help away
        summary = f"cannot run here: {error}"

    @click.command(name, help=summary, short_help=summary)
    @_part_options(parts)
    @_measuring_options
    def run(
        as_json: bool,
        quick: bool,
        seed: int,
        device: str | None,
        record: bool | None,
        results: Path | None,
        out: Path | None,
        part: tuple[str, ...] = (),
        merge: tuple[Path, ...] = (),
        seconds: float | None = None,
    ) -> None:
        bench = registry.load(name)
        if part and merge:
            raise RequestError(f"bench {name}: --merge must come without --part, got both")
        if seconds is not None and math.isnan(seconds):  # which click takes for a number above 1
            raise RequestError(f"bench {name}: --seconds must be a number, got nan")
        options = BenchOptions(quick, seed, choose_device(device), out, seconds=seconds)
        folder = _results_folder(results, record=record)
        targets = load_targets()
        if merge:
            measured = merge_folders(name, merge)
        elif parts:
            of_part = functools.partial(_measure_part, bench, options, targets, device)
            measured = measure_parts(name, part or parts, of_part, out, say_error)
        else:
            measured = _measure(bench, options, targets, device)
        if as_json:
            click.echo(_json(measured.result))
        else:
            click.echo(render_result(measured, targets))
        # After the result is shown, so that a full disk does not lose it.
        _keep(measured, folder)

    return run


def _part_options(parts: tuple[str, ...]) -> Callable[[_Function], _Function]:
    """The options of a bench that has parts; none for others."""

    def add(function: _Function) -> _Function:
        if not parts:
            return function
        part = click.option(
            "--part",
            type=click.Choice(parts),
            multiple=True,
            help="Measure this part alone; can be repeated. With --out, parts are recorded "
            "together.",
        )
        merge = click.option(
            "--merge",
            type=_FOLDER,
            multiple=True,
            help="Measure nothing: join the records of parts in this folder; can be repeated.",
        )
        seconds = click.option(
            "--seconds",
            type=click.FloatRange(min=1),
            help="What each part may take; what does not fit is named as unmeasured.",
        )
        return part(merge(seconds(function)))

    return add


def _measure_part(
    bench: Bench,
    options: BenchOptions,
    targets: Mapping[str, Target],
    asked_device: str | None,
    part: str,
) -> Record:
    out = options.out

    def keep(record: Record) -> None:
        if out is not None:
            write_text(part_file(out, bench.name, part), record.line + "\n", f"bench {bench.name}")

    return _measure(bench, replace(options, part=part), targets, asked_device, keep)


def _all_command(registry: Registry) -> click.Command:
    @click.command("all")
    @_measuring_options
    def run_all(
        as_json: bool,
        quick: bool,
        seed: int,
        device: str | None,
        record: bool | None,
        results: Path | None,
        out: Path | None,
    ) -> None:
        """Run every bench that this machine can."""
        options = BenchOptions(quick, seed, choose_device(device), out)
        folder = _results_folder(results, record=record)
        targets = load_targets()
        measured: dict[str, Any] = {}
        skipped: dict[str, str] = {}
        failed: dict[str, str] = {}
        for name in registry.modules:
            try:
                bench = registry.load(name)
                if unmet := unmet_needs(bench, options.device):
                    skipped[name] = f"needs {' and '.join(unmet)}"
                    click.echo(f"{name} skipped: {skipped[name]}", err=True)
                    continue
                outcome = _measure(bench, options, targets, device)
                measured[name] = outcome.result
                if not as_json:
                    click.echo(render_result(outcome, targets) + "\n")
                _keep(outcome, folder)
            except (WorkError, OutputError) as error:
                failed[name] = str(error)
                say_error(str(error))
        if as_json:
            click.echo(_json({"benches": measured, "skipped": skipped, "failed": failed}))
        if failed or not measured:
            raise WorkError(
                f"bench all: every bench that this machine can run must be measured; "
                f"measured {len(measured)}, skipped {len(skipped)}, failed {len(failed)}"
            )

    return run_all


def _list_command(registry: Registry) -> click.Command:
    @click.command("list")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    def list_benches(as_json: bool) -> None:
        """List the benches, and what each needs."""
        rows = []
        for name in registry.modules:
            try:
                bench = registry.load(name)
                rows.append((name, bench.summary, ", ".join(bench.needs)))
            except WorkError as error:
                rows.append((name, f"cannot run here: {error}", ""))
        if as_json:
            listing = [
                {"bench": n, "summary": s, "needs": w.split(", ") if w else []} for n, s, w in rows
            ]
            click.echo(_json({"benches": listing}))
        else:
            click.echo("\n".join(align([("bench", "summary", "needs"), *rows])))

    return list_benches


@click.command("readme")
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 if it would change.")
@click.option("--results", type=_FOLDER, help="Folder of records; bench/results of the checkout.")
@click.option(
    "--page",
    "pages",
    type=_FILE,
    multiple=True,
    help=f"File to draw in, may be repeated; {' and '.join(PAGES)} of the checkout.",
)
def _readme(check: bool, results: Path | None, pages: tuple[Path, ...]) -> None:
    """Draw the tables of figures in README.md and bench/RESULTS.md from the records."""
    checkout = find_checkout()
    if checkout is None and (results is None or not pages):
        raise RequestError(
            "bench readme: must run in a checkout, found none; name --results and --page"
        )
    root = checkout or Path()
    records = read_folder(results or root / "bench" / "results")
    differing = []
    for path in pages or [root / name for name in PAGES]:
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: must be a readable text file, got: {error}") from error
        drawn = render_page(text, records, path.name)
        if drawn == text:
            click.echo(f"{path} agrees with the records")
        elif check:
            lines = difflib.unified_diff(
                text.splitlines(), drawn.splitlines(), "as it is", "as recorded", lineterm=""
            )
            click.echo("\n".join(lines))
            differing.append(str(path))
        else:
            write_text(path, drawn, "bench readme")
            click.echo(f"{path} drawn from the records")
    if differing:
        raise WorkError(
            f"{', '.join(differing)}: must agree with the records, but differs; "
            "run `kinetiq bench readme`"
        )


@click.command("backends")
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 if it would change.")
@click.option("--results", type=_FOLDER, help="Folder of records; bench/results of the checkout.")
@click.option("--path", type=_FILE, help="File to write; the package's own.")
def _backends(check: bool, results: Path | None, path: Path | None) -> None:
    """Draw the data by which backend="auto" chooses from the records of bench export."""
    from kinetiq.backend_choice import RATIOS_FILE
    from kinetiq.bench.backends import draw_ratios, render_ratios

    checkout = find_checkout()
    if checkout is None and results is None:
        raise RequestError(
            "bench backends: must run in a checkout, found none; name the folder with --results"
        )
    folder = results or (checkout or Path()) / "bench" / "results"
    path = path or RATIOS_FILE
    drawn = render_ratios(draw_ratios(read_folder(folder)))
    if path.exists() and path.read_text(encoding="utf-8") == drawn:
        click.echo(f"{path} agrees with the records")
        return
    if check:
        raise WorkError(
            f"{path}: must agree with the records, but differs; run `kinetiq bench backends`"
        )
    write_text(path, drawn, "bench backends")
    click.echo(f"{path} drawn from {folder}")


@click.command("compare")
@click.argument("before", type=_FILE)
@click.argument("after", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def _compare(before: Path, after: Path, as_json: bool) -> None:
    """Compare the newest records of two files."""
    comparisons = compare(read_records(before), read_records(after))
    if as_json:
        click.echo(_json({"comparisons": [asdict(comparison) for comparison in comparisons]}))
    else:
        click.echo(render_comparison(comparisons))


@click.command("tune")
@click.option("--operator", "operators", multiple=True, help="One operator; can be repeated.")
@click.option("--path", type=_FILE, help="Launch file to change; the one in use.")
@click.option("--device", help="cuda or cuda:N; a GPU where there is one.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=math.inf,
    show_default="as long as it takes",
    help="After which nothing further is tried; what was not come to is named and stays.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def _tune(
    operators: tuple[str, ...],
    path: Path | None,
    device: str | None,
    seed: int,
    seconds: float,
    *,
    as_json: bool,
) -> None:
    """Find the launch settings of the GPU at hand, and write them to a launch file.

    A GPU that is not in the file takes the settings of the nearest older one of its generation,
    else the defaults. A file of one's own is in use where KINETIQ_LAUNCH names it.
    """
    from kinetiq.bench.tune import describe, tune
    from kinetiq.kernels._launch import launch_file

    outcomes = []
    progress = Progress(visible=sys.stderr.isatty())
    target = path or launch_file()
    answers = sys.stdout
    found = tune(
        choose_device(device), target, operators, seed=seed, progress=progress, seconds=seconds
    )
    # Compilers print to standard output, which belongs to the answers; and who is interrupted here
    # must not wait for what compiles elsewhere.
    with contextlib.closing(found), contextlib.redirect_stdout(sys.stderr):
        for outcome in found:
            outcomes.append(asdict(outcome))
            if not as_json:
                click.echo(describe(outcome), file=answers)
    if as_json:
        click.echo(_json({"launch_file": str(target), "outcomes": outcomes}))


def _measure(
    bench: Bench,
    options: BenchOptions,
    targets: Mapping[str, Target],
    asked_device: str | None,
    keep: Callable[[Record], None] | None = None,
) -> Record:
    return run_bench(
        bench,
        options,
        targets=targets,
        command=_command_line(bench.name, options, asked_device),
        progress=Progress(visible=sys.stderr.isatty()),
        keep=keep,
    )


def _command_line(name: str, options: BenchOptions, asked_device: str | None) -> str:
    """What makes the figures again: only options that have a say in them."""
    words = ["kinetiq", "bench", name]
    if options.part is not None:
        words += ["--part", options.part]
    if options.seconds is not None:
        words += ["--seconds", f"{options.seconds:g}"]
    if options.quick:
        words.append("--quick")
    if options.seed:
        words += ["--seed", str(options.seed)]
    if asked_device is not None:
        words += ["--device", asked_device]
    return " ".join(words)


def _results_folder(asked: Path | None, *, record: bool | None) -> Path | None:
    """Where to record, found before anything is measured; None is nowhere."""
    if record is False:
        if asked is not None:
            raise RequestError("bench: --results must come without --no-record, got both")
        return None
    checkout = find_checkout()
    folder = asked or (checkout / "bench" / "results" if checkout else None)
    if folder is None:
        reason = "bench: records need a checkout or a folder, found none; name one with --results"
        if record:
            raise RequestError(reason)
        click.echo(f"not recorded: {reason}", err=True)
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: must be a folder, got: {error}") from error
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder}: must be writable, it is not; name another with --results")
    return folder


def _keep(record: Record, folder: Path | None) -> None:
    if folder is not None:
        click.echo(f"recorded in {append_record(record, folder)}", err=True)


def _json(entries: Mapping[str, object]) -> str:
    return json.dumps(entries, indent=2, allow_nan=False, ensure_ascii=False)


bench = make_group(BENCHES)
bench.add_command(_tune)  # it changes the package, and so is no part of a group that measures
