"""The tests' own instruments: what they must detect they detect, and innocents pass.

The leak check and the watchdog judge whole tests, so they are tried on a little suite of their own,
which a pytest in a child process runs, and whose verdicts are looked up here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from tests.support import leaks, naming, procfs
from tests.support.children import (
    Channel,
    Child,
    ChildError,
    fork,
    run_in_child,
    run_in_fork,
    run_program,
    spawn,
    wait_until,
)

ROOT = Path(__file__).resolve().parents[1]

# Writes down what pytest tells of each test, if it tells anything.
LITTLE_CONFTEST = """
import json, os

def pytest_runtest_logreport(report):
    told = [report.longreprtext, *(text for section in report.sections for text in section)]
    if any(told) and "PYTEST_XDIST_WORKER" not in os.environ:
        with open("verdicts", "a") as file:
            print(json.dumps([report.nodeid, report.outcome, " ".join(told)]), file=file)
"""

LITTLE_SUITE = """
import mmap, os, subprocess, sys, threading, types
from pathlib import Path
import pytest
from tests.support import naming

kept = []

def leave_segment():
    path = Path("/dev/shm", naming.new_pool_name())
    path.write_bytes(b"x" * 100)
    return path

def keep_descriptor_of_unlinked_segment():
    path = leave_segment()
    kept.append(os.open(path, os.O_RDONLY))
    path.unlink()

def test_leaves_a_segment():
    leave_segment()

def test_leaves_a_descriptor_on_a_segment():
    keep_descriptor_of_unlinked_segment()

def test_leaves_a_descriptor_on_a_segment_and_imports():
    import wave
    keep_descriptor_of_unlinked_segment()

def test_leaves_a_mapping():
    path = leave_segment()
    with path.open("rb") as file:
        kept.append(mmap.mmap(file.fileno(), 100, prot=mmap.PROT_READ))
    path.unlink()

def test_leaves_another_descriptor():
    kept.append(os.pipe())

def test_leaves_a_process():
    kept.append(subprocess.Popen(["sleep", "1000"]))

def test_leaves_an_orphan():
    code = "import subprocess; subprocess.Popen(['sleep', '1001'])"
    subprocess.run([sys.executable, "-c", code], check=True)

def test_leaves_a_thread():
    threading.Thread(target=threading.Event().wait, name="forgotten", daemon=True).start()

def test_fails_and_leaves_a_segment():
    leave_segment()
    raise RuntimeError("the real reason")

def test_fails_with_random_numbers(rng):
    raise RuntimeError(str(rng.random()))

def test_imports_what_keeps_a_descriptor():
    import colorsys
    kept.append(os.pipe())

class CycleWithDescriptor:
    def __init__(self):
        self.itself = self
        self.descriptor = os.dup(0)
    def __del__(self):
        os.close(self.descriptor)

def test_leaves_what_goes_by_itself():
    threading.Timer(0.05, CycleWithDescriptor).start()
    if os.fork() == 0:
        os._exit(0)

def test_takes_two_names(pool_name, new_pool_name):
    assert len({pool_name, new_pool_name(), new_pool_name()}) == 3

@pytest.fixture(scope="session", autouse=True)
def a_torch_without_gpu():
    cuda = types.SimpleNamespace(is_available=lambda: False)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda, __version__="1.2.3")

@pytest.mark.gpu
def test_wants_a_gpu():
    raise RuntimeError("ran without a GPU")
"""

LEAKING_FIXTURE = """
import os, subprocess
from pathlib import Path
import pytest
from tests.support import naming

@pytest.fixture(scope="module")
def wide():
    Path("/dev/shm", naming.new_pool_name()).write_bytes(b"x")
    return subprocess.Popen(["sleep", "1002"])

def test_uses_it(wide):
    pass
"""

SIGNAL_TEST = """
import signal, subprocess, sys

def test_a_program_that_a_test_starts_is_ended_by_signals():
    for number in ("HUP", "INT", "TERM"):
        ended = subprocess.run(["sh", "-c", f"kill -{number} $$; echo survived"], check=False)
        assert ended.returncode == -getattr(signal, f"SIG{number}")
"""

HANGING_TEST = """
import threading

def test_waits_for_ever():
    threading.Event().wait()
"""


def run_pytest(
    directory: Path,
    source: str,
    *options: str,
    environment: Mapping[str, str] | None = None,
    before: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run `source` as a suite under the plugin, as a run of its own with its own prefix.

    `before` is a program and its arguments that starts it.
    """
    (directory / "conftest.py").write_text(LITTLE_CONFTEST)
    (directory / "test_little.py").write_text(source)
    (directory / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n  watchdog\n")
    outer = ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS")
    clean = ["env", *(f"--unset={variable}" for variable in outer)]
    pytest = [sys.executable, "-m", "pytest", "-p", "tests.support.plugin", "-v"]
    return run_program(
        [*before, *clean, *pytest, *options],
        returncode=None,
        directory=directory,
        environment={
            "PYTHONPATH": str(ROOT),
            "SHMBLOCKS_TEST_GRACE": "0.5",
            naming.PREFIX_VARIABLE: f"{naming.new_pool_name()}-inner",
            **(environment or {}),
        },
    )


Verdicts = dict[str, str]


def verdicts_of_little_suite(directory: Path, *options: str) -> Verdicts:
    """What was told of the tests that anything was told of: test name -> outcomes and texts."""
    run_pytest(directory, LITTLE_SUITE, *options, environment={naming.SEED_VARIABLE: "11"})
    verdicts: Verdicts = {}
    for line in (directory / "verdicts").read_text().splitlines():
        test, outcome, text = json.loads(line)
        name = test.partition("::")[2]
        verdicts[name] = verdicts.get(name, "") + f"{outcome}: {text}"
    return verdicts


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    return verdicts_of_little_suite(tmp_path_factory.mktemp("little"))


@pytest.mark.parametrize(
    ("test", "told"),
    [
        ("test_leaves_a_segment", "segment: /dev/shm/sbtest-"),
        ("test_leaves_a_descriptor_on_a_segment", "(deleted)"),
        ("test_leaves_a_descriptor_on_a_segment_and_imports", "(deleted)"),
        ("test_leaves_a_mapping", "mapping: /dev/shm/sbtest-"),
        ("test_leaves_another_descriptor", "-> pipe:"),
        ("test_leaves_a_process", "sleep 1000"),
        ("test_leaves_an_orphan", "sleep 1001"),
        ("test_leaves_a_thread", "forgotten (daemon) at"),
    ],
)
def test_what_a_test_leaves_behind_fails_it_with_a_dump(
    verdicts: Verdicts, test: str, told: str
) -> None:
    assert f"left behind by test_little.py::{test}:" in verdicts[test]
    assert told in verdicts[test]


@pytest.mark.parametrize(
    "test",
    [
        "test_imports_what_keeps_a_descriptor",
        "test_leaves_what_goes_by_itself",
        "test_takes_two_names",
    ],
)
def test_an_innocent_test_passes_the_leak_check(verdicts: Verdicts, test: str) -> None:
    assert test not in verdicts


def test_the_leaks_of_a_failing_test_stand_beside_its_own_failure(verdicts: Verdicts) -> None:
    told = verdicts["test_fails_and_leaves_a_segment"]
    assert "RuntimeError: the real reason" in told
    assert "segment: /dev/shm/sbtest-" in told


def test_a_failing_test_says_how_to_repeat_its_random_numbers(verdicts: Verdicts) -> None:
    told = verdicts["test_fails_with_random_numbers"]
    assert "SHMBLOCKS_TEST_SEED=11 pytest 'test_little.py::test_fails_with_random_numbers'" in told


def test_the_same_seed_gives_the_same_random_numbers(verdicts: Verdicts) -> None:
    told = verdicts["test_fails_with_random_numbers"]
    rng = run_in_child(first_random_number, "11", "test_little.py::test_fails_with_random_numbers")
    assert f"RuntimeError: {rng}" in told


def first_random_number(seed: str, test: str) -> float:
    os.environ[naming.SEED_VARIABLE] = seed
    return naming.random_for(test).random()


def test_a_gpu_test_is_skipped_with_the_reason_where_there_is_no_gpu(
    verdicts: Verdicts,
) -> None:
    told = verdicts["test_wants_a_gpu"]
    assert told.startswith("skipped: ")
    assert "needs a CUDA device; torch 1.2.3 finds none" in told


def test_parallel_workers_give_the_same_verdicts(verdicts: Verdicts, tmp_path: Path) -> None:
    def failed(verdicts: Verdicts) -> set[str]:
        return {test for test, told in verdicts.items() if "failed: " in told}

    assert failed(verdicts_of_little_suite(tmp_path, "-n", "2")) == failed(verdicts)


def test_what_a_wide_fixture_leaves_behind_fails_the_run(tmp_path: Path) -> None:
    prefix = f"{naming.new_pool_name()}-inner"
    ended = run_pytest(tmp_path, LEAKING_FIXTURE, environment={naming.PREFIX_VARIABLE: prefix})
    assert ended.returncode == pytest.ExitCode.TESTS_FAILED
    assert "left behind by this run" in ended.stdout
    assert f"segment: /dev/shm/{prefix}" in ended.stdout
    assert "sleep 1002" in ended.stdout
    assert not list(procfs.segments(prefix))
    assert not list(procfs.processes_with(naming.PREFIX_VARIABLE, prefix))


def test_a_run_that_was_started_with_signals_ignored_heeds_them(tmp_path: Path) -> None:
    ignoring = ["sh", "-c", "trap '' HUP INT TERM; exec \"$@\"", "sh"]
    ended = run_pytest(tmp_path, SIGNAL_TEST, before=ignoring)
    assert ended.returncode == 0, ended.stdout


def test_a_hanging_test_is_ended_with_a_traceback_of_every_thread(tmp_path: Path) -> None:
    ended = run_pytest(tmp_path, HANGING_TEST, environment={"SHMBLOCKS_TEST_WATCHDOG": "1"})
    assert ended.returncode != 0
    assert "Timeout (0:00:01)!" in ended.stderr
    assert "in test_waits_for_ever" in ended.stderr


def test_the_check_after_a_run_finds_and_removes_what_it_left() -> None:
    prefix = f"{naming.new_pool_name()}-run"
    segment = Path(procfs.SHARED_MEMORY, f"{prefix}-forgotten")
    segment.write_bytes(b"x")
    check = [sys.executable, "-m", "tests.support.leaks", prefix]
    quickly = {"SHMBLOCKS_TEST_GRACE": "0.1"}
    told = run_program(check, returncode=1, directory=ROOT, environment=quickly)
    assert f"segment: {segment} (1 bytes)" in told.stderr
    assert not segment.exists()
    assert run_program(check, directory=ROOT, environment=quickly).stderr == ""


def test_the_check_after_a_run_kills_the_processes_it_left() -> None:
    prefix = f"{naming.new_pool_name()}-run"
    environment = {**os.environ, naming.PREFIX_VARIABLE: prefix}
    with subprocess.Popen(["sleep", "1003"], env=environment) as forgotten:
        told = run_program(
            [sys.executable, "-m", "tests.support.leaks", prefix],
            returncode=1,
            directory=ROOT,
            environment={"SHMBLOCKS_TEST_GRACE": "0.1"},
        )
        assert forgotten.wait(10) == -signal.SIGKILL
    assert "sleep 1003" in told.stderr


def test_a_zombie_is_no_process_that_is_left_behind() -> None:
    before = leaks.Snapshot.take(naming.worker_prefix())
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    wait_until(lambda: not is_running(pid), "the child has ended")
    assert before.leaks_since() == []
    assert procfs.process(pid) is not None
    leaks.reap_orphans(before)
    assert procfs.process(pid) is None


def is_running(pid: int) -> bool:
    process = procfs.process(pid)
    return process is not None and process.is_running


Starter = Callable[..., Child]

# --- children ---------------------------------------------------------------------------------


def greet(channel: Channel, name: str) -> int:
    channel.say(f"hello {name}")
    channel.hear("go on")
    return os.getpid()


def wait_for_ever(channel: Channel) -> None:
    channel.say("waiting")
    channel.receive(timeout=1000)


def die_of_an_error() -> None:
    raise LookupError("no such thing")


def leave_at_once(channel: Channel) -> None:
    os._exit(7)


def leave_a_word_and_then_badly(channel: Channel) -> None:
    channel.say("waiting")
    os._exit(8)


@pytest.mark.parametrize("start", [spawn, fork])
def test_a_child_is_spoken_to_and_gives_its_result(start: Starter) -> None:
    with start(greet, "there") as child:
        child.hear("hello there")
        child.say("go on")
        assert child.result() == child.pid != os.getpid()
    assert child.exit_code == 0


@pytest.mark.parametrize("start", [spawn, fork])
def test_a_killed_child_is_gone_when_kill_returns(start: Starter) -> None:
    with start(wait_for_ever) as child:
        child.hear("waiting")
        child.kill()
        assert child.exit_code == -signal.SIGKILL
        assert procfs.process(child.pid) is None


def test_a_stopped_child_is_stopped_when_stop_returns_and_goes_on_after_resume() -> None:
    with fork(greet, "there") as child:
        child.hear("hello there")
        child.stop()
        assert "state T" in str(procfs.process(child.pid))
        child.say("go on")
        child.resume()
        assert child.result() == child.pid


def test_the_error_of_a_child_is_told_with_its_traceback() -> None:
    with pytest.raises(
        ChildError, match=r"(?s)the child .* raised:.*in die_of_an_error.*no such thing"
    ):
        run_in_fork(die_of_an_error)


def test_a_child_that_ends_early_is_told_with_its_exit_code() -> None:
    with fork(leave_at_once) as child:
        with pytest.raises(ChildError, match="ended early, with exit code 7"):
            child.hear("hello")
        child.kill()


def test_what_a_child_said_before_it_died_is_still_heard() -> None:
    with fork(leave_a_word_and_then_badly) as child:
        assert child.wait() == 8
        child.hear("waiting")
        child.kill()


def test_a_child_that_says_something_else_is_told_with_both_words() -> None:
    with fork(wait_for_ever) as child:
        with pytest.raises(ChildError, match=r"expected .* to say 'running', got 'waiting'"):
            child.hear("running")
        child.kill()


def test_a_hanging_child_is_killed_and_its_traceback_is_written(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with fork(wait_for_ever) as child:
        child.hear("waiting")
        with pytest.raises(ChildError, match=r"wait_for_ever .* said nothing for 0.1 s"):
            child.hear("more", timeout=0.1)
    assert child.exit_code == -signal.SIGKILL
    assert "in wait_for_ever" in capfd.readouterr().err


def test_an_error_in_the_test_kills_the_child_instead_of_waiting_for_it() -> None:
    child = fork(wait_for_ever)
    with pytest.raises(ChildError), child:
        child.hear("something else")
    assert child.exit_code == -signal.SIGKILL


def test_a_function_run_in_a_fork_sees_what_this_process_has() -> None:
    here = {"number": 5}
    assert run_in_fork(lambda: (here["number"], os.getppid())) == (5, os.getpid())


def test_a_program_that_ends_otherwise_than_expected_is_told_with_its_output() -> None:
    with pytest.raises(
        ChildError, match=r"(?s)ended with 3, expected 0.*--- standard output\nhere"
    ):
        run_program(["sh", "-c", "echo here; exit 3"])
    assert run_program(["sh", "-c", "echo here; exit 3"], returncode=3).stdout == "here\n"


def test_a_hanging_program_is_killed_with_what_it_started() -> None:
    with pytest.raises(ChildError, match=r"(?s)hung for 0.2 s.*--- standard output\nhere"):
        run_program(["sh", "-c", "echo here; sleep 1004 & sleep 1004"], timeout=0.2)


def test_a_wait_that_times_out_says_for_what_and_what_it_saw() -> None:
    looks = iter([0, 0, 0])
    with pytest.raises(AssertionError, match=r"until the sky falls; the last look gave 0"):
        wait_until(lambda: next(looks, 0), "the sky falls", timeout=0.01)
    assert wait_until(lambda: "up", "anything") == "up"
