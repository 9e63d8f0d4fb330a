"""Requests that come at any time, from many threads, in one batch of the network.

A request joins the clips that are under way at their next step, if it has their shape and there is
room; else it waits for them. Its clip does not depend on its neighbours.
"""

import itertools
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Self

import attrs

from kinetiq.clip import Clip
from kinetiq.errors import BusyError, KinetiqError, RequestError, WorkError
from kinetiq.request import Request

if TYPE_CHECKING:
    from kinetiq.engine import Engine


@attrs.frozen
class _Asked:
    """A request, and where its clip is to come."""

    request: Request
    clip: "Future[Clip]"


class LiveBatch:
    """A thread that generates what is submitted, from the start of a `with` block to its end.

    At the end of the block clips that are under way are finished, and those that wait are not made.
    """

    def __init__(self, engine: "Engine", *, max_clips: int = 8, most_waiting: int = 64) -> None:
        """Of an engine that nobody else uses meanwhile.

        Args:
            engine: what generates.
            max_clips: clips in a batch.
            most_waiting: requests that may wait for their turn.
        """
        self._engine = engine
        self._max_clips = max_clips
        self._most_waiting = most_waiting
        self._changed = threading.Condition()
        self._waiting: deque[_Asked] = deque()
        self._running: dict[int, Future[Clip]] = {}
        self._open = False
        self._thread = threading.Thread(target=self._run, name="kinetiq-batch")

    def __enter__(self) -> Self:
        self._open = True
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:
            self._thread.join()

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests whose turn it is."""
        return len(self._running)

    def require_room(self) -> None:
        """Raise what `submit` would, before a request is made for it at a cost.

        Raises:
            BusyError: too many wait, or none are taken.
        """
        with self._changed:
            self._require_room()

    def submit(self, request: Request) -> "Future[Clip]":
        """Ask for a clip.

        Returns:
            Where it comes, or a `KinetiqError` in its place. It can be cancelled while it waits.

        Raises:
            BusyError: too many wait, or none are taken, before the `with` block and after it.
            RequestError: it is no request.
        """
        if not isinstance(request, Request):
            raise RequestError(f"request: must be a Request here, got {type(request).__name__}")
        asked = _Asked(request, Future())
        with self._changed:
            self._require_room()
            self._waiting.append(asked)
            self._changed.notify()
        return asked.clip

    def _require_room(self) -> None:
        if not self._open:
            raise _not_open()
        if len(self._waiting) >= self._most_waiting:
            raise BusyError(
                f"serve: at most {self._most_waiting} requests may wait for their turn, and so "
                "many do; ask again later"
            )

    def close(self) -> None:
        """Take no more requests, and give up those that wait; does not wait itself."""
        with self._changed:
            self._open = False
            given_up = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for asked in given_up:
            if asked.clip.set_running_or_notify_cancel():
                asked.clip.set_exception(_not_open())

    def _run(self) -> None:
        try:
            self._generate()
        finally:  # also of a thread that ends as it should not: nobody must wait for ever
            self.close()
            self._fail(_not_open())

    def _generate(self) -> None:
        ended = False
        while not ended:
            try:
                results = self._engine.generate_as_completed(
                    self._draw(), max_clips=self._max_clips
                )
                for place, result in results:
                    _settle(self._running.pop(place), result)
                ended = True
            except Exception as error:  # whatever it is, the next request may do better
                traceback.print_exc()
                words = f"serve: the batch failed: {type(error).__name__}: {error}"
                self._fail(WorkError(words))

    def _fail(self, error: KinetiqError) -> None:
        """Tell all whose clips are under way."""
        while self._running:
            self._running.popitem()[1].set_exception(error)

    def _draw(self) -> Iterator[Request | None]:
        """What waits, and None where nothing does while others are under way; ends when closed."""
        for place in itertools.count():
            while (asked := self._take()) is None:
                if not self._open:
                    return
                yield None
            self._running[place] = asked.clip
            yield asked.request

    def _take(self) -> _Asked | None:
        with self._changed:
            if not self._running:
                self._changed.wait_for(lambda: self._waiting or not self._open)
            while self._waiting:
                asked = self._waiting.popleft()
                if asked.clip.set_running_or_notify_cancel():  # from here on it cannot be cancelled
                    return asked
            return None


def _settle(clip: "Future[Clip]", result: Clip | KinetiqError) -> None:
    if isinstance(result, KinetiqError):
        clip.set_exception(result)
    else:
        clip.set_result(result)


def _not_open() -> BusyError:
    return BusyError("serve: requests are taken within a `with` block of the batch; ask again then")
