"""Signals while a command is at work."""

import os
import signal
import time

import pytest
import typer

from slimrank.cli import output


def end(number):
    """Send a signal, and say if it interrupts."""
    try:
        os.kill(os.getpid(), number)
        time.sleep(0.001)
    except KeyboardInterrupt:
        return True
    return False


def test_repeats_are_ignored_for_some_seconds_only(monkeypatch):
    now, seen = [100.0], []
    monkeypatch.setattr("slimrank.cli.output.time.monotonic", lambda: now[0])

    @output.friendly
    def command():
        for later in (0, 1, 4, 6, 1, 6):
            now[0] += later
            seen.append(end(signal.SIGTERM))
        seen.append(end(signal.SIGINT))
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as ended:
        command()
    assert seen == [True, False, False, True, False, True, True]
    assert ended.value.exit_code == 143


def test_a_handler_that_is_not_of_python(monkeypatch):
    """What was set by a library in C cannot be put back."""
    before, real = signal.getsignal(signal.SIGTERM), signal.signal
    handlers = iter((before, None))
    monkeypatch.setattr(
        output.signal, "signal", lambda n, h: (real(n, h), next(handlers, "restored"))[1]
    )
    try:
        output.friendly(lambda: None)()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        real(signal.SIGTERM, before)
