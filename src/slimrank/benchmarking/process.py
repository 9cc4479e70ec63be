"""The other end of a worker: orders out, answers in."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import IO, Any

from slimrank.errors import ModelError, ProcessError

# heard in full from here alone, and by a model that is to be compiled alone
PACKED = {"TORCHINDUCTOR_FREEZING": "1"}
CALLED_FROM_C = {"TORCHINDUCTOR_CPP_WRAPPER": "1"}  # products of a step are called without Python


class Worker:
    """A process that holds one model (`slimrank.benchmarking.worker`).

    Parameters
    ----------
    name : str
        Of its model, for errors.
    threads : int
    device : str, optional
        The CPU if left out.
    """

    def __init__(self, name: str, threads: int, device: str | None = None) -> None:
        self.name = name
        on_cpu = (device or "cpu").partition(":")[0] == "cpu"
        settings = PACKED | CALLED_FROM_C if on_cpu else PACKED
        self._said: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "slimrank.benchmarking.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **settings},
            start_new_session=True,  # Ctrl-C is the caller's; this ends when its orders do
        )

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Give an order and wait for the answer.

        Raises
        ------
        ModelError
            If it cannot be done: what the worker says.
        ProcessError
            If the worker is there no longer.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ProcessError(f"the process of {self.name} has ended: {self._why()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ModelError(f"{self.name}: {answer['error']}")
        return answer

    def end(self) -> None:
        """Let it go."""
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def _why(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "it was killed, as is done where memory is short; fewer sequences take less"
        self._said.seek(0)
        lines = self._said.read().strip().splitlines()
        return lines[-1] if lines else f"exit code {code}"
