"""Clips over HTTP: a JSON object of options goes in, the file of a clip comes out.

    POST /clips    {"prompt": "a red circle", "reference": "zigzag.mp4", "seed": 7}
    GET /health    {"model": "sprites", "waiting": 0, "running": 0, ...}

Keys are the options of `kinetiq generate`, with _ for -, and `format`: mp4 (default), webm, gif,
webp or png. Requests of any number of clients share one batch of the network; see
`kinetiq.live_batch`. What goes wrong is {"error": "..."} with 400 (the request), 503 (too many) or
500 (the work).
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from kinetiq import __version__
from kinetiq.clip import Clip, check_format
from kinetiq.clip_options import ClipPlan
from kinetiq.errors import BusyError, InputError, KinetiqError, RequestError
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
_MOST_BYTES = 2**20  # of a request
_TIMES = 4  # that a clip may be larger than the model's own
_MOST_WRITTEN = 2**27  # pixels of a clip, 3 bytes each
_SECONDS = 30  # to send a request, or to take the next part of an answer


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
        _require_inside(asked.named_files, self.files)
        rate, frames = asked.fps or self.defaults.fps, asked.frames or self.defaults.frames
        check_format(Path(f"clip.{form}"), frames=frames, fps=rate)
        plan = asked.plan()
        self._require_small(plan)
        controls = plan.read_controls(self.defaults)
        request = Request.from_options(asked.prompt, {**plan.options, "control": controls})
        clip = self.batch.submit(request).result()
        return _MEDIA_TYPES[form], _encode(clip, form, asked.scale)

    def _require_small(self, plan: ClipPlan) -> None:
        """Raise if a clip is so large that it could take the memory of all the others.

        A system without memory ends the process, which no `except` sees.
        """
        own, said = self.defaults, plan.options
        most = self.most_pixels or _TIMES * own.frames * own.height * own.width
        frames = said["frames"] or own.frames
        area = (said["height"] or own.height) * (said["width"] or own.width)
        if frames * area > most:
            raise RequestError(
                f"size: a clip must have at most {most} pixels in all its frames here, got "
                f"{frames * area}; start the server with --most-pixels for more"
            )
        if frames * area * plan.asked.scale**2 > _MOST_WRITTEN:
            raise RequestError(
                f"scale: a clip must have at most {_MOST_WRITTEN} pixels in all its frames when it "
                f"is enlarged, got {frames * area * plan.asked.scale**2}; enlarge it less"
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
        self.service = service
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise RequestError(
                f"serve: --host {host} and --port {port} must be free to be listened to: "
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
        return f"http://{host!s}:{port}"


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

    def do_GET(self) -> None:
        """Answer /health."""
        if self.path != "/health":
            self._refuse(HTTPStatus.NOT_FOUND, "must be POST /clips or GET /health")
            return
        self._say(HTTPStatus.OK, self.server.service.describe())

    def do_POST(self) -> None:
        """Answer /clips."""
        if self.path != "/clips":
            self._refuse(HTTPStatus.NOT_FOUND, "must be POST /clips or GET /health")
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
        self.wfile.write(data)


def _require_inside(paths: Iterable[Path], folder: Path | None) -> None:
    """Raise unless all paths lead to what is in a folder.

    Raises:
        RequestError: one does not.
    """
    for path in paths:
        if folder is None:
            raise RequestError(
                f"files: must not be named here, got {str(path)!r}; start the server with --files "
                "and the folder that holds them"
            )
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            raise RequestError(f"files: must be in the server's folder, got {str(path)!r}")


def _encode(clip: Clip, form: str, scale: int) -> bytes:
    with tempfile.TemporaryDirectory(prefix="kinetiq-") as folder:
        path = Path(folder) / f"clip.{form}"
        clip.write(path, scale=scale)
        return path.read_bytes()
