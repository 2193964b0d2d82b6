"""Ctrl-C and SIGTERM, with real signals in processes of their own."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deploy.interrupts import interrupts
from tests.waiting import LIMIT_S, wait_for

BEGIN = """
import os, signal, time
import deploy.interrupts
from deploy.interrupts import interrupts

def say(word):
    print(word, flush=True)

def wait():
    while True:
        time.sleep(0.01)

def send(number=signal.SIGINT):
    os.kill(os.getpid(), number)
"""

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@contextmanager
def child(script: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said_by(script: str) -> tuple[list[str], int]:
    """What a script that sends itself signals says, and its exit code."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert "Traceback" not in done.stderr
    return done.stdout.split(), done.returncode


def hear(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_raises_once_and_is_remembered(number: signal.Signals) -> None:
    script = """
with interrupts() as watch:
    say(watch.came())
    watch.check()
    try:
        say("ready")
        wait()
    except KeyboardInterrupt:
        say("raised")
    say(watch.came())
    try:
        watch.check()
    except KeyboardInterrupt:
        say("again")
"""
    with child(script) as process:
        said = [hear(process), hear(process)]
        process.send_signal(number)
        said += [hear(process) for _ in range(3)]

        assert said == ["False", "ready", "raised", "True", "again"]
        assert process.wait(LIMIT_S) == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_deferred_signal_only_shows_in_came(number: signal.Signals) -> None:
    script = """
with interrupts() as watch:
    with watch.deferred():
        say("ready")
        while not watch.came():
            time.sleep(0.01)
        say("came")
    say("after")
    try:
        with watch.deferred():
            say("never")
    except KeyboardInterrupt:
        say("raised")
"""
    with child(script) as process:
        assert hear(process) == "ready"
        process.send_signal(number)

        assert [hear(process) for _ in range(3)] == ["came", "after", "raised"]
        assert process.wait(LIMIT_S) == 0


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize(("first", "second"), [SIGNALS, SIGNALS[::-1], SIGNALS[:1] * 2])
def test_second_signal_ends_at_once(first: signal.Signals, second: signal.Signals, deferred: bool) -> None:
    """Whatever is being cleaned up: neither `finally` nor atexit nor threads get their turn."""
    script = f"""
import atexit, threading
atexit.register(say, "atexit")
threading.Thread(target=wait).start()
deploy.interrupts.ONE_KEYSTROKE_S = 0.0
with interrupts() as watch:
    watch.at_once = lambda: say("at once")
    try:
        if {deferred}:
            with watch.deferred():
                send({first:d})
                say("first")
                send({second:d})
                wait()
        try:
            send({first:d})
            wait()
        except KeyboardInterrupt:
            say("first")
            send({second:d})
            wait()
    finally:
        say("finally")
"""

    assert said_by(script) == (["first", "at", "once"], 130)


def test_second_signal_from_outside_ends_it_at_once() -> None:
    """After the quarter second in which it counts as the first one's echo."""
    script = """
with interrupts() as watch:
    watch.at_once = lambda: say("at once")
    try:
        say("ready")
        wait()
    except KeyboardInterrupt:
        say("first")
        wait()
"""
    with child(script) as process:
        assert hear(process) == "ready"
        process.terminate()
        assert hear(process) == "first"

        def ended() -> bool:
            process.terminate()
            return process.poll() is not None

        wait_for(ended, what="the end")
        assert hear(process) == "at once"
        assert process.returncode == 130


def test_at_once_that_fails_or_interrupts_itself_ends_it_too() -> None:
    for action in ("1 / 0", "send()", "exit(7)"):
        script = f"""
deploy.interrupts.ONE_KEYSTROKE_S = 0.0
calls = []
def at_once():
    calls.append(1)
    if len(calls) == 1:
        {action}
with interrupts() as watch:
    watch.at_once = at_once
    with watch.deferred():
        send()
        send()
        say("never")
"""

        assert said_by(script) == ([], 130)


@pytest.mark.parametrize("deferred", [False, True])
def test_double_delivery_is_one(deferred: bool) -> None:
    """A wrapper such as `uv run` passes on what the terminal sent to the whole group."""
    script = f"""
deploy.interrupts.ONE_KEYSTROKE_S = 3600.0
with interrupts() as watch:
    watch.at_once = lambda: say("at once")
    if {deferred}:
        with watch.deferred():
            for _ in range(3):
                send()
            say("deferred")
    try:
        send(signal.SIGTERM)
        watch.check()
    except KeyboardInterrupt:
        send()
        send(signal.SIGTERM)
        say("once")
"""

    assert (["deferred", "once"] if deferred else ["once"], 0) == said_by(script)


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with interrupts() as watch:
        inside = [signal.getsignal(number) for number in SIGNALS]

    assert inside == [watch.on_signal] * 2
    assert before == [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_before_and_after_all_a_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    script = f"""
from deploy.interrupts import exit_at_once_on_signals
exit_at_once_on_signals()
with interrupts() as watch:
    try:
        send()
        wait()
    except KeyboardInterrupt:
        say("first")
try:
    send({number:d})
    wait()
finally:
    say("never")
"""

    assert said_by(script) == (["first"], 130)


def test_exception_in_deferred_does_not_leave_it_deferred() -> None:
    script = """
with interrupts() as watch:
    try:
        with watch.deferred():
            1 / 0
    except ZeroDivisionError:
        say("failed")
    try:
        send()
        wait()
    except KeyboardInterrupt:
        say("raised")
"""

    assert said_by(script) == (["failed", "raised"], 0)


def test_other_threads_leave_the_handlers_alone() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    found = []

    def use() -> None:
        with interrupts() as watch:
            found.append(([signal.getsignal(number) for number in SIGNALS], watch.came()))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()

    assert [(before, False)] == found
