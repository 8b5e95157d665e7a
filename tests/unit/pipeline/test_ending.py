"""SIGTERM: raised as Ctrl-C is, in a process of its own, for it is meant to end one."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def run(code: str) -> subprocess.CompletedProcess[str]:
    program = "import os, signal, sys, threading, time\nfrom transplant_ray.errors import Terminated\n"
    program += "from transplant_ray.pipeline import ending\nfrom transplant_ray.pipeline.ending import terminable\n"
    program += "def term(): os.kill(os.getpid(), signal.SIGTERM)\n"
    return subprocess.run([sys.executable, "-c", program + textwrap.dedent(code)], capture_output=True, text=True, timeout=120)


def test_it_is_raised_out_of_the_block_even_as_ray_reports_it() -> None:
    done = run("""
        try:
            with terminable(), terminable():
                try:
                    term()
                except KeyboardInterrupt:
                    print("tidied")
                    raise KeyboardInterrupt from None  # Ray raises one of its own
        except Terminated:
            print("terminated")
    """)
    assert done.stdout.split() == ["tidied", "terminated"], done.stderr


def test_the_handler_of_ray_init_is_understood_too() -> None:
    done = run("""
        try:
            with terminable():
                signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
                term()
        except Terminated:
            print("terminated")
    """)
    assert done.stdout.split() == ["terminated"], done.stderr


def test_it_holds_after_another_has_taken_the_signal() -> None:
    done = run("""
        try:
            with terminable():
                signal.signal(signal.SIGTERM, lambda *_: print("Ray's"))
                with terminable():
                    term()
        except Terminated:
            print("terminated")
    """)
    assert done.stdout.split() == ["terminated"], done.stderr


@pytest.mark.parametrize("second", ["term()", "pass"])
def test_a_second_signal_does_not_disturb_who_tidies_up(second: str) -> None:
    done = run(f"""
        try:
            with terminable():
                try:
                    term()
                finally:
                    {second}
                    print("tidied")
        except Terminated:
            print("terminated")
    """)
    assert done.stdout.split() == ["tidied", "terminated"], done.stderr


def test_whoever_does_not_end_is_ended() -> None:
    done = run("""
        ending.GRACE_SECONDS = 0.2
        with terminable():
            try:
                term()
            finally:
                time.sleep(100)
    """)
    assert done.returncode == 143


def test_without_the_signal_nothing_changes() -> None:
    done = run("""
        before = signal.getsignal(signal.SIGTERM)
        with terminable():
            pass
        assert signal.getsignal(signal.SIGTERM) == before
        for error in (KeyboardInterrupt, SystemExit):
            try:
                with terminable():
                    raise error
            except error as caught:
                assert type(caught) is error
        threading.Thread(target=lambda: terminable().__enter__()).start()
        print("well")
    """)
    assert done.stdout.split() == ["well"], done.stderr
