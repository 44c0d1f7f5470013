"""One thread that reads a little ahead, so that a training step does not wait for the disk."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


def cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ReadAhead(Iterator[T]):
    """The items of an iterator, in their order, made by a thread of its own at most ``depth`` items ahead.

    An exception of the iterator is raised where the item would have come. The thread ends with the iterator, when
    :meth:`close` is called, when this object is collected, and when the process ends; it holds no reference to this
    object, and the iterator must hold none either.

    Args:
        items: is run in the thread and nowhere else.
        depth: how many items may wait to be taken.
    """

    def __init__(self, items: Iterator[T], depth: int = 2) -> None:
        self._pid = os.getpid()
        self._ready: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._ended = False
        stop = threading.Event()
        arguments = (items, self._ready, self._room, stop)
        # A daemon, because Python waits for other threads before it calls the finalizers that would end them.
        self._thread = threading.Thread(target=_run, args=arguments, name="unweave read ahead", daemon=True)
        self._thread.start()
        self._close = weakref.finalize(self, _stop, self._thread, self._room, stop, self._pid)

    @property
    def lost(self) -> bool:
        """Whether this is the copy in a forked process, where the thread does not exist."""
        return os.getpid() != self._pid

    def __next__(self) -> T:
        if self._ended or not self._close.alive:
            raise StopIteration
        what, value = self._ready.get()
        if what == "item":
            self._room.release()
            return value
        self._ended = True
        self._close()
        if what == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """End the thread and wait until it is gone. What it has read and nobody has taken is forgotten."""
        self._close()


def _run(items: Iterator[Any], ready: SimpleQueue[Any], room: threading.Semaphore, stop: threading.Event) -> None:
    try:
        while True:
            room.acquire()
            if stop.is_set():
                return
            ready.put(("item", next(items)))
    except StopIteration:
        ready.put(("end", None))
    except BaseException as error:  # also SystemExit and the like: it belongs to whoever waits for the item
        ready.put(("error", error))


def _stop(thread: threading.Thread, room: threading.Semaphore, stop: threading.Event, pid: int) -> None:
    if os.getpid() != pid:  # in a forked process there is no such thread, and its locks may be held for ever
        return
    stop.set()
    room.release()
    if thread is not threading.current_thread():  # the collector may run in any thread, this one included
        thread.join()
