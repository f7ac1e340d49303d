"""End a command on SIGINT (Ctrl-C), SIGTERM or SIGHUP: keep what can be kept, and say in one line what that is.

The first signal raises `Stopped` in the main thread, or is only noted where a loop ends by itself (`noted`). While a
module is being imported it ends the process directly: an exception there can abort it inside an extension's C++ code.
A second signal ends the process at once, even while the main thread waits in C code: a thread sees it arrive.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FINISHED_STATUS = 4  # stopped by a signal after what was in hand had been finished
_MOMENT_SECONDS = 0.01
_ONE_REQUEST_SECONDS = 0.2  # `timeout` sends its signal twice
_ONE_REQUEST_SECONDS_LAUNCHED = 5.0  # launchers pass on the Ctrl-C that the terminal sends to every process


class Stopped(BaseException):
    """A signal asks the command to end; `kept` says what remains of its work.

    `finished` names the unit that was in hand when the signal came, if it was finished first: no work is lost.
    """

    def __init__(self, number: int, kept: str = "", finished: str = "") -> None:
        super().__init__(number)
        self.number = number
        self.kept = kept
        self.finished = finished

    @property
    def status(self) -> int:
        """The exit status of the command."""
        return FINISHED_STATUS if self.finished else 128 + self.number


class Note(Protocol):
    """A signal that may have been noted."""

    def is_set(self) -> bool:
        """Whether it has been."""
        ...


class _State:
    """What this process knows about signals."""

    def __init__(self) -> None:
        self.watched = False
        self.working = False  # whether `Stopped` may be raised
        self.status: int | None = None  # of the command, once it has ended
        self.first: float | None = None  # when the first signal came
        self.number: int | None = None
        self.raised = False
        self.waiting = False  # whether a signal must wait, and the one that does
        self.waited: int | None = None
        self.keeping: list[Callable[[], str]] = []
        self.leaving: list[Callable[[], None]] = []


_state = _State()


def watch() -> None:
    """Handle signals from here on, for a process that runs one command; signals that its parent ignores stay ignored.

    Call it before slow imports.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    if not _state.watched:
        _state.watched = True
        for descriptor in range(3):  # a closed standard stream: what is opened next must not take its place
            try:
                os.fstat(descriptor)
            except OSError:
                os.open(os.devnull, os.O_RDWR)
        sys.unraisablehook = _raise_again
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_leave_to_parent)
        threading.Thread(target=_end_on_second, args=(reader,), name="signals", daemon=True).start()


def watch_again() -> None:
    """Handle signals again after a library has installed its own handlers; a no-op unless they were handled before."""
    if _state.watched:
        watch()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let signals raise `Stopped` inside the block, and handle them even if `watch` was not called."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if not _state.watched and threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _on_signal)
    _state.working, _state.raised, _state.first, _state.status = True, False, None, None
    try:
        yield
    finally:
        _state.working = False
        if not _state.watched and threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def ended(status: int) -> None:
    """Record that the command has ended: from here on a signal only ends the process sooner, with this status."""
    _state.status = status


@contextmanager
def keeping(describe: Callable[[], str]) -> Iterator[None]:
    """Say what is kept if the command is stopped inside the block; an empty text means nothing."""
    _state.keeping.append(describe)
    try:
        yield
    except Stopped as stop:
        stop.kept = stop.kept or describe()
        raise
    finally:
        _state.keeping.pop()


@contextmanager
def leaving(clean_up: Callable[[], None]) -> Iterator[None]:
    """Call `clean_up` if a signal ends the process directly inside the block, during an import."""
    _state.leaving.append(clean_up)
    try:
        yield
    finally:
        _state.leaving.remove(clean_up)


@contextmanager
def noted(answer: str) -> Iterator[Note]:
    """Note the first signal instead of raising, and print `answer`; the block ends by itself as soon as it can.

    Does nothing outside the main thread, where Python allows no handlers.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        if not stop.is_set():
            _state.number, _state.first = number, time.monotonic()
            stop.set()
            _say(f"{signal.Signals(number).name}: {answer}")
        elif _is_second():
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def finishing(answer: Callable[[], str]) -> Iterator[Note]:
    """Note SIGTERM if `answer` says what is finished first, and print that; an empty text lets SIGTERM end the command.

    Does nothing outside the main thread, where Python allows no handlers.
    """
    stop = threading.Event()
    before: Any = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            if not _is_second():
                return
        elif line := answer():
            _state.number, _state.first = number, time.monotonic()
            stop.set()
            _say(f"{signal.Signals(number).name}: {line}")
            return
        signal.signal(number, before)
        signal.raise_signal(number)

    signal.signal(signal.SIGTERM, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def starting_processes(*, immune_to: Collection[signal.Signals] = (signal.SIGINT,)) -> Iterator[None]:
    """Start processes inside the block: they never see these signals, such as Ctrl-C; their parent ends them.

    A signal to this process waits for the end of the block: a half-started process would print a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, immune_to)
    _state.waiting = True
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        number, _state.waiting, _state.waited = _state.waited, False, None
        if number is not None:
            _on_signal(number, sys._getframe())


def received() -> int:
    """The signal that stopped this process, or SIGTERM if another process of the run has received it."""
    return _state.number or signal.SIGTERM


def describe(stop: Stopped) -> str:
    """One line: which signal, what was kept, and the command that continues."""
    name = signal.Signals(stop.number).name
    done = ", ".join(filter(None, (stop.finished and f"{stop.finished} is finished", stop.kept)))
    if done:
        return f"stopped by {name}: {done}; to continue, run again: {_command()}"
    return f"stopped by {name}: nothing new was kept; to go on, run again: {_command()}"


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _state.raised:
        return
    if _state.waiting:
        _state.waited = number
        return
    _state.number = number
    if _state.status is not None:
        os._exit(_state.status)
    if not _state.working or _importing(frame):
        kept = _state.keeping[-1]() if _state.keeping else ""
        for clean_up in reversed(_state.leaving):
            clean_up()
        _say(describe(Stopped(number, kept)))
        os._exit(128 + number)
    _state.raised, _state.first = True, time.monotonic()
    raise Stopped(number)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _end_on_second(reader: int) -> None:
    """End the process when a second signal arrives; runs in a thread."""
    while True:
        numbers = [number for number in os.read(reader, 64) if number in SIGNALS]
        if numbers and _state.first is None:
            _state.first = time.monotonic()
        elif numbers and _is_second():
            if _state.status is not None:
                os._exit(_state.status)
            _say(f"{signal.Signals(numbers[-1]).name} again: ended at once; to continue, run again: {_command()}")
            os._exit(128 + numbers[-1])


def _is_second() -> bool:
    """Whether a signal that arrives now is a request of its own, not a copy of the first one."""
    patience = _ONE_REQUEST_SECONDS_LAUNCHED if "RANK" in os.environ else _ONE_REQUEST_SECONDS
    return _state.first is not None and time.monotonic() - _state.first > patience


def _leave_to_parent() -> None:
    """In a forked child: leave Ctrl-C to the parent, which ends its children, and forget the parent's handlers.

    What the parent ignores, such as SIGHUP under nohup, its children go on ignoring.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    _state.working = False


def _raise_again(unraisable: Any) -> None:
    """Raise `Stopped` again where Python could not raise it, such as in a destructor.

    Afterwards, say nothing about destructors that fail on what it left half-made.
    """
    if not isinstance(unraisable.exc_value, Stopped):
        if not _state.raised:
            sys.__unraisablehook__(unraisable)
        return
    number, _state.raised = unraisable.exc_value.number, False
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(_MOMENT_SECONDS, signal.pthread_kill, (main, number)).start()


def _command() -> str:
    """The command as typed; under a launcher it is unknown."""
    if "RANK" in os.environ:
        return "the same command"
    program = Path(sys.argv[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    return " ".join([name, *map(shlex.quote, sys.argv[1:])])


def _say(line: str) -> None:
    """Write to stderr directly: a stream may be in the middle of a write that the signal interrupted."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode("utf-8", "backslashreplace"))
