"""The commands that stay: metrics, top, keep; and cache."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shmblocks import BlockPool, PoolInspector, PoolNotFoundError
from shmblocks._state.layout import UNBOUNDED
from shmblocks.cache import byte_config
from shmblocks.cli import top
from shmblocks.cli.cache import CacheReport
from shmblocks.cli.keep import KeepReport
from shmblocks.cli.main import main
from shmblocks.cli.metrics import MetricsReport
from shmblocks.cli.render import clipped, line, line_text
from shmblocks.cli.stat import PoolReport
from shmblocks.cli.top import TopReport, read_frame, show
from shmblocks.metrics import metric_names
from tests.cli.conftest import Run, Scene, must
from tests.core.pools import BLOCK_SIZE, create, take, tiny
from tests.support.children import Channel, fork, wait_until

COMMAND = (sys.executable, "-m", "shmblocks.cli")
PATIENCE = 60.0
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@contextmanager
def program(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process of its own; killed at the end if it still runs."""
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], PATIENCE)[0], "it says nothing"
    return process.stdout.readline()


# ---- stat, ls ----------------------------------------------------------------------------------


def test_stat_shows_the_counters(scene: Scene, run: Run) -> None:
    scene.pool.open(scene.pool.publish(must(scene.pool.alloc(4)))).release()
    counters = run("stat", scene.name, "--json").report(PoolReport).stats.counters
    assert (counters.allocations, counters.publishes, counters.opens) == (6, 4, 3)
    text = run("stat", scene.name).out
    assert "6 allocations, 4 publishes, 3 opens, 1 releases, 0 timeouts" in text
    assert re.search(r"publish to open +3: half under .* us", text)
    assert re.search(r"wait for blocks +none\n", text)
    assert "lookups" not in text, "it is no cache"


def test_stat_and_ls_show_the_hit_rate_of_a_cache(pool_name: str, run: Run) -> None:
    with cached(pool_name) as pool:
        assert "3 lookups, 67% hits; 2 puts, 0 evictions" in run("stat", pool.name).out
        assert "any number to come" in run("stat", pool.name).out
        (row,) = (text.split() for text in run("ls").out.splitlines() if pool.name in text)
        assert row[-1] == "67%"


@contextmanager
def cached(name: str) -> Iterator[BlockPool]:
    """A pool with two entries, of three lookups two were hits, one entry is leased."""
    with create(name, tiny(8)) as pool:
        for number in (1, 2):
            pool.publish(take(pool, BLOCK_SIZE), readers=UNBOUNDED, key=bytes([number]) * 16)
        kept = pool.get(b"\1" * 16)
        assert kept is not None
        for key in (b"\2" * 16, b"\3" * 16):
            for lease in pool.get(key) or ():
                lease.release()
        yield pool
        kept[0].release()


# ---- cache -------------------------------------------------------------------------------------


def test_cache_stat_shows_what_it_holds_and_has_saved(pool_name: str, run: Run) -> None:
    with cached(pool_name):
        report = run("cache", "stat", pool_name, "--json").report(CacheReport)
        assert (report.stats.hits, report.stats.misses, len(report.entries)) == (2, 1, 2)
        text = run("cache", "stat", pool_name).out
        assert "3: 2 hits, 1 misses, 0 mismatches; hit rate 67%" in text
        assert "  " + "01" * 16 + "  " in text, "a key of 16 bytes is shown as such"


def test_cache_bump_raises_the_epoch(pool_name: str, run: Run) -> None:
    with cached(pool_name) as pool:
        assert run("cache", "bump", pool_name).out == f"{pool.name}: keys are made in epoch 1\n"
        assert pool.epoch == 1
        assert len(pool.entries()) == 2


def test_cache_clear_drops_every_entry(pool_name: str, run: Run) -> None:
    with cached(pool_name) as pool:
        report = run("cache", "clear", pool_name, "--json").report(CacheReport)
        assert (report.cleared, report.entries) == (2, [])
        assert pool.find(b"\1" * 16) is None
        assert "dropped 0 entries" in run("cache", "clear", pool_name).out
        assert pool.stats().draining_blocks == 1, "it is leased"


# ---- metrics -----------------------------------------------------------------------------------


def test_metrics_once_prints_what_prometheus_scrapes(scene: Scene, run: Run) -> None:
    text = run("metrics", "--once", scene.name).out
    assert f'shmblocks_pool_participants{{pool="{scene.name}",device="cpu"}} 2\n' in text
    report = run("metrics", "--json", scene.name).report(MetricsReport)
    assert {metric.name for metric in report.metrics} == metric_names()


def test_metrics_are_served_until_it_is_stopped(scene: Scene) -> None:
    with program("metrics", "--port", "0", scene.name) as process:
        url = next_line(process).removeprefix("serving ").strip()
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            assert f'shmblocks_pool_bytes{{pool="{scene.name}"' in answer.read().decode()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=PATIENCE) == ("", "")
        assert process.returncode == 130


def test_a_port_that_is_taken_is_an_error(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        answer = run("metrics", "--port", str(taken.getsockname()[1]))
    assert answer.code == 1
    assert "in use" in answer.err
    assert run("metrics", "--port", "99999").code == 2


# ---- top ---------------------------------------------------------------------------------------


def frame_text(*names: str, columns: int = 100) -> str:
    return "\n".join(line_text(parts, False) for parts in show(read_frame(names), None, columns))


def test_top_once_shows_use_and_blocks(scene: Scene, run: Run) -> None:
    text = run("top", "--once", scene.name).out
    assert f"{scene.name}  alive  " in text
    assert "53% used" in text
    assert "2 attached, 0 waiting" in text
    assert "  RRRRLLLLLLLLPPDRR" + "." * 15 in text
    (pool,) = run("top", "--json", scene.name).report(TopReport).pools
    assert pool.snapshot is not None
    assert pool.snapshot.stats.free_blocks == 15


def test_top_shows_who_waits(pool_name: str) -> None:
    with create(pool_name, role="encoder") as pool:
        handle = take(pool, 16 * BLOCK_SIZE)
        waiter = threading.Thread(
            target=pool.alloc, args=(1,), kwargs={"req_id": "req-7", "timeout": PATIENCE}
        )
        waiter.start()
        wait_until(pool.waiters, "it waits")
        text = frame_text(pool.name)
        pool.free(handle)
        waiter.join()
    assert "1 waiting" in text
    assert re.search(r"1\. waits .* for 1 block, request req-7: participant 0 .*encoder", text)


def test_top_shows_the_hit_rate_and_that_of_the_last_moment(pool_name: str) -> None:
    with cached(pool_name) as pool:
        before = read_frame([pool.name])
        assert pool.get(b"\3" * 16) is None
        now = read_frame([pool.name])
        shown = "\n".join(line_text(parts, False) for parts in show(now, before, 80))
    assert "2 entries in" in shown
    assert "hit rate 50%, now 0%" in shown
    assert "per second: 0 allocations" in shown


def test_top_says_what_it_cannot_read(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "LOCK_TIMEOUT", 0.01)
    with fork(hold_the_lock, scene.name) as child:
        child.hear("locked")
        text = frame_text(scene.name, "no-such-pool")
        child.kill()
    assert f"{scene.name}  locked" in text
    assert "could not acquire the lock" in text
    assert "no-such-pool" not in text
    assert frame_text("no-such-pool") == "no pools on this node"


def hold_the_lock(channel: Channel, name: str) -> None:
    pool = BlockPool.attach(name, prefault="off")
    assert pool.state.mutex.try_file()
    channel.say("locked")
    channel.receive(timeout=600.0)


def test_a_line_is_cut_where_the_terminal_ends() -> None:
    assert line_text(clipped(line("模型", "abc", "rest"), 6), False) == "模型ab"
    assert line_text(clipped(line("abc"), 6), False) == "abc"


class Screen:
    """`shmblocks top` in a terminal of its own (a pseudoterminal)."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, "top", "--interval", "0.1", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm-256color", **environment},
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""

    def wait_for(self, words: str, times: int = 1) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.text.count(words) < times:
            left = deadline - time.monotonic()
            assert select.select([self._ours], [], [], max(0.0, left))[0], self.text
            self._read()

    def _read(self) -> bool:
        try:
            data = os.read(self._ours, 1 << 16)
        except OSError:
            return False  # it has ended
        self.text += data.decode()
        return bool(data)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def end(self) -> int:
        """What is left of its output is read; its exit code."""
        while self._read():
            pass
        return self.process.wait(PATIENCE)

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._ours)


def test_top_refreshes_until_q_and_puts_the_terminal_back(scene: Scene) -> None:
    with Screen(scene.name) as screen:
        screen.wait_for("53%", times=3)
        screen.type("q")
        assert screen.end() == 0
        assert screen.text.startswith("\x1b[?1049h\x1b[?25l")
        assert screen.text.endswith("\x1b[?25h\x1b[?1049l")
        assert "\x1b[33mRRRR\x1b[0m" in screen.text, "colours"
        assert "per second: " in screen.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_top_and_puts_the_terminal_back(scene: Scene, number: signal.Signals) -> None:
    with Screen(scene.name) as screen:
        screen.wait_for("53%")
        screen.process.send_signal(number)
        assert screen.end() == 130
        assert screen.text.endswith("\x1b[?25h\x1b[?1049l")


def test_top_works_without_colours(scene: Scene) -> None:
    with Screen(scene.name, NO_COLOR="1") as screen:
        screen.wait_for("53%")
        screen.type("q")
        assert screen.end() == 0
        assert not re.search(r"\x1b\[[0-9;]*m", screen.text)
        assert "RRRRLLLLLLLLPPDRR" in ESCAPE.sub("", screen.text)


def test_a_terminal_that_knows_no_ansi_gets_plain_frames(scene: Scene) -> None:
    with Screen(scene.name, TERM="dumb") as screen:
        screen.wait_for("53%", times=2)
        screen.type("q")
        assert screen.end() == 0
        assert "\x1b" not in screen.text


# ---- keep --------------------------------------------------------------------------------------


def test_keep_makes_a_pool_that_outlives_its_users_and_removes_it_at_the_end(
    pool_name: str,
) -> None:
    with program("keep", pool_name, "--bytes", "1M") as process:
        assert next_line(process).startswith(f"keeping /{pool_name}, ")
        for _ in range(2):
            with BlockPool.ensure(pool_name, byte_config(1 << 20), prefault="off") as pool:
                assert pool.find_participant("keeper") is not None
                assert pool.stats().next_generation >= 1
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out, err) == (0, f"removed /{pool_name}\n", "")
    with pytest.raises(PoolNotFoundError):
        PoolInspector(pool_name)


def test_keep_finds_a_pool_that_is_there_and_leaves_it_to_its_users(pool_name: str) -> None:
    with BlockPool.create(pool_name, byte_config(1 << 20), role="user", prefault="off") as pool:
        with program("keep", pool_name, "--bytes", "1M", "--grace", "0") as process:
            next_line(process)
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0
            assert f"left {pool.name}" in out
            assert "user" in out
        assert len(pool.participants()) == 1


def test_keep_waits_for_the_others_or_for_a_second_signal(pool_name: str) -> None:
    with BlockPool.create(pool_name, byte_config(1 << 20), prefault="off") as pool:
        arguments = ("keep", pool_name, "--bytes", "1M", "--grace", "600", "--json")
        with program(*arguments, NOTIFY_SOCKET="") as process:
            wait_until(lambda: pool.find_participant("keeper"), "it keeps")
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.2)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=PATIENCE)
            report = decoded(out)
            assert not report.removed
            assert [info.pid for info in report.participants] == [os.getpid()]
        with program(*arguments) as process:
            wait_until(lambda: pool.find_participant("keeper"), "it keeps")
            process.send_signal(signal.SIGTERM)
            pool.close()
            out, _ = process.communicate(timeout=PATIENCE)
            assert decoded(out).removed


def decoded(text: str) -> KeepReport:
    import msgspec

    return msgspec.json.decode(text, type=KeepReport)


def attach_and_reserve(channel: Channel, name: str) -> None:
    pool = BlockPool.attach(name, prefault="off")
    take(pool, 16)
    channel.say("reserved")
    channel.receive(timeout=600.0)


def test_keep_gives_back_what_a_killed_user_held(pool_name: str) -> None:
    with program("keep", pool_name, "--bytes", "1M") as process:
        next_line(process)
        with fork(attach_and_reserve, pool_name) as child:
            child.hear("reserved")
            child.kill()
        with PoolInspector(pool_name) as pool:
            wait_until(lambda: pool.stats().free_blocks == 16, "reaped", PATIENCE)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=PATIENCE)
        assert out == f"removed /{pool_name}\n"


def test_keep_tells_systemd_when_the_pool_is_there(pool_name: str, tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(address)
        notify.settimeout(PATIENCE)
        with program("keep", pool_name, "--bytes", "1M", NOTIFY_SOCKET=address) as process:
            assert notify.recv(100) == b"READY=1"
            PoolInspector(pool_name).close()
            process.send_signal(signal.SIGTERM)
            assert notify.recv(100) == b"STOPPING=1"
            process.communicate(timeout=PATIENCE)


def test_keep_refuses_a_pool_of_another_size(pool_name: str, run: Run) -> None:
    with BlockPool.create(pool_name, byte_config(1 << 20), prefault="off"):
        answer = run("keep", pool_name, "--bytes", "2M")
    assert answer.code == 1
    assert "another config" in answer.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bytes", "many"), "expected a size like 8G"),
        (("--bytes", "0"), "expected a size like 8G"),
        (("--bytes", "1K"), "expected at least 65536"),
        (("--bytes", "1M", "--block-bytes", "1000"), "expected a multiple of 4096"),
        (("--bytes", "1M", "--grace", "-1"), "expected seconds"),
        ((), "--bytes"),
    ],
)
def test_keep_says_what_is_wrong_with_its_arguments(
    arguments: tuple[str, ...], words: str, run: Run
) -> None:
    answer = run("keep", "some-pool", *arguments)
    assert answer.code == 2
    assert words in answer.err


def test_the_parser_knows_all_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    assert main(["--help"]) == 0
    for name in ("top", "cache", "metrics", "keep"):
        assert re.search(rf"^ +{name} ", file.getvalue(), re.MULTILINE)
