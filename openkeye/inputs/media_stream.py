"""`MediaStream`: the pictures of one prompt, video files decoded on a thread of their own while the prompt is being read.

decoding thread: frames in order, hashed ──> a bounded store ──> engine: encodes those that are due, releases them
What is at hand (still images, `Frames`) is there from the beginning and never released; it is the caller's.
"""

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import accumulate

import numpy as np

from openkeye.common.checks import InputError
from openkeye.inputs.picture_hash import picture_hash
from openkeye.inputs.prompt import Medium
from openkeye.inputs.video import DecodeHealth, Frames, Progress, VideoRequest, iterate_shown


class MediaStream:
    """Pictures by their number in the prompt. Its owner starts, releases and closes; the decoding thread fills it."""

    def __init__(self, media: Sequence[Medium], on_decoded: Progress | None = None) -> None:
        """on_decoded: called on the decoding thread with (frames done, in all); what it raises ends the decoding."""
        self._media = media
        self._on_decoded = on_decoded
        sizes = [len(item.times_seconds) if isinstance(item, (Frames, VideoRequest)) else 1 for item in media]
        self._firsts = [0, *accumulate(sizes)]
        # number of each medium's first picture, and of all pictures
        self.hashes: list[str | None] = [None] * self._firsts[-1]
        # of each picture that has been there: equal where the pixels are equal
        for first, item in zip(self._firsts, media, strict=False):
            if not isinstance(item, VideoRequest):
                named = item.hashes if isinstance(item, Frames) else [picture_hash(item)]
                self.hashes[first : first + len(named)] = named
        self._num_decoded, self._num_to_decode = 0, self.hashes.count(None)
        self._notes = [[] if isinstance(item, np.ndarray) else _known_notes(item) for item in media]
        self.decode_seconds = 0.0
        # that the decoding thread has worked, waiting left out
        self._changed = threading.Condition()
        self._held: dict[int, np.ndarray] = {}
        self._held_bytes = self._max_held_bytes = 0
        self._next = self._next_to_decode(0)
        self._first_needed = 0
        self._stop: threading.Event | None = None
        # of the decoding under way, or of the last one until the next `rewind`
        self.is_decoding = False
        # whether a thread is at work on it, waiting included
        self.error: BaseException | None = None
        # what ended the decoding before its time

    @property
    def num_arrived(self) -> int:
        """Pictures before this number are there or were."""
        return self._next

    @property
    def is_complete(self) -> bool:
        """Whether nothing is still to come."""
        return self._next == len(self.hashes)

    @property
    def is_full(self) -> bool:
        """Whether decoding waits until something is released."""
        return 0 < self._max_held_bytes <= self._held_bytes

    @property
    def held_bytes(self) -> int:
        """Decoded pixels in memory, those at hand left out."""
        return self._held_bytes

    @property
    def is_startable(self) -> bool:
        """Whether something is to be decoded and nobody has begun."""
        return self._stop is None and not self.is_complete

    @property
    def notes(self) -> list[str]:
        """What a user should know about the videos, as far as they are decoded; each line names its video."""
        named = zip(self._media, self._notes, strict=True)
        return [f"{item.source}: {note}" for item, notes in named if not isinstance(item, np.ndarray) for note in notes]

    def pixels(self, number: int) -> np.ndarray:
        """[H, W, 3] uint8 of a picture that has arrived and is not released."""
        place = bisect_right(self._firsts, number) - 1
        item = self._media[place]
        if isinstance(item, VideoRequest):
            return self._held[number]
        return item.pixels[number - self._firsts[place]] if isinstance(item, Frames) else item

    def rewind(self, first: int) -> None:
        """Let the next `start` decode from picture `first` on, whatever was decoded before."""
        assert not self.is_decoding, "close before"
        self._next, self._first_needed, self._stop = self._next_to_decode(first), first, None

    def start(self, max_held_bytes: int, on_change: Callable[[], None]) -> None:
        """Decode on a new thread.

        max_held_bytes: at which decoding waits until something is released. on_change: called on the decoding thread after each
        picture and at the end.
        """
        assert self.is_startable
        self._max_held_bytes, self._stop, self.is_decoding = max_held_bytes, threading.Event(), True
        arguments = (self._next, self._stop, on_change)
        # A daemon: no interpreter that ends waits for pictures that nobody will release.
        threading.Thread(target=self._run, args=arguments, name="openkeye-decode", daemon=True).start()

    def release(self, before: int) -> bool:
        """Pictures before this number are needed no more. Returns whether decoding still waits for room."""
        with self._changed:
            for number in [number for number in self._held if number < before]:
                self._held_bytes -= self._held.pop(number).nbytes
            self._first_needed = max(self._first_needed, before)
            self._changed.notify_all()
            return self.is_full

    def close(self) -> None:
        """End the decoding within a packet's time and drop what it made; `rewind` and `start` may begin it anew."""
        with self._changed:
            if self._stop is not None:
                self._stop.set()
            self.is_decoding = False
            self._held.clear()
            self._held_bytes = 0
            self._changed.notify_all()

    def _next_to_decode(self, number: int) -> int:
        """The first picture from this number on that is not at hand."""
        for first, end, item in zip(self._firsts, self._firsts[1:], self._media, strict=False):
            if isinstance(item, VideoRequest) and end > number:
                return max(first, number)
        return len(self.hashes)

    # On the decoding thread.

    def _run(self, first: int, stop: threading.Event, on_change: Callable[[], None]) -> None:
        error: BaseException | None = None
        try:
            self._decode(first, stop, on_change)
        except InputError as reason:
            error = reason
        except BaseException as reason:
            # Its owner has to know; the thread ends as threads do, with a traceback.
            error = reason
            raise
        finally:
            with self._changed:
                if not stop.is_set():
                    self.error, self.is_decoding = error, False
            on_change()

    def _decode(self, first: int, stop: threading.Event, on_change: Callable[[], None]) -> None:
        """All videos that reach to picture `first`, each from its beginning, so that damaged ones decode as they did before."""
        for place, item in enumerate(self._media):
            if not isinstance(item, VideoRequest) or self._firsts[place + 1] <= first:
                continue
            health = DecodeHealth(stop=stop)
            with closing(iterate_shown(item, health)) as pictures:
                for number in range(self._firsts[place], self._firsts[place + 1]):
                    if not self._wait_for_room(stop):
                        return
                    begin = time.monotonic()
                    picture = next(pictures, None)
                    if picture is None:
                        return
                    content_hash = picture_hash(picture)
                    self.decode_seconds += time.monotonic() - begin
                    self._notes[place] = [*item.scan.notes, *health.notes()]
                    if not self._put(number, picture, content_hash, stop):
                        return
                    if self._on_decoded is not None:
                        self._on_decoded(self._num_decoded, self._num_to_decode)
                    on_change()

    def _wait_for_room(self, stop: threading.Event) -> bool:
        """False where nobody wants more."""
        with self._changed:
            self._changed.wait_for(lambda: stop.is_set() or self._held_bytes < self._max_held_bytes)
            return not stop.is_set()

    def _put(self, number: int, picture: np.ndarray, content_hash: str, stop: threading.Event) -> bool:
        with self._changed:
            if stop.is_set():
                return False
            if self.hashes[number] not in (None, content_hash):
                raise InputError("a video decodes otherwise the second time: its file was changed, or is damaged; ask again")
            self._num_decoded += self.hashes[number] is None
            self.hashes[number] = content_hash
            if number >= self._first_needed:
                self._held[number] = picture
                self._held_bytes += picture.nbytes
            self._next = max(self._next, self._next_to_decode(number + 1))
            return True


def _known_notes(video: Frames | VideoRequest) -> list[str]:
    """What is known of a video before it is decoded."""
    return list(video.notes if isinstance(video, Frames) else video.scan.notes)
