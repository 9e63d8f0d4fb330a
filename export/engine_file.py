"""Engines as files: a plan of TensorRT, and beside it a record of what it was built for.

A plan holds code that runs with the rights of who loads it, so one is opened only if somebody
vouches for its checksum: the caller, or this user by having built it (checksums of those are kept
in the user's cache). The checksum is of the record and the plan, so neither can be exchanged.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kinetiq.errors import CheckpointError, OutputError
from kinetiq.export.engine_profile import Bounds, Profile
from kinetiq.export.metadata import NetworkMetadata, decode_metadata, encode_metadata
from kinetiq.files import make_cache, replacing, write_text

FORMAT = 1
SUFFIX = ".json"  # behind the name of the plan


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


def write_engine(path: str | os.PathLike[str], plan: bytes, record: EngineRecord) -> EngineFile:
    """Write a plan and its record, and vouch for them as their builder.

    Raises:
        OutputError: they cannot be written.
    """
    said = _encode(record)
    checksum = _checksum(said, plan)
    file = Path(path)
    with replacing(file, "engine") as temporary:
        temporary.write_bytes(plan)
        write_text(_beside(file), json.dumps({"record": said, "checksum": checksum}), "engine")
    vouch(checksum)
    return EngineFile(file, record, checksum)


def read_engine(
    path: str | os.PathLike[str], *, trust: str | Collection[str] = ()
) -> tuple[EngineFile, bytes]:
    """An engine's record and its plan, once somebody vouches for both.

    Args:
        path: of the plan; its record lies beside it.
        trust: checksums that the caller vouches for.

    Raises:
        CheckpointError: the files are missing or damaged, or nobody vouches for them.
    """
    file = Path(path)
    where = f"engine {file}"
    try:
        plan, text = file.read_bytes(), _beside(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{where}: the plan and {file.name}{SUFFIX} beside it must be readable: {reason}; "
            "build it with `kinetiq export tensorrt`"
        ) from error
    try:
        entries = json.loads(text)
        said, checksum = str(entries["record"]), str(entries["checksum"])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{where}: {file.name}{SUFFIX} must be the record of an engine, and is not ({error!r})"
        ) from error
    if _checksum(said, plan) != checksum:
        raise CheckpointError(
            f"{where}: its checksum must be {checksum}, and is not: plan or record were changed or "
            "damaged; build it again"
        )
    vouched = {trust} if isinstance(trust, str) else set(trust)
    if checksum not in vouched | vouched_for():
        raise CheckpointError(
            f"{where}: must be an engine that somebody vouches for, since a plan is code; if you "
            f"trust where it came from, give its checksum: {checksum}"
        )
    return EngineFile(file, _decode(said, where), checksum), plan


def vouch(checksum: str) -> None:
    """Let this user open the engine with this checksum from now on.

    Raises:
        OutputError: the user's cache cannot be written.
    """
    folder = _trusted().parent
    make_cache(folder, "engine", " to keep the checksums of engines in")
    if checksum in vouched_for():
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
    """Checksums of the engines that this user built."""
    try:
        return set(_trusted().read_text(encoding="utf-8").split())
    except FileNotFoundError:
        return set()


def _trusted() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kinetiq" / "engines" / "trusted.txt"


def _beside(file: Path) -> Path:
    return file.with_name(file.name + SUFFIX)


def _checksum(said: str, plan: bytes) -> str:
    digest = hashlib.sha256(hashlib.sha256(said.encode()).digest())
    digest.update(plan)
    return digest.hexdigest()


def _encode(record: EngineRecord) -> str:
    said: dict[str, Any] = {name: getattr(record, name) for name in record.__dataclass_fields__}
    said |= {"network": encode_metadata(record.network), "profile": asdict(record.profile)}
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
        return EngineRecord(
            **{
                **entries,
                "profile": Profile({name: Bounds(*ends) for name, ends in bounds.items()}),
                "network": decode_metadata(entries["network"], where),
                "plugins": tuple(entries["plugins"]),
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: its record must be what `kinetiq export tensorrt` writes, and is not "
            f"({error!r}); build it again"
        ) from error
