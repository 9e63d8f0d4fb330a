"""Clips over HTTP: a JSON object of options goes in, the file of a clip comes out.

    POST /clips    {"prompt": "a red circle", "reference": "zigzag.mp4", "seed": 7}
    GET /health    {"model": "sprites", "waiting": 0, "running": 0, ...}

Keys are the options of `kinetiq generate`, with _ for -, and `format`: mp4 (default), webm, gif,
webp or png. Requests of any number of clients share one batch of the network; see
`kinetiq.live_batch`. What goes wrong is {"error": "..."} with 400 (the request), 503 (too many),
500 (the work), or another status of HTTP where it was no such request.
"""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from kinetiq import __version__
from kinetiq.clip import Clip, check_format
from kinetiq.clip_options import ClipOptions
from kinetiq.errors import (
    BusyError,
    InputError,
    KinetiqError,
    OutputError,
    RequestError,
    WorkError,
)
from kinetiq.live_batch import LiveBatch
from kinetiq.manifest import parse_clip, read_object
from kinetiq.request import Request

if TYPE_CHECKING:
    from kinetiq.engine import Defaults

_MEDIA_TYPES = {
    "mp4": "video/mp4",
    "webm": "video/webm",
    "gif": "image/gif",
    "webp": "image/webp",
    "png": "image/png",
}
_MOST_BYTES = 2**16  # of a request, whose prompt is cut into words by all others' thread
_TIMES = 4  # that a clip may be larger than the model's own
_MOST_WRITTEN = 2**27  # pixels of a clip, 3 bytes each
_SECONDS = 30.0  # to send a whole request, and to take a part of an answer
_PART = 2**16  # bytes of an answer
_READERS = 2  # requests whose clips are read or written at a time, each with memory of its own
_NAMES = ("localhost", "127.0.0.1", "[::1]")  # of this machine


@attrs.frozen
class ClipService:
    """What answers requests.

    Args:
        batch: what generates.
        defaults: of the model.
        model: its name.
        files: the folder whose files requests may name; None: they may name none.
        most_pixels: of all frames of a clip; None: 4 times those of the model's own clips.
    """

    batch: LiveBatch
    defaults: "Defaults"
    model: str
    files: Path | None = None
    most_pixels: int | None = None
    _reading: threading.Semaphore = attrs.field(factory=lambda: threading.Semaphore(_READERS))

    def make(self, body: bytes) -> tuple[str, bytes]:
        """The media type and the file of the clip that a request asks for, once it is made.

        Raises:
            KinetiqError: it cannot be made.
        """
        said = read_object(body)
        form = said.pop("format", "mp4")
        if not isinstance(form, str) or form not in _MEDIA_TYPES:
            raise RequestError(
                f"format: must be one of {', '.join(_MEDIA_TYPES)}, got {json.dumps(form)}"
            )
        asked = parse_clip(said, self.files or Path(), "format")
        _require_inside(asked, self.files)
        self._require_small(asked.request_options(), asked.scale)
        rate, frames = asked.fps or self.defaults.fps, asked.frames or self.defaults.frames
        check_format(Path(f"clip.{form}"), frames=frames, fps=rate)
        self.batch.require_room()
        with self._reading:
            plan = asked.plan()
            controls = plan.read_controls(self.defaults)
        request = Request.from_options(asked.prompt, {**plan.options, "control": controls})
        clip = self.batch.submit(request).result()
        with self._reading:
            return _MEDIA_TYPES[form], _encode(clip, form, asked.scale)

    def _require_small(self, said: Mapping[str, Any], scale: int) -> None:
        """Raise if a clip is so large that it could take the memory of all the others.

        A system without memory ends the process, which no `except` sees.
        """
        own = self.defaults
        most = self.most_pixels or _TIMES * own.frames * own.height * own.width
        frames = said["frames"] or own.frames
        area = (said["height"] or own.height) * (said["width"] or own.width)
        if frames * area > most:
            raise RequestError(
                f"size: a clip must have at most {most} pixels in all its frames here, got "
                f"{frames * area}; start the server with --most-pixels for more"
            )
        if frames * area * scale**2 > _MOST_WRITTEN:
            raise RequestError(
                f"scale: a clip must have at most {_MOST_WRITTEN} pixels in all its frames when it "
                f"is enlarged, got {frames * area * scale**2}; enlarge it less"
            )

    def describe(self) -> dict[str, Any]:
        """What GET /health says."""
        return {
            "model": self.model,
            "waiting": self.batch.waiting,
            "running": self.batch.running,
            "defaults": attrs.asdict(self.defaults),
            "version": __version__,
        }


class ClipServer(ThreadingHTTPServer):
    """Listens from when it is made until `server_close`, which waits for answers under way."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, service: ClipService, host: str, port: int) -> None:
        """At a host and a port; port 0 is one that is free.

        Raises:
            RequestError: they cannot be listened to.
        """
        if not host:  # which would be every address of this machine
            raise RequestError("serve: --host must be an address or a name, got none")
        self.service = service
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise RequestError(
                f"serve: --host {host} and --port {port} must be this machine's and free: "
                f"{error.strerror}"
            ) from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away, as they do."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """Its address, as browsers have them."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}"

    @property
    def is_private(self) -> bool:
        """Whether it can be reached from this machine alone."""
        return ip_address(str(self.server_address[0])).is_loopback


@contextlib.contextmanager
def stopping_by_signal(batch: LiveBatch) -> Iterator[None]:
    """Within the block, SIGINT and SIGTERM end it, and what waits for its turn is given up.

    In the main thread alone, which is the one that gets signals.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        batch.close()
    finally:
        signal.signal(signal.SIGTERM, former)


class _Handler(BaseHTTPRequestHandler):
    server: ClipServer
    server_version = f"kinetiq/{__version__}"
    sys_version = ""
    timeout = _SECONDS

    def handle(self) -> None:
        """Answer a request that comes in time, however slowly each of its bytes does."""
        late = threading.Timer(self.timeout, self._stop_reading)
        late.start()
        try:
            super().handle()
        finally:
            late.cancel()
            late.join()  # no thread is left to an interpreter that ends

    def do_GET(self) -> None:
        """Answer /health."""
        if self._is_asked_for("/health"):
            self._say(HTTPStatus.OK, self.server.service.describe())

    def do_POST(self) -> None:
        """Answer /clips."""
        if not self._is_asked_for("/clips"):
            return
        # Which pages of browsers cannot send to other sites without asking.
        if self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "must have type application/json")
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "must say its Content-Length")
            return
        if len(length) > 12 or int(length) > _MOST_BYTES:
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"must have at most {_MOST_BYTES} bytes"
            )
            return
        body = self.rfile.read(int(length))
        if len(body) < int(length):  # the client went away, or took too long
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"must come within {self.timeout:g} seconds")
            return
        try:
            media, data = self.server.service.make(body)
        except BusyError as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, error)
        except KinetiqError as error:
            bad = isinstance(error, InputError)
            self._refuse(HTTPStatus.BAD_REQUEST if bad else HTTPStatus.INTERNAL_SERVER_ERROR, error)
        except Exception as error:  # a fault of ours: it is said to both sides
            traceback.print_exc()
            self._refuse(
                HTTPStatus.INTERNAL_SERVER_ERROR, f"serve: {type(error).__name__}: {error}"
            )
        else:
            self._send(HTTPStatus.OK, media, data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what is not even HTTP, as all else is refused."""
        status = HTTPStatus(code)
        self._refuse(status, message or explain or status.phrase)

    def _is_asked_for(self, path: str) -> bool:
        """Whether this is asked for, of us and not of another name for our address; else refuse.

        By such a name a page of another site would count as one of ours in its browser.
        """
        name = self.headers.get("Host", "").rpartition(":")
        host = name[0] if name[1] and name[2].isdecimal() else name[2]
        if self.server.is_private and host not in _NAMES:
            self._refuse(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"Host must be one of {', '.join(_NAMES)}, got {host!r}; a proxy must send such a "
                "one",
            )
        elif self.path != path:
            self._refuse(HTTPStatus.NOT_FOUND, "must be POST /clips or GET /health")
        else:
            return True
        return False

    def _stop_reading(self) -> None:
        with contextlib.suppress(OSError):  # it is closed already
            self.connection.shutdown(socket.SHUT_RD)

    def _refuse(self, status: HTTPStatus, error: object) -> None:
        self._say(status, {"error": str(error).removeprefix("generate: ")})

    def _say(self, status: HTTPStatus, what: Mapping[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(what).encode() + b"\n")

    def _send(self, status: HTTPStatus, media: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media)
        self.send_header("Content-Length", str(len(data)))
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", "1")
        self.end_headers()
        for start in range(0, len(data), _PART):  # each of which has the time that there is
            self.wfile.write(data[start : start + _PART])


def _require_inside(asked: ClipOptions, folder: Path | None) -> None:
    """Raise unless all that options could name is in a folder, before anything is looked for.

    Raises:
        RequestError: something is not.
    """
    said = [str(path) for path in (asked.reference, asked.moft) if path is not None]
    words = [*asked.regions, *asked.motions]
    # Words may be a path, or have one behind or before a mark; which, depends on what is there.
    said += [part.lstrip("-") for each in words for part in (each, *re.split("[:*]", each))]
    for name in filter(None, said):
        if folder is None:
            raise RequestError(
                f"files: must not be named here, got {name!r}; start the server with --files and "
                "the folder that holds them"
            )
        path = folder / name
        inside = path.iterdir() if _is_inside(path, folder) and path.is_dir() else ()
        if not all(_is_inside(each, folder) for each in (path, *inside)):
            raise RequestError(f"files: must be in the server's folder, got {name!r}")


def _is_inside(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _encode(clip: Clip, form: str, scale: int) -> bytes:
    """The file of a clip.

    Raises:
        RequestError: the format cannot hold it.
        WorkError: the disk cannot.
    """
    with tempfile.TemporaryDirectory(prefix="kinetiq-") as folder:
        path = Path(folder) / f"clip.{form}"
        try:
            clip.write(path, scale=scale)
            return path.read_bytes()
        except OutputError as error:
            if isinstance(error.__cause__, OSError):
                raise WorkError(
                    f"serve: the clip must be written for a moment: {error.__cause__.strerror}"
                ) from error
            raise RequestError(str(error).removeprefix("Clip.write: ")) from error
