"""The pytest plugin of this suite: leak check, watchdog, names, seeds, and skipping of GPU tests.

Fixtures

- `pool_name`      a name that no other test, worker or run has
- `new_pool_name`  a function that gives one such name per call
- `rng`            `random.Random`, seeded per run and test; a failure prints how to repeat it

Automatic, for every test

- the watchdog (`@pytest.mark.watchdog(seconds)` for a test that may take longer than two minutes)
- the leak check: a test that leaves something behind fails in its teardown, with a dump, and what
  it left is removed, so that the tests after it are judged by themselves

and once at the end, in the process that started the run: nothing of the run is left anywhere.
"""

from __future__ import annotations

import functools
import random
import signal
from collections.abc import Callable, Generator, Iterator

import hypothesis
import pytest

from tests.support import leaks, naming, procfs
from tests.support.watchdog import Watchdog

FAILED = pytest.StashKey[bool]()
LEFT_BEHIND = pytest.StashKey[list[leaks.Leak]]()
WATCHDOG = pytest.StashKey[Watchdog]()

# Examples take as long as they take: parallel workers share two cores, and the watchdog is there.
hypothesis.settings.register_profile(
    "shmblocks",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)


def is_worker(config: pytest.Config) -> bool:
    """Is this one of the processes among which pytest-xdist shares out the tests?"""
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    naming.run_prefix()  # decided here, before workers start and inherit it
    naming.run_seed()
    hypothesis.settings.load_profile("shmblocks")
    procfs.adopt_orphans()
    heed_signals()
    config.stash[WATCHDOG] = Watchdog()


def heed_signals() -> None:
    """A run under nohup or in a script's background is started with some signals ignored.

    Every program that a test starts would inherit that, and survive a Ctrl-C that should end it.
    """
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    if WATCHDOG in config.stash:
        config.stash[WATCHDOG].close()
        del config.stash[WATCHDOG]


def pytest_report_header() -> str:
    return (
        f"shmblocks: segments named {naming.run_prefix()}-*, "
        f"seed {naming.SEED_VARIABLE}={naming.run_seed()}"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    mark = item.get_closest_marker("watchdog")
    watchdog = item.config.stash[WATCHDOG]
    watchdog.start(float(mark.args[0]) if mark else None)
    try:
        return (yield)
    finally:
        watchdog.stop()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := why_no_gpu()):
        pytest.skip(reason)


@functools.cache
def why_no_gpu() -> str | None:
    # Not at collection: each worker collects everything, and importing torch takes seconds.
    import torch

    if torch.cuda.is_available():
        return None
    return f"needs a CUDA device; torch {torch.__version__} finds none"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[FAILED] = True
        if "rng" in getattr(item, "fixturenames", ()):
            seed = f"{naming.SEED_VARIABLE}={naming.run_seed()} pytest '{item.nodeid}'"
            report.sections.append(("repeat with the same random numbers", seed))
    return report


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Set up before and torn down after all other fixtures of the test, being the first of them.

    Fixtures of wider scope were there before, and are judged at the end of the run.
    """
    before = leaks.Snapshot.take(naming.worker_prefix())
    yield
    left = before.leaks_after_grace()
    leaks.reap_orphans(before)
    if not left:
        return
    leaks.remove(left)
    dump = f"left behind by {request.node.nodeid}:\n{leaks.describe(left)}"
    if request.node.stash.get(FAILED, False):
        # The traceback of the failure keeps the test's locals alive, so this may be its fault.
        print(dump)
    else:
        pytest.fail(dump, pytrace=False)


@pytest.fixture
def pool_name() -> str:
    return naming.new_pool_name()


@pytest.fixture
def new_pool_name() -> Callable[[], str]:
    return naming.new_pool_name


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return naming.random_for(request.node.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """After the workers have ended (pytest-xdist ends them in this hook, earlier)."""
    if is_worker(session.config):
        return
    left = leaks.left_behind_after_grace(naming.run_prefix())
    session.config.stash[LEFT_BEHIND] = left
    leaks.remove(left)
    if left and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    left = config.stash.get(LEFT_BEHIND, [])
    if left:
        terminalreporter.section("left behind by this run", red=True)
        terminalreporter.write_line(leaks.describe(left))
