"""How a run is asked to stop: by a signal that stages answer between two steps, with all saved."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from qwen3.commands import ENDED_BY_CTRL_C
from qwen3.hosts.processes import any_process


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


class StopRequest:
    """Turns SIGTERM, SIGHUP and the first Ctrl-C into a request that stages answer between two steps.

    It is answered, with all saved, after at most the step under way, the rollouts that are being generated (one batch,
    or `max_staleness` of them ahead of training), and one save; an evaluation ends with the next responses. A second
    Ctrl-C ends the process at once, whatever it is in.
    """

    def __init__(
        self, say: Callable[[str], None] = lambda line: None, leave_terminal: Callable[[], None] = lambda: None
    ):
        """`say` shows a line, and `leave_terminal` gives the terminal back before the process ends: from a thread."""
        self._requested = False
        self._answered = False
        """Whether the watching thread has said so."""
        self._interrupted = False
        """Whether Ctrl-C was pressed before."""
        self._say, self._leave_terminal = say, leave_terminal
        self._terminals: list[int] = []

    def agreed(self) -> bool:
        """Whether this process was asked to stop, or any that runs with it: all of them ask at the same places."""
        return any_process(self._requested)

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Signals are requests while the block lasts. A SIGHUP that is ignored, as under nohup, stays ignored."""
        self._terminals = [descriptor for descriptor in (1, 2) if _is_terminal(descriptor)]
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        ours, pythons = socket.socketpair()
        pythons.setblocking(False)
        # Python calls handlers between two of its own instructions, which a step on devices is: minutes later. The
        # number of a signal comes through this socket at once.
        woken_before = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._request) for number in numbers}
        watcher = threading.Thread(target=self._watch, args=(ours, numbers), name="signals", daemon=True)
        watcher.start()
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(woken_before)
            pythons.close()
            watcher.join()
            ours.close()

    def _request(self, *_: object) -> None:
        self._requested = True

    def _watch(self, ours: socket.socket, numbers: list[int]) -> None:
        while received := ours.recv(1):
            if received[0] in numbers:
                self._note(signal.Signals(received[0]))

    def _note(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            self._forget_terminal()
        if self._interrupted and number == signal.SIGINT:
            try:
                self._leave_terminal()
                print("ended by a second Ctrl-C; the same command goes on from what was saved last", file=sys.stderr)
                sys.stderr.flush()
            finally:
                os._exit(ENDED_BY_CTRL_C)
        self._interrupted |= number == signal.SIGINT
        if not self._answered:
            self._answered = self._requested = True
            whom = "press Ctrl-C again to end now" if number == signal.SIGINT else f"{number.name} asks for it"
            # Nobody may be reading any more; the request stands all the same.
            with suppress(OSError):
                self._say(f"stopping after this step; {whom}")

    def _forget_terminal(self) -> None:
        """The terminal is gone, and whoever wrote to it would fail and not get to save."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _is_terminal(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:
        return False
