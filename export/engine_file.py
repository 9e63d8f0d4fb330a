"""Engines as files: a plan of TensorRT, and beside it a record of what it was built for.

The record is named after the content of its plan, so that two that write one engine at a time leave
one that is whole, whichever is last. No lock is held, so one moment is left: the same plan written
again between a look at what is there and the removal of the record that it had before.

A plan holds code that runs with the rights of who loads it, so one is opened only if somebody
vouches for its checksum: the caller, or this user by having built it (checksums of those are kept
in the user's cache). The checksum is of the record and the plan, so neither can be exchanged.
"""

import glob
import hashlib
import json
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kinetiq.errors import CheckpointError, KinetiqWarning, OutputError, RequestError
from kinetiq.export.engine_profile import Bounds, Profile
from kinetiq.export.gpu import Gpu
from kinetiq.export.metadata import (
    NetworkMetadata,
    as_file,
    decode_metadata,
    encode_metadata,
    is_network,
)
from kinetiq.export.record_types import check_types
from kinetiq.files import make_cache, replacing, write_text

FORMAT = 3
_NAMED = 16  # digits of the plan's digest in the name of its record
_OTHERS_WRITE = 0o022  # bits of a folder's mode


class NotVouchedForError(CheckpointError):
    """An engine is whole, and nobody vouches for it; to build it again would not help."""


@dataclass(frozen=True)
class EngineRecord:
    """What an engine was built for.

    Args:
        format: of this record.
        kinetiq: version of the library.
        runtime: "tensorrt" or "tensorrt-rtx".
        version: of that runtime; an engine runs under no other.
        target: the GPU's architecture, such as "sm_89".
        profile: sizes that the engine takes.
        network: what was built.
        plugins: names of the nodes that run our own kernels; the others run their functions.
        route: which PTX those kernels are, of `plugin_ptx.ROUTES`; None where there are none.
        attentions: how many attentions must be one kernel each.
        fused: how many kernels the runtime reports that do a whole attention; None if it does not.
        left_out: operators that were to run our kernels and do not, in part or as a whole, and why.
        gpu: on which it was built; None where it was built without one.
    """

    format: int
    kinetiq: str
    runtime: str
    version: str
    target: str
    profile: Profile
    network: NetworkMetadata
    plugins: tuple[str, ...]
    route: str | None
    attentions: int
    fused: int | None
    left_out: Mapping[str, str] = field(default_factory=dict)
    gpu: Gpu | None = None


@dataclass(frozen=True)
class EngineFile:
    """An engine on disk.

    Args:
        path: of the plan.
        record: what it was built for.
        checksum: SHA-256 of record and plan, to vouch for it elsewhere.
    """

    path: Path
    record: EngineRecord
    checksum: str


def write_engine(
    path: str | os.PathLike[str], plan: bytes, record: EngineRecord, *, vouched: bool = True
) -> EngineFile:
    """Write a plan and its record, and vouch for them as their builder.

    Args:
        path: of the plan.
        plan: the engine.
        record: what it was built for.
        vouched: whether this user may open it from now on; without it, who has its checksum may.

    Raises:
        OutputError: they cannot be written.
    """
    said = _encode(record)
    checksum = _checksum(said, plan)
    file = Path(path)
    beside = record_path(file, plan)
    with replacing(file, "engine") as temporary:
        temporary.write_bytes(plan)
        former = _record_of(file)
        # All that a plan needs is there before the plan is: nothing is missing if this ends here.
        write_text(beside, json.dumps({"record": said, "checksum": checksum}), "engine")
        if vouched:
            vouch(checksum)
    # Another may have written meanwhile: what is there now keeps its record.
    if former is not None and former not in (beside, _record_of(file)):
        former.unlink(missing_ok=True)
    return EngineFile(file, record, checksum)


def read_engine(
    path: str | os.PathLike[str], *, trust: str | Collection[str] = ()
) -> tuple[EngineFile, bytes]:
    """An engine's record and its plan, once somebody vouches for both.

    Args:
        path: of the plan; its record lies beside it.
        trust: checksums that the caller vouches for.

    Raises:
        CheckpointError: the files are missing or damaged.
        NotVouchedForError: nobody vouches for them.
    """
    file = as_file(path, "engine")
    where = f"engine {file}"
    beside = record_path(file, b"")
    try:
        plan = file.read_bytes()
        beside = record_path(file, plan)
        text = beside.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if file.exists() and list_records(file):
            raise CheckpointError(
                f"{where}: the record beside it must be of this plan, and is of another: plan or "
                f"record were changed or damaged; build {file} again"
            ) from error
        raise CheckpointError(
            f"{where}: the plan and its record {file.name}.*.json beside it must be there, and "
            f"{error.filename} is not; build it with `kinetiq export tensorrt`"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{where}: the plan and its record {file.name}.*.json beside it must be readable: "
            f"{reason}; build {file} again"
        ) from error
    try:
        entries = json.loads(text)
        said, checksum = str(entries["record"]), str(entries["checksum"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: {beside.name} must be the record of an engine, and is not ({error!r}); "
            f"build {file} again"
        ) from error
    if _checksum(said, plan) != checksum:
        raise CheckpointError(
            f"{where}: its checksum must be {checksum}, and is not: plan or record were changed or "
            f"damaged; build {file} again"
        )
    vouched = {trust} if isinstance(trust, str) else set(trust)
    if checksum not in vouched and checksum not in vouched_for():
        raise NotVouchedForError(
            f"{where}: must be an engine that somebody vouches for, since a plan is code; if you "
            f"trust where it came from, give its checksum: {checksum}; if not, build it again in "
            "its place"
        )
    return EngineFile(file, _decode(said, where), checksum), plan


def vouch(checksum: str) -> None:
    """Let this user open the engine with this checksum from now on.

    Raises:
        CheckpointError: see `vouched_for`.
        OutputError: the user's cache cannot be written.
    """
    make_engine_folder()
    if not _is_ours(engine_folder()) or checksum in vouched_for():
        return
    try:
        with _trusted().open("a", encoding="utf-8") as file:  # builds side by side add theirs too
            file.write(f"{checksum}\n")
    except OSError as error:
        raise OutputError(
            f"engine: {_trusted()} must be writable, to keep the checksums of engines in: "
            f"{error.strerror}"
        ) from error


def vouched_for() -> set[str]:
    """Checksums of the engines that this user built; none where others may write them.

    Raises:
        CheckpointError: they are there, and cannot be read.
    """
    try:
        known = set(_trusted().read_text(encoding="utf-8").split())
    except FileNotFoundError:
        return set()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"engine: {_trusted()} must be readable, since it has the checksums of the engines "
            f"that you built: {reason}; mend or delete it"
        ) from error
    return known if _is_ours(engine_folder()) else set()


def engine_folder() -> Path:
    """Where this user's engines are kept, and the checksums that this user vouches for."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kinetiq" / "engines"


def make_engine_folder() -> Path:
    """Make that folder, for this user alone, unless it is there.

    Raises:
        OutputError: it cannot be made.
    """
    folder, use = engine_folder(), " to keep engines and their checksums in"
    make_cache(folder.parent, "engine", use)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise OutputError(
            f"engine: {folder} must be a folder{use}: {error.strerror}; set XDG_CACHE_HOME to one "
            "that can be written"
        ) from error
    return folder


def require_own_folder() -> Path:
    """That folder, made unless it is there, where nobody else can write.

    Raises:
        OutputError: it cannot be made, or others can write there.
    """
    folder = make_engine_folder()
    if not _owned(folder):
        raise OutputError(f"engine: {_words_of_others(folder)}, or set XDG_CACHE_HOME")
    return folder


def is_engine(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a plan, whole or damaged: a record beside a network makes no engine of it.

    Nobody vouches for it here.
    """
    file = Path(path)
    records = list_records(file)
    return bool(records) and (_record_of(file) in records or not is_network(file))


def list_records(path: str | os.PathLike[str]) -> list[Path]:
    """The records beside a file that bear its name; a plan has one, of its content."""
    file = Path(path)
    return sorted(file.parent.glob(f"{glob.escape(file.name)}.{'[0-9a-f]' * _NAMED}.json"))


def record_path(file: Path, plan: bytes) -> Path:
    """Where the record of a plan lies."""
    return file.with_name(f"{file.name}.{hashlib.sha256(plan).hexdigest()[:_NAMED]}.json")


def _record_of(file: Path) -> Path | None:
    """The record of the plan that is at a path now."""
    try:
        with file.open("rb") as plan:
            digest = hashlib.file_digest(plan, "sha256").hexdigest()
    except OSError:
        return None
    return file.with_name(f"{file.name}.{digest[:_NAMED]}.json")


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can write a folder; said where it is not so."""
    if _owned(folder):
        return True
    warnings.warn(f"engine: {_words_of_others(folder)}", KinetiqWarning, stacklevel=3)
    return False


def _owned(folder: Path) -> bool:
    if not hasattr(os, "getuid"):
        return True  # a system where the user's folders are the user's
    found = folder.stat()
    return found.st_uid == os.getuid() and not found.st_mode & _OTHERS_WRITE


def _words_of_others(folder: Path) -> str:
    return (
        f"{folder} must be a folder that you own and nobody else can write, and is not, so the "
        f"checksums in it are not used; chmod 700 {folder}"
    )


def _trusted() -> Path:
    return engine_folder() / "trusted.txt"


def _checksum(said: str, plan: bytes) -> str:
    digest = hashlib.sha256(hashlib.sha256(said.encode()).digest())
    digest.update(plan)
    return digest.hexdigest()


def _encode(record: EngineRecord) -> str:
    said: dict[str, Any] = {name: getattr(record, name) for name in record.__dataclass_fields__}
    said |= {
        "network": encode_metadata(record.network),
        "profile": asdict(record.profile),
        "gpu": None if record.gpu is None else asdict(record.gpu),
    }
    return json.dumps(said, sort_keys=True)


def _decode(said: str, where: str) -> EngineRecord:
    try:
        entries: Mapping[str, Any] = json.loads(said)
        if entries["format"] != FORMAT:
            raise CheckpointError(
                f"{where}: must be an engine of format {FORMAT}, got {entries['format']!r}; build "
                "it again with this version"
            )
        bounds = entries["profile"]["bounds"]
        return _checked(
            EngineRecord(
                **{
                    **entries,
                    "profile": Profile({name: Bounds(*ends) for name, ends in bounds.items()}),
                    "network": decode_metadata(entries["network"], where),
                    "plugins": tuple(entries["plugins"]),
                    "left_out": dict(entries["left_out"]),
                    "gpu": None if entries["gpu"] is None else Gpu(**entries["gpu"]),
                }
            )
        )
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, RequestError) as error:
        raise CheckpointError(
            f"{where}: its record must be what `kinetiq export tensorrt` writes, and is not "
            f"({error!r}); build it again"
        ) from error


def _checked(record: EngineRecord) -> EngineRecord:
    """The record, of which types are right and every axis of an input has bounds.

    Raises:
        KeyError: an axis has none.
        RequestError: bounds are out of order.
        TypeError: a value is of another type.
    """
    check_types(record)
    for tensor in record.network.inputs:
        for axis in tensor.axes:
            if isinstance(axis, str):
                record.profile.bounds[axis].check(axis)
    return record
