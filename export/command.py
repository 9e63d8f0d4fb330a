"""The command line `kinetiq export`; it is mounted by the main command.

Exit status: 0 when it is done; 1 when the work failed, a package or a device is missing, or a
check found a difference; 2 for bad input.
"""

import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from kinetiq.checkpoint import load_checkpoint, parse_device
from kinetiq.command_line import PlainGroup
from kinetiq.errors import RequestError
from kinetiq.export.engine_file import EngineFile, is_engine, read_engine
from kinetiq.export.engine_profile import Bounds
from kinetiq.export.functions import OPSET
from kinetiq.export.metadata import precision_of, read_metadata
from kinetiq.export.nodes import KINDS
from kinetiq.export.plugin_choice import OPERATORS, VARIABLE, check_operators, choice_file
from kinetiq.export.plugin_ptx import PLAIN_SHARED, check_route
from kinetiq.files import check_target
from kinetiq.progress import progress_bars
from kinetiq.taps import DEFAULT_TAP

_FILE = click.Path(dir_okay=False, path_type=Path)
_json = click.option(
    "--json", "as_json", is_flag=True, help="Print what came of it as one JSON object."
)
_ALL, _NONE = "all", "none"
_EMBEDDED = "sprites"  # the one model whose name leads nowhere but to itself
_Item = TypeVar("_Item")


@click.group(cls=PlainGroup)
def export() -> None:
    """Write the denoiser for other runtimes."""


@export.command()
@click.argument("model", default="sprites")
@click.option("--out", required=True, type=_FILE, help="The ONNX file.")
@click.option("--motion-adapter", help="AnimateDiff motion adapter for an image model.")
@click.option("--dtype", default="float32", show_default=True, help="float32, float16 or bfloat16.")
@click.option(
    "--opset",
    type=int,
    default=OPSET,
    show_default=True,
    help="Version of ONNX's operators to write; there is no other yet.",
)
@click.option(
    "--tap",
    default=DEFAULT_TAP,
    show_default=True,
    help=f"Block of the network whose features are an output too; {_NONE}: no block's.",
)
@click.option(
    "--controls",
    default=_ALL,
    show_default=True,
    help=f"Kinds of control that it takes: {_ALL}, {_NONE}, or of {', '.join(KINDS)}, joined by "
    "commas.",
)
@_json
def onnx(
    model: str,
    out: Path,
    motion_adapter: str | None,
    dtype: str,
    opset: int,
    tap: str,
    controls: str,
    as_json: bool,
) -> None:
    """Write the denoiser of MODEL as an ONNX file.

    Its controls are inputs, so that any of them works on what is written. MODEL is sprites
    (embedded), a diffusers folder, or a hub id.
    """
    from kinetiq.export.network import check_kinds, export_onnx

    kinds = check_kinds(KINDS if controls == _ALL else _split(controls))
    precision = precision_of(dtype)
    with progress_bars() as progress:
        progress("loading", 0, 1)
        checkpoint = load_checkpoint(
            model, motion_adapter=motion_adapter, dtype=precision, half_on_cpu=True
        )
        progress("exporting", 0, 1)
        made = export_onnx(
            checkpoint, out, opset=opset, tap=None if tap == _NONE else tap, controls=kinds
        )
    size = sum(path.stat().st_size for path in made.files)
    said = {
        "files": [str(path) for path in made.files],
        "bytes": size,
        "checksum": made.metadata.checksum,
        "controls": list(made.metadata.controls),
        "precision": made.metadata.precision,
        "tap": made.metadata.tap,
    }
    if as_json:
        click.echo(json.dumps(said))
        return
    names = " and ".join(click.format_filename(path) for path in made.files)
    click.echo(
        f"{names}: {model} in {made.metadata.precision}, {size / 1e6:.1f} MB, "
        f"controls {', '.join(made.metadata.controls) or _NONE}"
    )


@export.command()
@click.argument("network", type=_FILE)
@click.option(
    "--model",
    help="The model that it was exported from, a diffusers folder or a hub id; may be left out for "
    f"{_EMBEDDED} alone.",
)
@click.option("--motion-adapter", help="AnimateDiff motion adapter for an image model.")
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    help="onnxruntime or openvino; can be repeated. By default all that are installed.",
)
@click.option(
    "--nodes",
    is_flag=True,
    help="Compare what each attention and each control computes too, and name the first that "
    "differs in each runtime; for networks in float32.",
)
@click.option(
    "--device",
    help="What runs it: cpu, or cuda for onnxruntime with CUDA; by default cpu, and cuda for an "
    "engine.",
)
@click.option(
    "--trust",
    multiple=True,
    help="Checksum of an engine that was built elsewhere, as its build printed it; you vouch for "
    "it, since an engine is code.",
)
@_json
def check(
    network: Path,
    model: str | None,
    motion_adapter: str | None,
    runtimes: tuple[str, ...],
    nodes: bool,
    device: str | None,
    trust: tuple[str, ...],
    as_json: bool,
) -> None:
    """Compare an exported NETWORK with its model.

    Under every runtime that is installed, at three shapes, without controls and with all. NETWORK
    may be an engine, which is run by its own runtime on the GPU that it is for.
    """
    from kinetiq.export.check import (
        check_engine_file,
        check_network,
        count_comparisons,
        find_first_difference,
        installed_runtimes,
        require_nodes,
    )

    engine = is_engine(network)
    place = parse_device(device or ("cuda" if engine else "cpu"))
    if engine and (nodes or runtimes):
        raise RequestError(
            f"check: {'--nodes' if nodes else '--runtime'} must be left out for an engine, which "
            "its own runtime runs as a whole; check the network that it was built from"
        )
    metadata = (
        read_engine(network, trust=trust)[0].record.network if engine else read_metadata(network)
    )
    if nodes:
        require_nodes(metadata)
    if model is None and metadata.checkpoint != _EMBEDDED:
        raise RequestError(  # a folder or a hub id of that name may be anything
            f"check: --model must be the model that {network} was exported from, and is left out; "
            f"the file says that it was called {metadata.checkpoint!r}: give its folder or hub id"
        )
    with progress_bars() as progress:
        progress("loading", 0, 1)
        checkpoint = load_checkpoint(model or _EMBEDDED, motion_adapter=motion_adapter)
    used = runtimes or installed_runtimes(metadata.precision, place)
    comparisons = (
        check_engine_file(network, checkpoint, trust=trust, device=place)
        if engine
        else check_network(network, checkpoint, runtimes=used, device=place)
    )
    found = []
    total = count_comparisons(metadata) * (1 if engine else len(used))
    for comparison in _awaited("comparing", comparisons, total):
        found.append(comparison)
        if not as_json:
            sizes = "x".join(map(str, asdict(comparison.shape).values()))
            click.echo(
                f"{'ok  ' if comparison.passed else 'FAIL'} {comparison.runtime:<12} "
                f"{comparison.output:<11} {sizes:<16} "
                f"{'all controls' if comparison.controls else 'no controls':<12} "
                f"max {comparison.max_error:.2e}  relative {comparison.relative_error:.2e}  "
                f"allowed {comparison.allowed:.1e}"
            )
    looked_at = used if nodes else ()
    differences = (
        find_first_difference(network, checkpoint, name, device=place) for name in looked_at
    )
    found_nodes = _awaited("nodes", differences, len(looked_at))
    differing = [difference for difference in found_nodes if difference is not None]
    passed = all(comparison.passed for comparison in found) and not differing
    if as_json:
        said = {
            "passed": passed,
            "comparisons": [{**asdict(one), "passed": one.passed} for one in found],
            "differing_nodes": [asdict(one) for one in differing],
        }
        click.echo(json.dumps(said))
    else:
        for one in differing:
            click.echo(
                f"FAIL {one.runtime:<12} first differs at {one.node} ({one.kind}, node "
                f"{one.number + 1}): relative {one.relative_error:.2e}, allowed {one.allowed:.1e}"
            )
        if nodes and not differing:
            click.echo(f"ok   no node differs in {', '.join(used)}")
    if not passed:
        sys.exit(1)


_profile = click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="AXIS=LEAST:BEST:MOST",
    help="Sizes that the engine takes of one axis, and the one that it is fastest at, such as "
    "rows=1:2:4, or rows=2 for that alone; can be repeated. Axes are rows, frames, height and "
    "width (of latents), text_tokens, motion_slots, lora_slots, lora_rank and feature_channels.",
)
_kept = click.option(
    "--controls",
    help=f"Kinds of control that the engine takes: {_NONE}, or of {', '.join(KINDS)}, joined by "
    "commas. By default all that NETWORK has, but for full TensorRT reduced, whose queries take "
    "several kernels.",
)
_level = click.option(
    "--level",
    type=click.IntRange(0, 5),
    help="How hard the builder looks for faster kernels: 5 builds longest. By default its own.",
)
_shared = click.option(
    "--shared-bytes",
    type=click.IntRange(1),
    help="Bytes of shared memory that one of our kernels may take at the most; by default "
    f"{PLAIN_SHARED}, which every GPU has.",
)


@export.command()
@click.argument("network", type=_FILE)
@click.option("--out", type=_FILE, help="The engine; by default, beside the network.")
@click.option(
    "--rtx", is_flag=True, help="Build for TensorRT for RTX, which takes no GPU, but --target."
)
@click.option(
    "--target", help="With --rtx: architecture of the GPU that it will run on, such as sm_89."
)
@click.option(
    "--plugin",
    "plugins",
    multiple=True,
    metavar="OPERATOR",
    help=f"Run this operator by our kernel: {', '.join(OPERATORS)}; can be repeated. Or {_ALL}, or "
    f"{_NONE}, which leaves them to TensorRT's own kernels. By default what `kinetiq export tune` "
    f"recorded for the GPU, else {_ALL}.",
)
@click.option(
    "--route",
    help="Architecture that our kernels are compiled for, the GPU's own or an older one, such as "
    "sm_80 or sm_90a on sm_90. By default what is recorded, else the one that is sure to load.",
)
@_shared
@_profile
@_kept
@_level
@_json
def tensorrt(
    network: Path,
    out: Path | None,
    rtx: bool,
    target: str | None,
    plugins: tuple[str, ...],
    route: str | None,
    shared_bytes: int | None,
    profiles: tuple[str, ...],
    controls: str | None,
    level: int | None,
    as_json: bool,
) -> None:
    """Build an engine from an exported NETWORK.

    For the GPU at hand, by full TensorRT; or with --rtx for any RTX, without a GPU.
    """
    kinds = _kinds(controls)
    options: dict[str, Any] = {"bounds": _bounds(profiles), "controls": kinds, "level": level}
    if rtx != (target is not None):
        raise RequestError(
            "export: --rtx and --target go together, since an engine for an RTX is built without "
            "one; leave both out to build for the GPU at hand"
        )
    operators = _operators(plugins)
    if route is not None:
        check_route(route)
    ours = {"--plugin": operators, "--route": route, "--shared-bytes": shared_bytes}
    given = [name for name, value in ours.items() if value is not None]
    if rtx and given:
        raise RequestError(
            f"export: {given[0]} is for full TensorRT, since TensorRT for RTX runs none of our "
            "kernels; leave it out, or leave out --rtx"
        )
    path = out or network.with_suffix(".engine" if target is None else f".{target}.engine")
    if path.resolve() == network.resolve():
        raise RequestError(
            f"export: the engine must not replace the network that it is built from, {network}; "
            "name another --out"
        )
    with progress_bars() as progress:
        progress("building", 0, 1)
        if target is not None:
            from kinetiq.export.engine_rtx import build_rtx_engine

            made = build_rtx_engine(network, path, target=target, **options)
        else:
            from kinetiq.export.engine_tensorrt import build_engine

            made = build_engine(
                network,
                path,
                plugins=operators,
                route=route,
                shared_bytes=shared_bytes or PLAIN_SHARED,
                **options,
            )
    _say_engine(made, as_json)


@export.command()
@click.argument("network", type=_FILE)
@click.option(
    "--path",
    type=_FILE,
    help=f"File to write it to; it is used where {VARIABLE} names it. By default the one that "
    f"{VARIABLE} names, else the package's own.",
)
@_shared
@_profile
@_kept
@_json
def tune(
    network: Path,
    path: Path | None,
    shared_bytes: int | None,
    profiles: tuple[str, ...],
    controls: str | None,
    as_json: bool,
) -> None:
    """Find which operators our kernels make faster, on the GPU at hand.

    Builds engines of full TensorRT from NETWORK with and without each operator's plugin, by every
    route, times them at the best sizes of the profile, and writes what was fastest to the file from
    which `kinetiq export tensorrt` takes its defaults.
    """
    from kinetiq.export.plugin_choice import read_table, write_record
    from kinetiq.export.plugin_tuning import tune_plugins

    kinds, bounds = _kinds(controls), _bounds(profiles)
    written = path or choice_file()
    check_target(written, "export tune")
    if written.exists():  # a file of something else is said before the work
        read_table(written)
    with progress_bars() as progress:
        progress("tuning", 0, 1)
        target, record = tune_plugins(
            network,
            bounds=bounds,
            controls=kinds,
            shared_bytes=shared_bytes or PLAIN_SHARED,
        )
    if as_json:
        click.echo(json.dumps({"target": target, **asdict(record)}))
    else:
        for name, seconds in record.seconds.items():
            click.echo(f"{name:<48} {1e3 * seconds:.2f} ms")
        for name, why in record.refused.items():
            click.echo(f"{name:<48} {why}")
        click.echo(f"{target}: {record.choice.name}")
    write_record(written, target, record)


def _awaited(stage: str, items: Iterable[_Item], total: int) -> Iterator[_Item]:
    """Yield items; while one is worked on a bar is shown, which is gone once it is there."""
    left = iter(items)
    for number in itertools.count():
        with progress_bars() as progress:
            if number < total:
                progress(stage, number, total)
            try:
                item = next(left)
            except StopIteration:
                return
        yield item


def _say_engine(made: EngineFile, as_json: bool) -> None:
    record, size = made.record, made.path.stat().st_size
    said = {
        "engine": str(made.path),
        "bytes": size,
        "checksum": made.checksum,
        "runtime": record.runtime,
        "version": record.version,
        "target": record.target,
        "plugins": list(record.plugins),
        "route": record.route,
        "attentions": record.attentions,
        "fused": record.fused,
        "left_out": dict(record.left_out),
    }
    if as_json:
        click.echo(json.dumps(said))
        return
    kernels = f", our kernels by {record.route}: {', '.join(record.plugins)}" * bool(record.plugins)
    fused = "" if record.fused is None else f", {record.fused} fused kernels of attention"
    click.echo(
        f"{click.format_filename(made.path)}: for {record.runtime} {record.version} on "
        f"{record.target}, {size / 1e6:.1f} MB{fused}{kernels}"
    )
    click.echo(f"checksum, to vouch for it elsewhere: {made.checksum}")


def _kinds(controls: str | None) -> tuple[str, ...] | None:
    """What was asked for, None where nothing was."""
    from kinetiq.export.network import check_kinds

    return None if controls is None else check_kinds(_split(controls))


def _split(controls: str) -> tuple[str, ...]:
    if controls == _NONE:
        return ()
    return tuple(part.strip() for part in controls.split(",") if part.strip())


def _operators(plugins: tuple[str, ...]) -> tuple[str, ...] | None:
    """What was asked for, None where nothing was."""
    if not plugins:
        return None
    if len(plugins) > 1 and not {_ALL, _NONE}.isdisjoint(plugins):
        raise RequestError(f"export: --plugin {_ALL} or {_NONE} must stand alone, got {plugins}")
    whole = {_ALL: OPERATORS, _NONE: ()}
    return whole[plugins[0]] if plugins[0] in whole else check_operators(plugins)


def _bounds(profiles: tuple[str, ...]) -> dict[str, Bounds]:
    bounds = {}
    for text in profiles:
        name, separator, sizes = text.partition("=")
        if not separator:
            raise RequestError(
                f"profile: must be AXIS=LEAST:BEST:MOST, such as rows=1:2:4, got {text!r}"
            )
        bounds[name] = Bounds.parse(sizes, name)
    return bounds
