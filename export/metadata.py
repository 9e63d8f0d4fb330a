"""What an exported network says of itself, and how that is checked before it runs.

The file's `metadata_props` hold one entry, JSON under `KEY`. It names every input and output with
its type and axes, and a checksum of all that decides what the file computes: the graph, its
functions and its weights, wherever these lie. A file that was changed, cut off, or made by someone
else is refused when it is read.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from kinetiq.checkpoint import DTYPES
from kinetiq.errors import CheckpointError, RequestError
from kinetiq.export.packages import require_packages
from kinetiq.export.record_types import check_types
from kinetiq.families import FAMILIES, Family, Site, SiteKind

KEY = "kinetiq"
FORMAT = 2
PRECISIONS = ("float32", "float16", "bfloat16")
_MOST_LEVELS = 16  # of which the last would halve 65,536 pixels to one
_PIECE = 1 << 24  # bytes that are hashed at a time


@dataclass(frozen=True)
class TensorInfo:
    """An input or an output.

    Args:
        name: in the graph.
        dtype: "float32", "float16", "bfloat16" or "int64".
        axes: sizes, and names of those that may be of any size; equal names are equal sizes.
    """

    name: str
    dtype: str
    axes: tuple[str | int, ...]


@dataclass(frozen=True)
class NetworkMetadata:
    """What an exported network is.

    Args:
        format: of this record.
        checkpoint: name of the model.
        fingerprint: of the model; see `kinetiq.checkpoint.Checkpoint`.
        family: a name of `kinetiq.families.FAMILIES`.
        precision: number type of weights, latents and text.
        opset: of the standard operators.
        controls: the kinds of control that it carries, of `kinetiq.export.nodes.KINDS`.
        tap: module path of the block whose features it returns, or None.
        levels: resolutions of the network; each halves the one before, rounding up.
        positions: how many frames temporal attention can tell apart; None where it knows no place.
        sites: all attention sites, in the order in which control tensors name them.
        inputs: in order.
        outputs: in order.
        versions: of the packages that made it.
        checksum: SHA-256 of graph, functions and weights; see `checksum_of`.
    """

    format: int
    checkpoint: str
    fingerprint: str
    family: str
    precision: str
    opset: int
    controls: tuple[str, ...]
    tap: str | None
    levels: int
    positions: int | None
    sites: tuple[Site, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    versions: Mapping[str, str]
    checksum: str

    @property
    def multiple(self) -> int:
        """What the height and the width of latents must be multiples of."""
        return int(2 ** (self.levels - 1))

    def family_of(self) -> Family:
        """The family, by name."""
        return FAMILIES[self.family]


def precision_of(dtype: torch.dtype | str) -> str:
    """The name of a number type that a network can be exported in.

    Raises:
        RequestError: it is not one.
    """
    known = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    name = str(known).removeprefix("torch.")
    if name not in PRECISIONS:
        raise RequestError(f"export: dtype must be one of {', '.join(PRECISIONS)}, got {dtype}")
    return name


def level_size(height: int, width: int, level: int) -> tuple[int, int]:
    """Height and width at a level: halved that often, rounding up."""
    for _ in range(level):
        height, width = (height + 1) // 2, (width + 1) // 2
    return height, width


def level_tokens(height: int, width: int, level: int) -> int:
    """Tokens of a frame at a level."""
    return math.prod(level_size(height, width, level))


def tap_level(tap: str, levels: int) -> int:
    """How often the latents are halved in the output of a block."""
    place, _, number = tap.partition(".")
    if place == "mid_block":
        return levels - 1
    if place == "down_blocks":
        return min(int(number) + 1, levels - 1)
    return max(levels - 2 - int(number), 0)


def encode_metadata(metadata: NetworkMetadata) -> str:
    """The JSON that a file carries."""
    return json.dumps(asdict(metadata), sort_keys=True, separators=(",", ":"))


def decode_metadata(text: str, where: str) -> NetworkMetadata:
    """The record that a file carries.

    Raises:
        CheckpointError: it is not one, or another version's.
    """
    try:
        said = json.loads(text)
        if said["format"] != FORMAT:
            raise CheckpointError(
                f"{where}: must be an exported network of format {FORMAT}, got {said['format']!r}; "
                "export it again with this version"
            )
        _require_known(said, where)
        return _checked(
            NetworkMetadata(
                **{
                    **{field.name: said[field.name] for field in fields(NetworkMetadata)},
                    "controls": tuple(said["controls"]),
                    "sites": tuple(
                        Site(**{**site, "kind": SiteKind(site["kind"])}) for site in said["sites"]
                    ),
                    "inputs": _tensors(said["inputs"]),
                    "outputs": _tensors(said["outputs"]),
                }
            )
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: its metadata must be what `kinetiq export onnx` writes, and is not "
            f"({error}); export it again"
        ) from error


def _checked(metadata: NetworkMetadata) -> NetworkMetadata:
    """The record, of which types, numbers and the tap are some that a network may have.

    Raises:
        TypeError: a value is of another type.
        ValueError: it is out of range.
    """
    check_types(metadata)
    if not 1 <= metadata.levels <= _MOST_LEVELS:
        raise ValueError(f"levels must be from 1 to {_MOST_LEVELS}, got {metadata.levels}")
    if metadata.positions is not None and metadata.positions < 1:
        raise ValueError(f"positions must be at least 1, got {metadata.positions}")
    if metadata.tap is not None:
        tap_level(metadata.tap, metadata.levels)
    return metadata


def _require_known(said: Mapping[str, Any], where: str) -> None:
    """Raise a `CheckpointError` unless family and types are some that this version knows."""
    kinds = {tensor["dtype"] for tensor in (*said["inputs"], *said["outputs"])}
    for what, found, known in (
        ("family", {said["family"]}, tuple(FAMILIES)),
        ("precision", {said["precision"]}, PRECISIONS),
        ("inputs and outputs", kinds, (*PRECISIONS, "int64")),
    ):
        other = found.difference(known)
        if other:
            raise CheckpointError(
                f"{where}: its {what} must be of {', '.join(known)}, got "
                f"{', '.join(map(str, other))}; use the version that exported it, or export it "
                "again with this one"
            )


def read_metadata(path: str | os.PathLike[str]) -> NetworkMetadata:
    """What an exported network says of itself, once its checksum was found right.

    Args:
        path: an ONNX file that `export_onnx` wrote; weights outside it lie beside it.

    Raises:
        CheckpointError: it cannot be read, is not such a file, or was changed since.
    """
    return read_network(path)[1]


def as_file(path: str | os.PathLike[str], where: str) -> Path:
    """The path of a file to read.

    Args:
        path: what the user gave.
        where: what the message of an error begins with.

    Raises:
        CheckpointError: it is no path, or can be none of a file.
    """
    try:
        file = Path(path)
        os.fsencode(file)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: must be the path of a file, got {path!r}") from error
    if "\0" in str(file) or not file.name:
        raise CheckpointError(f"{where}: must be the path of a file, got {str(path)!r}")
    return file


def is_network(path: Path) -> bool:
    """Whether a file can be parsed, and says that it is an exported network; it may be damaged.

    Raises:
        MissingDependencyError: onnx is not installed.
    """
    require_packages("onnx")
    import onnx

    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:  # protobuf's own class depends on how it was built
        return False
    return any(entry.key == KEY for entry in model.metadata_props)


def read_network(path: str | os.PathLike[str]) -> tuple[Any, NetworkMetadata]:
    """The `onnx.ModelProto`, its outside weights not loaded, and what it says of itself.

    Raises:
        CheckpointError: see `read_metadata`.
        MissingDependencyError: onnx is not installed.
    """
    require_packages("onnx")
    import onnx

    file = as_file(path, "network")
    where = f"network {file}"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{where}: cannot be read: {error.strerror}; name the file that `kinetiq export onnx` "
            "wrote"
        ) from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's own class depends on how it was built
        raise CheckpointError(
            f"{where}: must be an ONNX file, and cannot be parsed; it may be cut off, or be an "
            f"engine whose record {file.name}.*.json is not beside it"
        ) from error
    said = [entry.value for entry in model.metadata_props if entry.key == KEY]
    if len(said) != 1:
        raise CheckpointError(
            f"{where}: must be a network that `kinetiq export onnx` wrote, got an ONNX file "
            "without its metadata"
        )
    metadata = decode_metadata(said[0], where)
    found = checksum_of(model, metadata, file.parent, where)
    if found != metadata.checksum:
        raise CheckpointError(
            f"{where}: its checksum must be {metadata.checksum[:16]}..., got {found[:16]}...: the "
            "file or the weights beside it were changed or damaged; export it again"
        )
    return model, metadata


def checksum_of(
    model: Any, metadata: NetworkMetadata, folder: Path, where: str = "checksum"
) -> str:
    """SHA-256 of a model as it runs: the rest of its metadata, its graph, functions and weights.

    Args:
        model: an `onnx.ModelProto`; its own metadata is not looked at.
        metadata: its checksum is not looked at.
        folder: that weights outside the file lie in.
        where: what the messages of errors begin with.

    Raises:
        CheckpointError: weights are missing.
    """
    digest = hashlib.sha256()
    said = {**asdict(metadata), "checksum": ""}
    digest.update(json.dumps(said, sort_keys=True).encode())
    bare = type(model)()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    digest.update(bare.SerializeToString(deterministic=True))
    for name, offset, length in _outside(model, where):
        _hash_part(digest, folder / name, offset, length, where)
    return digest.hexdigest()


def outside_files(model: Any, where: str = "network") -> tuple[str, ...]:
    """Names of the files beside the model that hold its weights."""
    return tuple(dict.fromkeys(name for name, _, _ in _outside(model, where)))


def _outside(model: Any, where: str) -> Iterator[tuple[str, int, int]]:
    """(file name, offset, bytes) of each weight that is not in the model itself."""
    for tensor in model.graph.initializer:
        if not tensor.external_data:
            continue
        said = {entry.key: entry.value for entry in tensor.external_data}
        name = said.get("location", "")
        if not name or Path(name).name != name:  # never read outside the model's own folder
            raise CheckpointError(
                f"{where}: weights must lie beside it, got {name!r} for {tensor.name!r}"
            )
        yield name, *_place(said, f"{where}: {tensor.name!r}")
    # A runtime would read these too, and no checksum covers them.
    nodes = [*model.graph.node, *(node for one in model.functions for node in one.node)]
    if any(tensor.external_data for tensor in _tensors_inside(nodes)):
        raise CheckpointError(f"{where}: only initialisers of its graph may lie beside it")


def _place(said: Mapping[str, str], where: str) -> tuple[int, int]:
    """Offset and bytes of a weight in its file."""
    offset, length = said.get("offset", "0"), said.get("length", "")
    if not (offset.isdecimal() and length.isdecimal()):
        raise CheckpointError(
            f"{where} must say its offset and its length in the file beside it as whole numbers, "
            f"got {offset!r} and {length!r}; export it again"
        )
    return int(offset), int(length)


def _tensors_inside(nodes: Iterable[Any]) -> Iterator[Any]:
    """Tensors in attributes of nodes, and in graphs there."""
    for given in (given for node in nodes for given in node.attribute):
        yield from (given.t, *given.tensors)
        for graph in (given.g, *given.graphs):
            yield from graph.initializer
            yield from _tensors_inside(graph.node)


def _hash_part(digest: Any, path: Path, offset: int, length: int, where: str) -> None:
    left = length
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    break
                digest.update(piece)
                left -= len(piece)
    except OSError as error:
        raise CheckpointError(
            f"{where}: its weights {path.name} must lie beside it: {error.strerror}"
        ) from error
    if left:
        raise CheckpointError(f"{where}: its weights {path.name} are cut off; export it again")


def _tensors(said: list[dict[str, Any]]) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(tensor["name"], tensor["dtype"], tuple(tensor["axes"])) for tensor in said
    )
