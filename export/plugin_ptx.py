"""PTX as TensorRT can embed it, made from the PTX that Triton writes.

Triton gives a kernel two arguments more than it declares, for scratch memory that our kernels do
not use; names it after its function, while TensorRT tells kernels apart by name alone; writes a
newer version of the language than TensorRT's loader reads; and asks for an architecture with the
suffix "a" where it may use that architecture's own instructions.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from kinetiq.errors import RequestError, WorkError

LANGUAGE = 90  # PTX 9.0, the newest that TensorRT's loader is known to read
PLAIN_SHARED = 48 * 1024  # bytes a block may have without the driver being asked for more
_ENTRY = re.compile(r"\.visible \.entry (?P<name>\w+)\s*\((?P<parameters>[^)]*)\)")


@dataclass(frozen=True)
class Route:
    """Which PTX a GPU is given.

    Args:
        architecture: that the kernel is compiled for, without a suffix.
        own: whether it keeps the suffix, and with it the architecture's own instructions. Such
            PTX runs on no other architecture, and TensorRT's loader is said to refuse it.
    """

    architecture: str
    own: bool = False

    @property
    def name(self) -> str:
        """Such as "sm_90a"."""
        return self.architecture + "a" * self.own


# The first is taken unless another is asked for. Kernels for sm_90 and sm_100 are made of those
# architectures' own matrix instructions, which do not assemble without the suffix; the driver
# compiles PTX of an older architecture for them, whose matrix instructions they still have. So it
# does for those that no kernel is tuned for.
ROUTES: Mapping[str, tuple[Route, ...]] = {
    "sm_80": (Route("sm_80"),),
    "sm_86": (Route("sm_86"),),
    "sm_87": (Route("sm_80"),),
    "sm_89": (Route("sm_89"),),
    "sm_90": (Route("sm_80"), Route("sm_90", own=True)),
    "sm_100": (Route("sm_80"), Route("sm_100", own=True)),
    "sm_103": (Route("sm_80"),),
    "sm_110": (Route("sm_80"),),
    "sm_120": (Route("sm_120"),),
    "sm_121": (Route("sm_120"),),
}


def find_route(target: str, name: str | None = None) -> Route:
    """The route to a target: the named one, or the first.

    Raises:
        RequestError: the target is not known, or has no such route.
    """
    if target not in ROUTES:
        raise RequestError(f"plugins: target must be one of {', '.join(ROUTES)}, got {target!r}")
    for route in ROUTES[target]:
        if name in (None, route.name):
            return route
    known = ", ".join(route_names(target))
    raise RequestError(f"plugins: the route to {target} must be one of {known}, got {name!r}")


def check_route(name: str) -> None:
    """Raise a `RequestError` unless a route of this name leads to any target."""
    known = dict.fromkeys(route.name for routes in ROUTES.values() for route in routes)
    if name not in known:
        raise RequestError(f"export: route must be one of {', '.join(known)}, got {name!r}")


def route_names(target: str) -> list[str]:
    """The names of a target's routes, the one that is usual first."""
    return [route.name for route in ROUTES[target]]


def parameters(ptx: str) -> tuple[str, list[str]]:
    """The entry's name, and the type of each of its parameters, such as "u64".

    Raises:
        WorkError: there is not exactly one entry.
    """
    entry = _find_entry(ptx)
    return entry["name"], re.findall(r"\.param \.(\w+)", entry["parameters"])


def embed(ptx: str, arguments: int, route: Route) -> tuple[str, str]:
    """The kernel's new name, and its PTX with that name and no parameters but its arguments.

    Args:
        ptx: as Triton writes it.
        arguments: how many the kernel declares that are no constants.
        route: what it was compiled for.

    Raises:
        WorkError: the kernel uses a hidden parameter, or is written in a newer language than
            TensorRT reads.
    """
    entry = _find_entry(ptx)
    every = [parameter.strip() for parameter in entry["parameters"].split(",")]
    kept, hidden = every[:arguments], every[arguments:]
    body = ptx[entry.end() :]
    for parameter in hidden:
        if parameter.split()[-1] in body:
            raise WorkError(
                f"plugins: kernel {entry['name']} must use no scratch memory, got a use of "
                f"{parameter!r}"
            )
    if len(kept) != arguments:
        raise WorkError(
            f"plugins: kernel {entry['name']} must have {arguments} parameters, got {len(kept)}"
        )
    head = ptx[: entry.start("parameters")]
    ptx = head + "\n\t" + ",\n\t".join(kept) + "\n)" + body
    version = re.search(r"^\.version (\d+)\.(\d+)", ptx, re.MULTILINE)
    if version is None or int(version[1]) * 10 + int(version[2]) > LANGUAGE:
        raise WorkError(
            f"plugins: PTX must be of version {LANGUAGE / 10} at most, "
            f"got {version and version[0]!r}"
        )
    if not route.own:
        ptx = re.sub(r"^(\.target sm_\d+)a\b", r"\1", ptx, count=1, flags=re.MULTILINE)
    name = f"{entry['name']}_{hashlib.sha256(ptx.encode()).hexdigest()[:16]}"
    return name, re.sub(rf"\b{entry['name']}(?=\b|_param_)", name, ptx)


def _find_entry(ptx: str) -> re.Match[str]:
    entries = list(_ENTRY.finditer(ptx))
    if len(entries) != 1:
        raise WorkError(f"plugins: PTX must have one entry, got {len(entries)}")
    return entries[0]
