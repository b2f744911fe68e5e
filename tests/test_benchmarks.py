"""The benchmark works and says what it measured. No test here looks at how long anything took."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import report as reports
from benchmarks import table, targets
from benchmarks.payload import CHUNK_TOKENS, Pattern, PayloadMismatchError
from benchmarks.plot import spread
from benchmarks.report import Experiment, Machine, Point, Report, Series
from tests.support.naming import new_pool_name

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
TRANSPORTS = {
    "memcpy": "baseline",
    "wake-pipe": "baseline",
    "wake-semaphore": "baseline",
    "wake-spin": "baseline",
    "wake-sleep": "baseline",
    "shmblocks-channel": "shmblocks",
    "shmblocks-channel-asleep": "shmblocks",
    "shmblocks-channel-copy": "shmblocks",
    "shmblocks-channel-python": "shmblocks",
    "shmblocks-in-place": "shmblocks",
    "shmblocks-asleep": "shmblocks",
    "shmblocks-in-place-pipe": "shmblocks",
    "shmblocks-copy": "shmblocks",
    "iceoryx2-in-place": "peer",
    "iceoryx2-polling": "peer",
    "iceoryx2-copy": "peer",
    "shared-memory": "peer",
    "torch-queue-fd": "peer",
    "torch-queue-fs": "peer",
    "numpy-queue": "peer",
    "zmq-copy": "peer",
    "zmq-no-copy": "peer",
}

EXPERIMENTS = [
    "steps",
    "throughput",
    "contention",
    "pool_sizes",
    "lock_time",
    "fragmentation",
    "hit_rates",
    "cache_costs",
    "cache_peers",
    "cache_processes",
    "nodes",
]


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A Python of its own, as `scripts/bench` starts one: what it leaves behind is found."""
    paths = [str(SCRIPTS), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "SHMBLOCKS_BENCH_PREFIX": new_pool_name(),
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=240
    )


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return python("-m", "benchmarks", *arguments)


# --- a run ------------------------------------------------------------------------------------


# One test, and not one per promise: they share a run of many processes, and parallel workers that
# take tests from each other would each make their own.
@pytest.mark.watchdog(300)
def test_a_quick_run_of_every_transport_is_complete_and_can_be_shown_again(tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    pytest.importorskip("matplotlib")
    saved = tmp_path / "run.json"
    options = ("--tokens", "64,300", "--rounds", "1", "--seed", "7", "--json", saved)
    # Ray is left out: its daemons take longer to start than all the rest together.
    only = ("--only", ",".join(TRANSPORTS))
    run = bench("handoffs", *EXPERIMENTS, "--quick", *options, *only, "--plots", tmp_path)
    assert run.returncode == 0, run.stderr
    report = reports.load(saved.read_bytes())
    assert (report.tokens, report.rounds, report.seed) == ([64, 300], 1, 7)
    assert {series.name: series.kind for series in report.series} == TRANSPORTS
    assert all(series.peak_pss_bytes > 0 for series in report.series)
    for experiment in report.experiments:
        assert experiment.title in run.stdout
        assert experiment.rows
        assert all(len(row) == len(experiment.header) for row in experiment.rows)
        assert all(value >= 0 for value in experiment.numbers.values()), experiment.numbers
    assert [experiment.name for experiment in report.experiments] == EXPERIMENTS
    for series in report.series:
        check_series(series)
        assert series.label in run.stdout
    for target in report.targets:
        assert target.statement in run.stdout
    assert (tmp_path / "handoff.png").read_bytes().startswith(b"\x89PNG")
    assert bench("--load", saved).stdout == run.stdout


def check_series(series: Series) -> None:
    """Every size is there, and every point says how it came about."""
    sizes = [64, 300] if series.carries_data else [0]
    assert [point.size for point in series.points] == sizes, series.name
    for point in series.points:
        assert point.count == len(point.latencies_us) >= 2
        assert 0 < point.min_us <= point.p50_us <= point.p99_us <= point.max_us


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"format": 1}', encoding="utf-8")
    run = bench("--load", other)
    assert run.returncode == 2
    assert "missing required field" in run.stderr


def test_an_unknown_transport_is_named_with_those_there_are() -> None:
    run = bench("--only", "memcpy,carrier-pigeon")
    assert run.returncode == 2
    assert "got 'carrier-pigeon'" in run.stderr
    assert "wake-pipe" in run.stderr


# --- a run that goes wrong --------------------------------------------------------------------

FAULTY = """
import os, sys
from contextlib import contextmanager
from functools import partial
from benchmarks.launcher import measure
from benchmarks.settings import QUICK
from benchmarks.transport import Ends, Kind, Receiver, Transport
from benchmarks.transports import choose
from benchmarks.transports.shmblocks_pool import pipe
from benchmarks.transports.standard import connect_shared_memory

def dies(receiver):
    os._exit(5)

def stale(receiver):
    incoming = receiver.receive()
    incoming.tensor[-1, 100] += 1
    return incoming

def faulty_receiver(fault, receiver):
    made = receiver()
    return Receiver(partial(fault, made), made.close)

@contextmanager
def connect(fault, context, settings):
    with connect_shared_memory(pipe, context, settings) as ends:
        yield Ends(ends.sender, partial(faulty_receiver, fault, ends.receiver))

if __name__ == "__main__":
    how = partial(connect, {"dies": dies, "stale": stale}[sys.argv[1]])
    faulty = Transport("faulty", "faulty", Kind.PEER, how, "")
    measure([*choose(["wake-semaphore"]), faulty], QUICK, lambda done, rounds: None)
"""


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY, encoding="utf-8")
    return script


def test_a_transport_that_dies_ends_the_run_and_is_named(faulty: Path) -> None:
    run = python(faulty, "dies")
    assert run.returncode == 1
    assert "WorkerError: faulty: consumer died (exit code 5)" in run.stderr


def test_a_wrong_value_ends_the_run_and_says_where(faulty: Path) -> None:
    run = python(faulty, "stale")
    assert run.returncode == 1
    assert "token 31 arrived with other bytes than were sent" in run.stderr
    assert "WorkerError: faulty: consumer died (exit code 1)" in run.stderr


# --- beside another checkout ------------------------------------------------------------------


@pytest.mark.watchdog(180)
def test_a_checkout_can_be_measured_against_another(tmp_path: Path) -> None:
    saved = tmp_path / "run.json"
    run = bench("--against", ROOT, "--quick", "--tokens", "64", "--rounds", "2", "--json", saved)
    assert run.returncode == 0, run.stderr
    found = json.loads(saved.read_text())
    names = ["shmblocks, in place, 64 tokens", "shmblocks, with copy, 64 tokens"]
    assert list(found)[:3] == [*names, "one process, whole handoff"]
    for what, kept in found.items():
        assert what in run.stdout
        assert {name: len(values) for name, values in kept.items()} == dict.fromkeys(kept, 2)
        assert set(kept) == {"other", "this", "ratio"}


def test_a_folder_without_shmblocks_is_no_checkout(tmp_path: Path) -> None:
    run = bench("--against", tmp_path)
    assert run.returncode == 2
    assert f"expected a checkout of shmblocks, got {tmp_path}" in run.stderr


# --- counts of a handoff ----------------------------------------------------------------------


def test_the_counts_of_a_handoff_are_the_same_each_time() -> None:
    runs = [python("-m", "benchmarks.handoff_trace") for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert "One handoff by alloc" in runs[0].stdout
    assert " sections, " in runs[0].stdout


# --- the payload ------------------------------------------------------------------------------


def test_no_byte_of_a_message_is_like_that_of_one_before() -> None:
    pattern = Pattern(hidden=8, seed=1)
    first, later = torch.empty(2, 3 * CHUNK_TOKENS, 8, dtype=torch.bfloat16)
    pattern.fill(first, 10)
    for number in range(11, 11 + 255):
        pattern.fill(later, number)
        assert not bool((first.view(torch.uint8) == later.view(torch.uint8)).any()), number


def test_a_payload_is_checked_by_another_process_of_the_same_seed() -> None:
    payload = torch.empty(2 * CHUNK_TOKENS + 5, 8, dtype=torch.bfloat16)
    Pattern(hidden=8, seed=1).fill(payload, 3)
    Pattern(hidden=8, seed=1).check(payload, 3, len(payload))
    with pytest.raises(PayloadMismatchError, match="message 3: token 0 arrived"):
        Pattern(hidden=8, seed=2).check(payload, 3, len(payload))


def test_the_first_wrong_token_is_named() -> None:
    pattern = Pattern(hidden=8, seed=1)
    payload = torch.empty(3 * CHUNK_TOKENS, 8, dtype=torch.bfloat16)
    pattern.fill(payload, 3)
    payload.view(torch.int16)[CHUNK_TOKENS + 4, 7] += 1
    with pytest.raises(PayloadMismatchError, match=f"token {CHUNK_TOKENS + 4} "):
        pattern.check(payload, 3, len(payload))


def test_a_chunk_in_the_wrong_place_is_noticed() -> None:
    pattern = Pattern(hidden=8, seed=1)
    payload = torch.empty(2 * CHUNK_TOKENS, 8, dtype=torch.bfloat16)
    pattern.fill(payload, 3)
    swapped = torch.cat([payload[CHUNK_TOKENS:], payload[:CHUNK_TOKENS]])
    with pytest.raises(PayloadMismatchError, match="token 0 "):
        pattern.check(swapped, 3, len(swapped))


def test_a_short_payload_is_noticed() -> None:
    pattern = Pattern(hidden=8, seed=1)
    with pytest.raises(PayloadMismatchError, match=r"expected bfloat16 \(6, 8\), got .* \(5, 8\)"):
        pattern.check(torch.zeros(5, 8, dtype=torch.bfloat16), 0, 6)


# --- what is said of the numbers --------------------------------------------------------------


def series_of(name: str, p50_us: dict[int, float]) -> Series:
    points = [
        Point(
            size=size,
            count=1,
            p50_us=value,
            p99_us=value,
            min_us=value,
            max_us=value,
            cleanup_p50_us=0.0,
            latencies_us=[value],
        )
        for size, value in p50_us.items()
    ]
    kind = TRANSPORTS[name]
    data = not name.startswith("wake")
    return Series(name=name, label=name, kind=kind, about="", carries_data=data, points=points)


def a_run(copy_us: float = 2_100.0) -> list[Series]:
    return [
        series_of("memcpy", {64: 60.0, 2_000: 2_000.0}),
        series_of("wake-pipe", {0: 90.0}),
        series_of("wake-semaphore", {0: 80.0}),
        series_of("wake-spin", {64: 25.0, 2_000: 25.0, 16_384: 25.0}),
        series_of("wake-sleep", {64: 80.0}),
        series_of("shmblocks-channel", {64: 30.0, 2_000: 31.0, 16_384: 32.1}),
        series_of("shmblocks-channel-python", {64: 120.0, 2_000: 155.0, 16_384: 160.0}),
        series_of("shmblocks-channel-asleep", {64: 96.0}),
        series_of("shmblocks-channel-copy", {64: 154.0, 2_000: copy_us}),
        series_of("iceoryx2-in-place", {2_000: 40.0}),
        series_of("torch-queue-fd", {2_000: 15_000.0}),
        series_of("torch-queue-fs", {2_000: 50_000.0}),
    ]


def an_experiment(share: float = 0.9, slow_alloc_us: float = 1.96) -> Experiment:
    return Experiment(
        name="experiment",
        title="",
        note="",
        header=[],
        rows=[],
        numbers={
            "put + get": 2.4,
            "find us, 100 entries": 1.0,
            "get + release us, 100 entries": 2.5,
            "price of the journal": 1.1,
            "pair in a pool of 512 blocks": 1.4,
            "pair in a pool of 1048576 blocks": slow_alloc_us,
            "longest hold but check": 400.0,
            "share of the bare lock, 8 processes": share,
            "unfairness, 8 processes": 1.25,
            "attach, 8 GiB": 5_000.0,
        },
    )


Judged = dict[str, tuple[float | None, bool | None]]


def judged(series: list[Series], *experiments: Experiment) -> Judged:
    """Measured, to two digits behind the point, and whether that is enough."""
    return {
        target.name: (target.measured and round(target.measured, 2), target.met)
        for target in targets.judge(series, experiments or [an_experiment()])
    }


def test_a_fast_run_meets_every_target() -> None:
    assert judged(a_run()) == {
        "in-place-to-floor": (1.28, True),
        "in-place-to-python": (0.25, True),
        "in-place-flat": (1.07, True),
        "asleep": (1.2, True),
        "copy-to-baseline": (1.01, True),
        "small-copy-to-baseline": (1.1, True),
        "in-place-to-torch": (483.87, True),
        "copy-to-torch": (7.14, True),
        "ahead": (0, True),
        "put-get": (2.4, True),
        "alloc-cost": (1.96, True),
        "find-get": (3.5, True),
        "alloc-flat": (1.4, True),
        "journal": (1.1, True),
        "contention": (0.9, True),
        "lock-time": (0.4, True),
        "fairness": (1.25, True),
        "attach": (5.0, True),
    }


def test_a_slow_run_misses_its_targets() -> None:
    slow = judged(a_run(copy_us=20_000.0), an_experiment(share=0.4, slow_alloc_us=26.0))
    missed = {
        "copy-to-baseline": (9.62, False),
        "copy-to-torch": (0.75, False),
        "ahead": (2, False),  # p50 and p99 of the queue that is faster
        "alloc-cost": (26.0, False),
        "alloc-flat": (18.57, False),
        "contention": (0.4, False),
    }
    assert {name: slow[name] for name in missed} == missed


def test_a_target_whose_parts_were_not_measured_is_neither_met_nor_missed() -> None:
    without_torch = [series for series in a_run() if not series.name.startswith("torch")]
    assert judged(without_torch)["copy-to-torch"] == (None, None)
    assert judged([])["in-place-flat"] == (None, None)


def test_the_verdict_cannot_be_overlooked() -> None:
    found = targets.judge(a_run(copy_us=20_000.0), [])
    words = {target.name: table.verdict(target) for target in found}
    assert words["in-place-flat"] == "met"
    assert words["copy-to-torch"] == "NOT met"
    assert words["put-get"] == "not measured"


def test_a_quantile_is_a_value_that_was_measured() -> None:
    values = [float(value) for value in range(200, 0, -1)]
    assert reports.quantile(values, 0.5) == 100.0
    assert reports.quantile(values, 0.99) == 198.0
    assert reports.quantile([3.0, 1.0, 2.0], 0.99) == 3.0
    with pytest.raises(ValueError, match="at least one value"):
        reports.quantile([], 0.5)


def test_durations_keep_three_digits_and_change_their_unit() -> None:
    shown = [table.duration(value) for value in (6.784, 87.25, 512.3, 1_690.0, 2_500_000.0)]
    assert shown == ["6.78 us", "87.2 us", "512 us", "1.69 ms", "2.50 s"]


def test_a_table_has_columns() -> None:
    grid = table.Grid("Title", ["", "n"], [["a", "10"], ["long", "7"]])
    assert table.drawn(grid).splitlines() == [
        "Title",
        "       n",
        "--------",
        "a     10",
        "long   7",
    ]


def test_labels_that_would_touch_are_pushed_apart_around_their_middle() -> None:
    assert spread([0.1, 0.5, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.45, 0.55, 0.9])
    crowded = spread([0.0, 0.01, 0.02, 0.15], 0.1)
    gaps = [after - before for before, after in itertools.pairwise(crowded)]
    assert min(gaps) >= 0.1 - 1e-9


def test_a_report_of_another_format_is_refused() -> None:
    machine = Machine(cpu="", cores=1, memory_gib=1.0, kernel="", python="", torch="", shmblocks="")
    report = Report(
        format=99,
        machine=machine,
        tokens=[],
        hidden=8,
        rounds=1,
        seed=0,
        seconds=0.0,
        series=[],
        experiments=[],
        left_out=[],
        targets=[],
    )
    with pytest.raises(ValueError, match="Expected format 3, got 99"):
        reports.load(reports.save(report))
