"""Clips over HTTP: what comes back, and that nothing that comes in does harm."""

import errno
import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest

from kinetiq import clip
from kinetiq.clip import Clip
from kinetiq.engine import Defaults, Engine
from kinetiq.errors import BusyError, NonFiniteError, RequestError, WorkError
from kinetiq.live_batch import LiveBatch
from kinetiq.server import ClipServer, ClipService

SECONDS = 60
JSON = {"Content-Type": "application/json"}


class Painter:
    """A batch whose clips are there at once, or whatever was set in their place."""

    waiting, running = 3, 2

    def require_room(self):
        if isinstance(self.error, BusyError):
            raise self.error

    def __init__(self):
        self.asked = []
        self.error = None

    def submit(self, request):
        self.asked.append(request)
        if isinstance(self.error, BusyError):
            raise self.error
        clip = Future()
        if self.error is None:
            frames = np.full((4, 16, 24, 3), 20 * request.seed, np.uint8)
            frames += np.arange(4, dtype=np.uint8)[:, None, None, None]
            clip.set_result(Clip(frames, 8.0))
        else:
            clip.set_exception(self.error)
        return clip


@pytest.fixture
def batch():
    return Painter()


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    moving = np.zeros((9, 8, 8, 3), np.uint8)
    moving[range(8), :, range(8)] = 255
    Clip(moving, 8).write(folder / "good.gif")
    Clip(moving, 8).write(tmp_path / "secret.gif")
    (folder / "out").symlink_to(tmp_path / "secret.gif")
    (folder / "linked").mkdir()
    (folder / "linked" / "0.gif").symlink_to(tmp_path / "secret.gif")
    return folder


@pytest.fixture
def server(batch, files):
    defaults = Defaults(frames=8, height=16, width=24, steps=9, guidance_scale=7.5, fps=8.0)
    with ClipServer(ClipService(batch, defaults, "m", files), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def ask(server):
    """Send a request; the status, the headers, and what came."""

    def ask(body=None, *, method="POST", path="/clips", headers=JSON):
        connection = http.client.HTTPConnection(*server.server_address, timeout=SECONDS)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, dict(headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        said = (
            json.loads(content)
            if answer.getheader("Content-Type") == JSON["Content-Type"]
            else content
        )
        return answer.status, dict(answer.getheaders()), said

    return ask


class TestAnswers:
    @pytest.mark.parametrize(
        ("form", "media"),
        [
            (None, "video/mp4"),
            ("webm", "video/webm"),
            ("gif", "image/gif"),
            ("webp", "image/webp"),
        ],
    )
    def test_a_clip_in_the_format_that_was_asked_for(self, ask, tmp_path, form, media):
        status, headers, data = ask({"prompt": "a", "seed": 3, "scale": 2, "format": form or "mp4"})
        assert (status, headers["Content-Type"]) == (200, media)
        assert int(headers["Content-Length"]) == len(data)
        path = tmp_path / f"clip.{form or 'mp4'}"
        path.write_bytes(data)
        clip = Clip.read(path)
        assert clip.frames.shape == (4, 32, 48, 3)
        assert abs(int(clip.frames[0, 0, 0, 0]) - 60) <= 3  # a video loses a little

    def test_options_reach_the_request(self, ask, batch):
        line = {"prompt": "a", "seed": 5, "steps": 7, "reference": "good.gif", "control": "query"}
        assert ask(line)[0] == 200
        (request,) = batch.asked
        assert (request.prompt, request.seed, request.steps) == ("a", 5, 7)
        assert request.control[0].reference.num_frames == 9

    def test_health(self, ask):
        status, _, said = ask(method="GET", path="/health", headers={})
        assert status == 200
        assert (said["model"], said["waiting"], said["running"]) == ("m", 3, 2)
        assert said["defaults"]["frames"] == 8

    def test_many_at_a_time(self, ask):
        with ThreadPoolExecutor(16) as threads:
            answers = list(
                threads.map(
                    lambda n: ask({"prompt": "a", "seed": n % 12, "format": "webp"}), range(64)
                )
            )
        assert [status for status, *_ in answers] == [200] * 64
        assert len({data for *_, data in answers}) == 12


class TestRefusals:
    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ({}, "Missing option '--prompt'"),
            ([], 'must be a JSON object such as {"prompt": "a ring"}, got []'),
            (b"{", "must be a JSON object, got what is none"),
            (b"\xff", "must be text in UTF-8"),
            ({"prompt": "a", "out": "x.mp4"}, "keys must be among format, prompt"),
            ({"prompt": "a", "format": "avi"}, "format: must be one of mp4, webm, gif, webp, png"),
            ({"prompt": "a", "format": ["mp4"]}, 'got ["mp4"]'),
            ({"prompt": "a", "format": "png"}, "can hold one frame, got 8"),
            ({"prompt": "a", "steps": 0}, "steps: must be a whole number"),
            ({"prompt": "a", "frames": 33}, "a clip must have at most 12288 pixels in all its"),
            ({"prompt": "a", "size": "64x32"}, "got 16384; start the server with --most-pixels"),
            ({"prompt": "a", "reference": "missing.gif"}, "missing.gif"),
            ({"prompt": "a", "reference": "../secret.gif"}, "must be in the server's folder"),
            ({"prompt": "a", "reference": "out"}, "must be in the server's folder"),
            ({"prompt": "a", "moft": "/etc/passwd"}, "must be in the server's folder"),
            ({"prompt": "a", "motion": "-2*../secret"}, "must be in the server's folder"),
            ({"prompt": "a", "region": "../secret.gif:left"}, "must be in the server's folder"),
            ({"prompt": "a", "region": "x:/etc/passwd"}, "folder, got '/etc/passwd'"),
            ({"prompt": "a", "region": "x:/etc/none"}, "folder, got '/etc/none'"),
            ({"prompt": "a", "motion": "-/etc/none"}, "folder, got '/etc/none'"),
            ({"prompt": "a", "reference": "linked"}, "folder, got 'linked'"),
            ({"prompt": "a", "fps": 0, "format": "gif"}, "fps: must be a number from"),
        ],
    )  # fmt: skip
    def test_of_requests_that_cannot_be_made(self, ask, batch, line, words):
        status, _, said = ask(line)
        assert status == 400
        assert words in said["error"]
        assert batch.asked == []

    @pytest.mark.parametrize(
        ("asked", "status"),
        [
            ({"path": "/"}, 404),
            ({"path": "/clips", "method": "GET"}, 404),
            ({"headers": {"Content-Type": "text/plain"}}, 415),
            ({"headers": {}}, 415),
            ({"body": b"[" * (2**16 + 1)}, 413),
            ({"headers": {**JSON, "Host": "evil.example"}}, 421),
            ({"headers": {**JSON, "Host": "evil.example:80"}}, 421),
            (
                {"headers": {**JSON, "Host": "evil.example"}, "method": "GET", "path": "/health"},
                421,
            ),
            ({"headers": {"Content-Type": "text/plain; x=application/json"}}, 415),
            ({"headers": {**JSON, "Content-Length": "9" * 30}}, 413),
            ({"headers": {**JSON, "Content-Length": "-1"}}, 411),
            ({"method": "DELETE"}, 501),
        ],
    )
    def test_of_what_is_no_request(self, ask, batch, asked, status):
        asked = {"body": b'{"prompt": "a"}', **asked}
        came, _, said = ask(asked.pop("body"), **asked)
        assert came == status
        assert said["error"]
        assert batch.asked == []

    def test_a_request_that_takes_too_long_is_ended(self, server, ask, monkeypatch):
        """However steadily it comes."""
        monkeypatch.setattr(server.RequestHandlerClass, "timeout", 1.0)
        connections = [
            socket.create_connection(server.server_address, timeout=SECONDS) for _ in range(2)
        ]
        connections[0].sendall(b"POST /clips HTTP/1.1\r\nHost: localhost\r\n")
        connections[1].sendall(
            b"POST /clips HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 999\r\n\r\n"
        )
        start = time.monotonic()
        answers = {}
        while len(answers) < 2 and time.monotonic() - start < SECONDS:
            for one in connections:
                with suppress(OSError):
                    one.sendall(b"a")
                ready, *_ = select.select([one], [], [], 0.2)
                if ready:
                    answers.setdefault(one, one.recv(100))
        for one in connections:
            one.close()
        assert len(answers) == 2
        assert b" 408 " in answers[connections[1]]
        assert ask({"prompt": "a"})[0] == 200

    def test_a_client_that_is_slow_gets_all_of_a_large_answer(self, server, batch, monkeypatch):
        """Which takes longer than a part of it may take."""
        monkeypatch.setattr(server.RequestHandlerClass, "timeout", 1.0)
        data = np.random.default_rng(0).bytes(8 * 2**20)
        monkeypatch.setattr(ClipService, "make", lambda *_: ("video/mp4", data))
        with socket.create_connection(server.server_address, timeout=SECONDS) as connection:
            connection.sendall(
                b"POST /clips HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 2\r\n\r\n{}"
            )
            came, start = b"", time.monotonic()
            while part := connection.recv(2**17):
                came += part
                time.sleep(0.03)
        assert time.monotonic() - start > 1.5
        assert came.endswith(data)
        assert batch.asked == []

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (BusyError("serve: so many wait"), 503),
            (NonFiniteError("step 3: latents must be finite"), 500),
            (RequestError("generate: frames: must be fewer"), 400),
            (ZeroDivisionError("a fault"), 500),
        ],
    )
    def test_of_what_fails_later(self, ask, batch, error, status, capfd):
        batch.error = error
        came, headers, said = ask({"prompt": "a"})
        assert came == status
        assert str(error).removeprefix("generate: ") in said["error"]
        assert headers.get("Retry-After") == ("1" if status == 503 else None)
        assert ("Traceback" in capfd.readouterr().err) == isinstance(error, ZeroDivisionError)

    def test_larger_clips_where_they_may_be(self, batch):
        own = Defaults(frames=8, height=16, width=24, steps=9, guidance_scale=7.5, fps=8.0)
        service = ClipService(batch, own, "m", most_pixels=16384)
        service.make(b'{"prompt": "a", "size": "64x32", "format": "webp"}')
        with pytest.raises(RequestError, match="at most 16384 pixels"):
            service.make(b'{"prompt": "a", "size": "64x32", "frames": 9}')
        service = ClipService(batch, own, "m", most_pixels=10**6)
        with pytest.raises(RequestError, match="when it is enlarged, got 150994944"):
            service.make(b'{"prompt": "a", "size": "64x64", "frames": 9, "scale": 64}')

    def test_without_a_folder_no_file_may_be_named(self, batch):
        service = ClipService(batch, SimpleNamespace(frames=8, fps=8.0), "m")
        with pytest.raises(RequestError, match="start the server with --files"):
            service.make(b'{"prompt": "a", "reference": "good.gif"}')

    def test_a_client_that_goes_away_is_no_matter(self, server, ask, capfd):
        for words in (b"", b"POST /clips HTTP/1.1\r\n", b"nonsense\r\n\r\n"):
            with socket.create_connection(server.server_address, timeout=SECONDS) as connection:
                connection.sendall(words)
        assert ask({"prompt": "a"})[0] == 200
        assert "Traceback" not in capfd.readouterr().err

    def test_a_port_that_is_taken(self, server):
        with pytest.raises(RequestError, match="must be this machine's and free"):
            ClipServer(server.service, *server.server_address)

    def test_no_host_is_not_every_host(self, server):
        with pytest.raises(RequestError, match="--host must be an address or a name, got none"):
            ClipServer(server.service, "", 0)

    def test_whoever_opens_it_to_others_is_asked_for_by_any_name(self, server):
        with ClipServer(server.service, "0.0.0.0", 0) as public:  # noqa: S104
            assert not public.is_private
        assert server.is_private
        if socket.has_ipv6:
            with ClipServer(server.service, "::1", 0) as other:
                assert other.is_private
                assert other.address.startswith("http://[::1]:")

    def test_a_disk_that_is_full_is_no_fault_of_the_client(self, server, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "no room")

        body = b'{"prompt": "a", "format": "webp"}'
        monkeypatch.setattr(clip, "_write_animation", full)
        with pytest.raises(WorkError, match="must be written for a moment: no room"):
            server.service.make(body)

        def refuse(*_):
            raise ValueError("too wide")

        monkeypatch.setattr(clip, "_write_animation", refuse)
        with pytest.raises(RequestError, match=r"^\.webp must be able to hold .*too wide"):
            server.service.make(body)


def test_requests_of_several_clients_share_a_batch(files):
    """With the embedded model: each gets the clip that it asked for."""
    seeds = range(3)
    with Engine.load("sprites") as engine:
        wanted = [engine.generate("a red circle", seed=seed, steps=3) for seed in seeds]
        with LiveBatch(engine) as batch:
            service = ClipService(batch, engine.defaults, "sprites", files)
            lines = [
                {"prompt": "a red circle", "seed": seed, "steps": 3, "format": "webp"}
                for seed in seeds
            ]
            with ThreadPoolExecutor(3) as threads:
                made = list(threads.map(service.make, [json.dumps(n).encode() for n in lines]))
    for (_, data), one in zip(made, wanted, strict=True):
        (files / "made.webp").write_bytes(data)
        difference = Clip.read(files / "made.webp").frames.astype(int) - one.frames
        assert np.abs(difference).max() <= 1


class TestCommand:
    @pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
    def test_from_the_start_to_the_end(self, tmp_path, stop):
        """What is under way at a signal is finished, and then the server ends well."""
        # As from a terminal: what is started in the background by a script ignores SIGINT.
        code = (
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from kinetiq.__main__ import main; main()"
        )
        words = [sys.executable, "-c", code, "serve", "--port", "0", "--max-clips", "1"]
        process = subprocess.Popen(
            words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            found = re.fullmatch(
                r"sprites at http://(.+):(\d+): POST .*\n", process.stdout.readline()
            )

            def ask(path, **line):
                connection = http.client.HTTPConnection(found[1], int(found[2]), timeout=SECONDS)
                method = "POST" if line else "GET"
                connection.request(method, path, json.dumps(line), JSON)
                answer = connection.getresponse()
                return answer.status, answer.read()

            with ThreadPoolExecutor(4) as threads:
                asked = [
                    threads.submit(ask, "/clips", prompt="a", steps=20, seed=seed)
                    for seed in range(4)
                ]
                while json.loads(ask("/health")[1])["waiting"] < 3:
                    assert process.poll() is None
                    time.sleep(0.02)
                os.kill(process.pid, stop)
                statuses = [one.result(SECONDS)[0] for one in asked]
            assert set(statuses) == {200, 503}
            _, said = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, said
            assert "Traceback" not in said
        finally:
            process.kill()
            process.communicate()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--files", "missing"), "serve: --files must be a folder, got 'missing'"),
            (("--host", "no.such.host.invalid", "--port", "0"), "must be this machine's and free"),
            (("--port", "70000"), "Invalid value for '--port'"),
        ],
    )
    def test_bad_input(self, tmp_path, words, message):
        done = subprocess.run(
            [sys.executable, "-m", "kinetiq", "serve", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
