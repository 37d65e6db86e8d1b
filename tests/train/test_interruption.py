"""`qlora_rs.train.interruption`: Ctrl-C at a moment when nothing is half done."""

from __future__ import annotations

import signal
import threading

import pytest

from qlora_rs.train.interruption import Interruption


def test_it_comes_at_once_outside_a_held_block():
    with Interruption(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_it_waits_for_the_end_of_a_held_block_and_comes_once():
    done = []
    with Interruption() as interruption:
        try:
            with interruption.held():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                done.append("whole")
        except KeyboardInterrupt:
            done.append("interrupted")
        with interruption.held():
            done.append("next")
    assert done == ["whole", "interrupted", "next"]


def test_it_is_dropped_in_the_last_block():
    with Interruption() as interruption, interruption.held(last=True):
        signal.raise_signal(signal.SIGINT)


def test_an_error_of_the_held_block_goes_first():
    with Interruption() as interruption:
        with pytest.raises(ValueError, match="first"), interruption.held():
            raise_after_a_signal()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def raise_after_a_signal() -> None:
    signal.raise_signal(signal.SIGINT)
    raise ValueError("first")


def test_the_former_handler_comes_back():
    before = signal.getsignal(signal.SIGINT)
    with Interruption():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) is before


def test_it_does_nothing_outside_the_main_thread():
    errors = []

    def work() -> None:
        try:
            with Interruption() as interruption, interruption.held():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
