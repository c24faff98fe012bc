"""The coordinator's side of a worker: its process, which is started again if it dies or does not answer."""

import multiprocessing
import os
import pathlib
import subprocess
import sys

from benchmarks.run import ROOT, environment_of
from benchmarks.three_backends import ways

SECONDS_TO_START = 300


class Failed(Exception):
    """The worker has no answer. The message says why."""


class Connection:
    """A worker of a way, with files in `folder`. `started` is what it says of its machine, or None."""

    def __init__(self, way, device, folder):
        self.way, self._device, self._folder = way, device, pathlib.Path(folder)
        self.started = None
        self._start()

    def _start(self):
        self._connection, theirs = multiprocessing.Pipe()
        self._log = self._folder / f"{self.way.name}.txt"
        on_cpu = self._device == "cpu"
        if on_cpu:
            environment = {**environment_of(self.way.backend), **ways.ON_CPU}
        else:
            environment = {**os.environ, **ways.ON_GPU, "KERAS_BACKEND": self.way.backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        # An empty one, so that inductor compiles.
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(self._folder / "inductor")
        command = [sys.executable, "-m", "benchmarks.three_backends.worker", self.way.name]
        command += [str(int(on_cpu)), str(theirs.fileno())]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], stdout=log, stderr=log
            )
        theirs.close()
        self._is_new = True

    def prepare(self, number):
        """Asks for a work to be prepared. `receive` returns the answer."""
        if self._process.poll() is not None:
            self._start()
        if self._is_new:
            self.started = self._received(SECONDS_TO_START)
            self._is_new = False
        self._send("prepare", number)

    def receive(self, seconds):
        """The answer. Raises `Failed` if there is none within the time."""
        reply = self._received(seconds)
        if isinstance(reply, dict) and "reason" in reply:
            raise Failed(reply["reason"])
        return reply

    def time(self, seconds):
        """The wall-clock and the CPU seconds of a call."""
        self._send("time")
        return self.receive(seconds)

    def _send(self, *order):
        try:
            self._connection.send(order)
        except OSError:
            raise self._ended() from None

    def _received(self, seconds):
        try:
            if self._connection.poll(seconds):
                return self._connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        self.end()
        raise Failed(f"no answer within {seconds:.0f} s")

    def _ended(self):
        """The process has ended, with its last words in the log."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        self.end()
        return Failed(f"the process ended: {' '.join(lines[-2:])}")

    def end(self):
        self._process.kill()
        self._process.wait()
        self._connection.close()
