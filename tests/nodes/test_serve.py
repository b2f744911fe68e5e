"""`shmblocks serve`, as a process of its own."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmblocks import AuthenticationError, BlockPool
from shmblocks.cli.main import main
from shmblocks.nodes import RemotePool, nixl_agent
from tests.nodes.kit import KEY, LONG, assert_arrived, assert_nothing_held, publish, two_pools


class Sidecar:
    """A running `shmblocks serve`."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "shmblocks.cli", "serve", *arguments, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stderr is not None
        said = self._process.stderr.readline()
        assert said.startswith("shmblocks: serving /"), said
        host, _, port = said.rpartition(" ")[2].strip().rpartition(":")
        self.address = (host, int(port))

    def end(self, number: signal.Signals, told: str = "") -> dict[str, object]:
        """Its report; `told`: what it has said on standard error meanwhile."""
        self._process.send_signal(number)
        out, errors = self._process.communicate(timeout=LONG)
        assert self._process.returncode == 0
        assert told in errors if told else errors == ""
        report: dict[str, object] = json.loads(out)
        return report

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def sidecar(*arguments: str) -> Iterator[Sidecar]:
    running = Sidecar(*arguments)
    try:
        yield running
    finally:
        running.close()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_sidecar_serves_until_it_is_told_to_end(
    ending: signal.Signals, tmp_path: Path, rng: random.Random
) -> None:
    key = tmp_path / "key"
    key.write_bytes(KEY)
    with (
        two_pools() as (here, there),
        sidecar(there.name, "--listen", "127.0.0.1:0", "--key-file", str(key)) as running,
    ):
        assert "node server" in {info.role for info in there.participants()}
        published = publish(there, 9, rng)
        with RemotePool(here, running.address, key=KEY) as remote:
            assert_arrived(here, remote.fetch(published.handle, timeout=LONG), published)
            with (
                RemotePool(here, running.address) as stranger,
                pytest.raises(AuthenticationError),
            ):
                stranger.ping(LONG)
        assert_nothing_held(there)
        report = running.end(ending, told="turned away")
        assert report["pools"] == [there.name]
        assert (report["fetched"], report["strangers"]) == (1, 1)
        assert report["sent_bytes"] == 9 * there.config.token_bytes
        assert "node server" not in {info.role for info in there.participants()}


def test_a_pool_outlives_its_engine_while_a_sidecar_serves_it(
    pool_name: str, rng: random.Random
) -> None:
    with two_pools() as (here, there):
        engine = BlockPool.create(pool_name, there.config, prefault="off")
        with sidecar(pool_name, "--listen", "127.0.0.1:0") as running:
            published = publish(engine, 9, rng)
            engine.close()
            with RemotePool(here, running.address) as remote:
                assert_arrived(here, remote.fetch(published.handle, timeout=LONG), published)
            with BlockPool.ensure(pool_name, there.config, prefault="off") as restarted:
                assert restarted.pool_id == published.handle.pool_id
            running.end(signal.SIGTERM)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("no-such-pool", "--listen", "127.0.0.1:0"), 1, "no-such-pool"),
        (("x", "--listen", "7400"), 2, "HOST:PORT"),
        (("x",), 2, "--listen"),
        (("x", "--listen", "127.0.0.1:0", "--key-file", "/no/such/file"), 1, "/no/such/file"),
    ],
)
def test_arguments_that_make_no_sense_are_told_in_one_line(
    arguments: tuple[str, ...], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments]) == code
    out, errors = capsys.readouterr()
    assert out == ""
    assert told in errors
    assert errors.count("\n") == 1


def test_without_a_key_it_serves_loopback_only(capsys: pytest.CaptureFixture[str]) -> None:
    with two_pools() as (_, there):
        assert main(["serve", there.name, "--listen", "0.0.0.0:0"]) == 2
    assert "without a key" in capsys.readouterr().err


@pytest.mark.usefixtures("real")
def test_a_sidecar_offers_nixl(rng: random.Random) -> None:
    with (
        two_pools() as (here, there),
        sidecar(there.name, "--listen", "127.0.0.1:0", "--nixl") as running,
    ):
        published = publish(there, 9, rng)
        with RemotePool(here, running.address, engine="nixl") as remote:
            assert_arrived(here, remote.fetch(published.handle, timeout=LONG), published)
        assert_nothing_held(there)
        assert running.end(signal.SIGTERM)["fetched"] == 1


def test_without_nixl_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nixl_agent, "PACKAGES", ("no_such_package_of_nixl",))
    with two_pools() as (_, there):
        assert main(["serve", there.name, "--listen", "127.0.0.1:0", "--nixl"]) == 2
    assert "pip install 'shmblocks[nixl]'" in capsys.readouterr().err
