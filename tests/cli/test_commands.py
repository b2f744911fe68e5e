"""Every command against a real pool: text, JSON, exit codes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from shmblocks import UNBOUNDED, BlockPool, HandleQueue, PoolConfig, PoolInspector
from shmblocks._os.segment import path_of
from shmblocks._state.info import AllocationInfo, PoolSnapshot
from shmblocks._state.layout import H_FREE_BLOCKS, H_VERSION, WORD
from shmblocks.cli import commands
from shmblocks.cli.commands import (
    CheckReport,
    DoctorReport,
    ListReport,
    ReapAllReport,
    RemoveReport,
)
from shmblocks.cli.main import COMMANDS
from shmblocks.cli.stat import PoolReport, QueueReport
from shmblocks.doctor import CheckResult
from tests.cli.conftest import CONFIG, Run, Scene
from tests.support.children import Channel, Child, fork, wait_until


def create_and_wait(channel: Channel, name: str) -> None:
    """A child that leaves a dead pool behind when it is killed."""
    pool = BlockPool.create(name, CONFIG, role="gone", prefault="off")
    pool.alloc(8)
    channel.say("ready")
    channel.receive(timeout=600.0)


@pytest.fixture
def dead_pool(pool_name: str) -> Iterator[str]:
    with fork(create_and_wait, pool_name) as child:
        child.hear("ready")
        child.kill()
    yield "/" + pool_name
    Path(path_of(pool_name)).unlink(missing_ok=True)


def create_queue_and_wait(channel: Channel, name: str) -> None:
    queue = HandleQueue.create(name, 4)
    queue.put(b"lost")
    channel.say("ready")
    channel.receive()


def write_word(name: str, word: int, value: int) -> None:
    """Somebody writes into the segment who should not."""
    with open(path_of(name), "r+b") as file:
        file.seek(word * WORD)
        file.write(value.to_bytes(WORD, "little"))


def role(row: AllocationInfo) -> str:
    assert row.owner is not None
    return row.owner.role


# ---- ls ----------------------------------------------------------------------------------------


def test_ls_shows_a_living_pool_and_its_use(scene: Scene, run: Run) -> None:
    answer = run("ls")
    (row,) = (line.split() for line in answer.out.splitlines() if scene.name in line)
    assert row[:3] == [scene.name, "pool", "alive"]
    assert row[-5:] == ["2", "0", "17/32", "53%", "-"]
    assert answer.code == 0


def test_ls_json_has_the_same_facts(scene: Scene, run: Run) -> None:
    pools = run("ls", "--json").report(ListReport).pools
    (row,) = (pool for pool in pools if pool.name == scene.name)
    assert row.state == "alive"
    assert row.size_bytes == os.path.getsize(path_of(scene.name))
    assert row.stats is not None
    assert (row.participants, row.stats.dead_participants) == (2, 0)
    assert (row.stats.block_size, row.stats.total_blocks, row.stats.free_blocks) == (4, 32, 15)


def test_ls_shows_a_dead_pool_as_dead(dead_pool: str, run: Run) -> None:
    pools = run("ls", "--json").report(ListReport).pools
    (row,) = (pool for pool in pools if pool.name == dead_pool)
    assert row.state == "dead"
    assert row.stats is not None
    assert (row.participants, row.stats.dead_participants) == (0, 1)


def test_ls_shows_a_pool_of_another_version_with_the_reason(scene: Scene, run: Run) -> None:
    write_word(scene.name, H_VERSION, 99)
    pools = run("ls", "--json").report(ListReport).pools
    text = run("ls").out
    write_word(scene.name, H_VERSION, 1)
    (row,) = (pool for pool in pools if pool.name == scene.name)
    assert row.state == "incompatible"
    assert row.stats is None
    assert "99" in row.problem
    assert row.problem in text


@pytest.mark.usefixtures("_only_this_run")
def test_ls_of_an_empty_node_says_so(run: Run) -> None:
    assert run("ls").out == "  no pools on this node\n"
    assert run("ls", "--json").report(ListReport).pools == []


# ---- stat --------------------------------------------------------------------------------------


def test_stat_accounts_for_every_block(scene: Scene, run: Run) -> None:
    answer = run("stat", scene.name)
    account = "15 free + 6 reserved + 2 published + 8 leased + 1 draining + 0 settling = 32 blocks"
    assert f"blocks    {account}" in answer.out
    assert answer.code == 0
    stats = run("stat", scene.name, "--json").report(PoolReport).stats
    assert (stats.free_blocks, stats.reserved_blocks, stats.published_blocks) == (15, 6, 2)
    assert (stats.leased_blocks, stats.draining_blocks, stats.settling_blocks) == (8, 1, 0)


def test_stat_tells_who_holds_what_for_which_request(scene: Scene, run: Run) -> None:
    report = run("stat", scene.name, "--json").report(PoolReport)
    rows = [
        (row.start_block, row.num_blocks, row.num_tokens, str(row.state), row.req_id, role(row))
        for row in report.allocations
    ]
    assert rows == [
        (0, 4, 16, "reserved", "req-1", "embedding"),
        (4, 8, 30, "leased", "req-2", "embedding"),
        (12, 2, 8, "published", "", "embedding"),
        (14, 1, 4, "draining", "", "embedding"),
        (15, 2, 8, "reserved", "img-7", "language-0"),
    ]
    leased = report.allocations[1]
    assert leased.readers_left == 1
    (lease,) = leased.leases
    assert lease.holder is not None
    assert (lease.kind, lease.holder.pid, lease.holder.is_alive) == ("reads", scene.child.pid, True)
    assert not lease.is_pending
    assert report.config == CONFIG
    assert (report.kind, report.stats.pool_id) == ("pool", scene.pool.pool_id)
    assert f"{scene.pool.pool_id:016x}" in run("stat", scene.name).out


def test_stat_shows_participants_with_pid_namespace_and_role(scene: Scene, run: Run) -> None:
    namespace = os.stat("/proc/self/ns/pid").st_ino
    rows = run("stat", scene.name, "--json").report(PoolReport).participants
    assert [(row.slot, row.pid, row.pid_namespace, row.role, row.is_alive) for row in rows] == [
        (0, os.getpid(), namespace, "embedding", True),
        (1, scene.child.pid, namespace, "language-0", True),
    ]
    text = run("stat", scene.name).out
    assert re.search(
        rf"^ +1 +{scene.child.pid} +{namespace} +language-0 +alive ", text, re.MULTILINE
    )


def test_stat_marks_the_dead(scene: Scene, run: Run) -> None:
    scene.child.kill()
    report = run("stat", scene.name, "--json").report(PoolReport)
    assert [row.is_alive for row in report.participants] == [True, False]
    owner = report.allocations[4].owner
    assert owner is not None
    assert not owner.is_alive
    assert f"participant 1 (pid {scene.child.pid}, language-0, dead)" in run("stat", scene.name).out


def test_stat_works_on_a_dead_pool_and_does_not_revive_it(dead_pool: str, run: Run) -> None:
    assert run("stat", dead_pool, "--json").report(PoolReport).state == "dead"
    assert run("stat", dead_pool, "--json").report(PoolReport).state == "dead"


def test_looking_at_a_pool_does_not_keep_it_alive(pool_name: str, run: Run) -> None:
    with BlockPool.create(pool_name, CONFIG, prefault="off"):
        assert run("stat", pool_name).code == 0
    assert not os.path.exists(path_of(pool_name))


def test_names_are_taken_with_and_without_a_slash(scene: Scene, run: Run) -> None:
    bare = scene.name.removeprefix("/")
    assert run("check", bare) == run("check", "/" + bare)


@pytest.fixture
def waiter(scene: Scene) -> Iterator[Child]:
    """A process that waits for more blocks than are free."""
    with fork(wait_for_blocks, scene.name) as child:
        wait_until(lambda: scene.pool.stats().waiters == 1, "it waits")
        yield child
        child.kill()


def wait_for_blocks(channel: Channel, name: str) -> None:
    BlockPool.attach(name, role="prefetch", prefault="off").alloc(80, "req-9", timeout=600.0)


def test_stat_shows_who_waits_for_how_many_blocks_and_since_when(
    scene: Scene, waiter: Child, run: Run
) -> None:
    report = run("stat", scene.name, "--json").report(PoolReport)
    (row,) = report.waiters
    assert row.participant is not None
    assert (row.participant.pid, row.num_blocks, row.req_id) == (waiter.pid, 20, "req-9")
    assert 0 <= row.seconds_since_poll <= row.age_seconds
    assert report.stats.waiters == 1
    section = run("stat", scene.name).out.split("waiting for blocks, in order of arrival\n")[1]
    assert re.search(
        rf"^ +1\. +20 +.* s +.* s ago +req-9 +participant 2 \(pid {waiter.pid}, prefetch\)$",
        section,
        re.MULTILINE,
    )


def test_stat_and_map_show_one_moment(
    scene: Scene, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: each asked three times, so that the account and the allocations could disagree."""
    for question in ("stats", "allocations", "participants", "waiters"):
        monkeypatch.delattr(PoolInspector, question)
    assert run("stat", scene.name).code == 0
    assert run("map", scene.name).code == 0


def test_stat_shows_leases_that_wait_for_a_stream(
    scene: Scene, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PoolInspector(scene.name) as pool:
        snapshot = pool.snapshot()
    leased = snapshot.allocations[1]
    (lease,) = leased.leases
    leased = replace(leased, leases=[lease, replace(lease, is_pending=True)], readers_left=0)
    snapshot = replace(snapshot, allocations=[leased])
    monkeypatch.setattr(PoolInspector, "snapshot", lambda _: snapshot)
    text = run("stat", scene.name).out
    assert text.count("1 open, 1 pending") == 1
    assert text.count("pending: released, its stream is still at work") == 1


def test_stat_of_a_queue_shows_its_messages(pool_name: str, run: Run) -> None:
    """Found: errors of queues advise `shmblocks stat`, which refused queues."""
    with HandleQueue.create(pool_name, 4, message_bytes=512) as queue:
        queue.put(b"one")
        report = run("stat", pool_name, "--json").report(QueueReport)
        text = run("stat", pool_name).out
    assert (report.name, report.kind, report.state) == (queue.name, "queue", "alive")
    assert (report.messages, report.capacity, report.message_bytes) == (1, 4, 512)
    assert re.search(r"^  messages +1 of at most 4$", text, re.MULTILINE)


def test_stat_of_a_queue_shows_its_participants(pool_name: str, run: Run) -> None:
    with HandleQueue.create(pool_name, 4):
        (row,) = run("stat", pool_name, "--json").report(QueueReport).participants
        refusal = run("rm", pool_name).err
    assert (row.pid, row.is_alive) == (os.getpid(), True)
    assert f"(pid {os.getpid()})" in refusal


def test_stat_of_a_pool_that_owns_nothing_says_none(pool_name: str, run: Run) -> None:
    with BlockPool.create(pool_name, PoolConfig(total_tokens=8, block_size=4), prefault="off"):
        text = run("stat", pool_name).out
    assert "allocations\n  none\n" in text
    assert "leases\n  none\n" in text
    assert text.endswith("waiting for blocks, in order of arrival\n  nobody\n")


# ---- map ---------------------------------------------------------------------------------------

MAP = """\
{name}: blocks of 4 tokens, 1 block per character
15 free + 6 reserved + 2 published + 8 leased + 1 draining + 0 settling = 32 blocks

 0  RRRRLLLLLLLLPPDRR...............
    a---a-------a-ab-

. free  R reserved  P published  L leased  D draining  S settling
below each row: its owner where an allocation begins, - continues
a participant 0 (pid {parent}, embedding): 4 allocations, 15 blocks
b participant 1 (pid {child}, language-0{dead}): 1 allocation, 2 blocks

since it was made, over all processes: 5 allocations, 3 publishes, 2 opens, 0 releases, 0 timeouts
"""

COARSE = """\
 0  RLLPr...
    aa-*-

. free  R reserved  P published  L leased  D draining  S settling  (small: partly free)
below each row: its owner where an allocation begins, - continues, * several owners
"""


def test_the_map_of_a_known_pool_is_this(scene: Scene, run: Run) -> None:
    facts = {"name": scene.name, "parent": os.getpid(), "child": scene.child.pid}
    assert run("map", scene.name, "--width", "60").out == MAP.format(**facts, dead="")
    scene.child.kill()
    assert run("map", scene.name, "--width", "60").out == MAP.format(**facts, dead=", dead")


def test_the_map_of_a_cache_shows_its_hit_rate(pool_name: str, run: Run) -> None:
    config = PoolConfig(total_tokens=8, block_size=4)
    with BlockPool.create(pool_name, config, prefault="off") as pool:
        with pool.reserve(4) as reservation:
            reservation.publish(readers=UNBOUNDED, key=b"a picture".ljust(16))
        for key in (b"a picture", b"another", b"a third", b"a fourth"):
            for lease in pool.get(key.ljust(16)) or ():
                lease.release()
        assert "cache: 4 lookups, 25% hits; 1 puts, 0 evictions\n" in run("map", pool_name).out


def test_the_map_fits_the_width_and_the_rows(
    scene: Scene, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    lines = run("map", scene.name).out.splitlines()
    assert lines[3:7] == [
        " 0  RRRRLLLLLLLLPPDR",
        "    a---a-------a-ab",
        "16  R...............",
        "    -",
    ]
    coarse = run("map", scene.name, "--width", "12", "--rows", "1").out
    assert "4 blocks per character" in coarse
    assert coarse.split("\n\n", 1)[1].startswith(COARSE)


def test_map_json_is_what_the_picture_is_drawn_from(scene: Scene, run: Run) -> None:
    report = run("map", scene.name, "--json").report(PoolSnapshot)
    assert [(row.start_block, row.num_blocks) for row in report.allocations] == [
        (0, 4),
        (4, 8),
        (12, 2),
        (14, 1),
        (15, 2),
    ]
    assert report.stats.total_blocks == 32


# ---- check -------------------------------------------------------------------------------------


def test_check_of_a_whole_pool_ends_with_0(scene: Scene, run: Run) -> None:
    assert run("check", scene.name) == (0, f"{scene.name}: all invariants hold\n", "")
    assert run("check", scene.name, "--json").report(CheckReport).violations == []


def test_check_prints_each_violation_and_ends_with_1(scene: Scene, run: Run) -> None:
    write_word(scene.name, H_FREE_BLOCKS, 3)
    text, document = run("check", scene.name), run("check", scene.name, "--json")
    write_word(scene.name, H_FREE_BLOCKS, 15)
    assert (text.code, document.code) == (1, 1)
    (violation,) = document.report(CheckReport).violations
    assert violation.invariant == 1
    assert f"{scene.name}: 1 violation\n  invariant 1: {violation.message}\n" == text.out


# ---- rm ----------------------------------------------------------------------------------------


def test_rm_refuses_while_somebody_lives_and_names_them(scene: Scene, run: Run) -> None:
    answer = run("rm", scene.name)
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.count("\n") == 1
    assert f"participant 0 (pid {os.getpid()}, embedding)" in answer.err
    assert f"participant 1 (pid {scene.child.pid}, language-0)" in answer.err
    assert "--force" in answer.err
    assert os.path.exists(path_of(scene.name))


def test_a_refusal_has_its_json_too(scene: Scene, run: Run) -> None:
    answer = run("rm", scene.name, "--json")
    assert answer.code == 1
    report = answer._replace(err="").report(RemoveReport)
    assert not report.removed
    assert [row.role for row in report.participants] == ["embedding", "language-0"]


def test_rm_force_takes_the_name_and_leaves_the_living_their_memory(scene: Scene, run: Run) -> None:
    answer = run("rm", scene.name, "--force")
    assert answer.code == 0
    assert answer.out.startswith(f"removed {scene.name}\n  still used by participant 0 (pid ")
    assert not os.path.exists(path_of(scene.name))
    assert scene.pool.alloc(4) is not None


def test_rm_removes_a_dead_pool(dead_pool: str, run: Run) -> None:
    assert run("rm", dead_pool) == (0, f"removed {dead_pool}\n", "")
    assert not os.path.exists(path_of(dead_pool))


def test_rm_removes_a_dead_pool_of_another_version(dead_pool: str, run: Run) -> None:
    write_word(dead_pool, H_VERSION, 99)
    assert run("rm", dead_pool).code == 0
    assert not os.path.exists(path_of(dead_pool))


def test_rm_leaves_segments_alone_that_are_no_pools(pool_name: str, run: Run) -> None:
    path = Path(path_of(pool_name))
    path.write_bytes(bytes(8192))
    answer = run("rm", pool_name, "--force")
    assert path.exists()
    path.unlink()
    assert answer.code == 1
    assert "not a pool" in answer.err


# ---- reap --------------------------------------------------------------------------------------


def test_reap_gives_back_what_the_dead_held(scene: Scene, run: Run) -> None:
    assert run("reap", scene.name).out == f"{scene.name}: nothing to reap\n"
    scene.child.kill()
    assert run("reap", scene.name).out == (
        f"{scene.name}: freed 2 blocks: 1 dead participant, 1 reservation of the dead, "
        "1 lease of the dead\n"
    )
    assert scene.pool.available_blocks() == 17


@pytest.mark.usefixtures("_only_this_run")
def test_reap_all_reaps_the_living_and_removes_the_dead(
    scene: Scene, new_pool_name: Callable[[], str], run: Run
) -> None:
    with fork(create_and_wait, dead := new_pool_name()) as child:
        child.hear("ready")
        child.kill()
    size = os.path.getsize(path_of(dead))
    scene.child.kill()
    rows = {row.name: row for row in run("reap", "--all", "--json").report(ReapAllReport).pools}
    reaped = rows[scene.name].report
    assert reaped is not None
    assert (reaped.participants, reaped.blocks) == (1, 2)
    assert rows["/" + dead].removed
    assert rows["/" + dead].freed_bytes == size
    assert not os.path.exists(path_of(dead))
    assert run("reap", "--all").out == f"{scene.name}: nothing to reap\n"


@pytest.mark.usefixtures("_only_this_run")
def test_reap_all_leaves_pools_of_other_versions_alone(dead_pool: str, run: Run) -> None:
    write_word(dead_pool, H_VERSION, 99)
    answer = run("reap", "--all")
    assert answer.code == 0
    assert answer.out.startswith(f"{dead_pool}: left alone: ")
    assert os.path.exists(path_of(dead_pool))


@pytest.mark.usefixtures("_only_this_run")
def test_a_dead_queue_is_shown_and_removed_and_a_living_one_left_alone(
    new_pool_name: Callable[[], str], run: Run
) -> None:
    """Found: no command saw the leftover of a queue, which only its next `create` removed."""
    with fork(create_queue_and_wait, dead := new_pool_name()) as child:
        child.hear("ready")
        child.kill()
    with HandleQueue.create(new_pool_name(), 4) as queue:
        listed = {row.name: row for row in run("ls", "--json").report(ListReport).pools}
        assert (listed[f"/{dead}"].state, listed[f"/{dead}"].kind) == ("dead", "queue")
        assert listed[queue.name].state == "alive"
        rows = {row.name: row for row in run("reap", "--all", "--json").report(ReapAllReport).pools}
        assert rows[f"/{dead}"].removed
        assert (rows[queue.name].removed, rows[queue.name].skipped) == (False, "a queue in use")
        assert not os.path.exists(path_of(dead))
        assert run("rm", queue.name).code == 1
        queue.put(b"still there")


def test_rm_removes_a_dead_queue(pool_name: str, run: Run) -> None:
    with fork(create_queue_and_wait, pool_name) as child:
        child.hear("ready")
        child.kill()
    assert run("rm", pool_name) == (0, f"removed /{pool_name}\n", "")
    assert not os.path.exists(path_of(pool_name))


# ---- doctor ------------------------------------------------------------------------------------

CHECKS = [
    CheckResult("shm-size", "ok", "much"),
    CheckResult("memory-limit", "warn", "little", "raise it"),
]
DOCTOR = """\
ok    shm-size      much
warn  memory-limit  little
                    -> raise it

1 ok, 1 warning, 0 failures, 0 skipped: pools work here
"""
FAILED = CheckResult("futex", "fail", "refused", "newer kernel")


def test_doctor_shows_advice_and_ends_with_0_unless_a_check_fails(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "run_checks", lambda checks: CHECKS)
    assert run("doctor") == (0, DOCTOR, "")


def test_doctor_ends_with_1_when_a_check_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "run_checks", lambda checks: [*CHECKS, FAILED])
    answer = run("doctor", "--json")
    report = answer.report(DoctorReport)
    assert answer.code == 1
    assert not report.healthy
    assert report.checks[-1] == FAILED


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["stat", "map", "check", "rm", "reap"])
def test_a_pool_that_is_not_there_is_one_line_and_a_1(
    command: str, pool_name: str, run: Run
) -> None:
    answer = run(command, pool_name)
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith(f"shmblocks: pool /{pool_name}: there is no such pool")
    assert answer.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "expected a command"),
        (("list",), "invalid choice: 'list'"),
        (("stat",), "required: NAME"),
        (("stat", "a/b"), "got 'a/b'"),
        (("stat", "x", "--yaml"), "--yaml"),
        (("map", "x", "--rows", "0"), "at least 1, got '0'"),
        (("reap",), "either NAME or --all"),
        (("reap", "x", "--all"), "either NAME or --all"),
    ],
)
def test_wrong_arguments_are_one_line_and_a_2(
    arguments: tuple[str, ...], told: str, run: Run
) -> None:
    answer = run(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("shmblocks: ")
    assert told in answer.err
    assert "--help" in answer.err
    assert answer.err.count("\n") == 1


def test_the_help_of_every_command_has_examples_and_json_keys(run: Run) -> None:
    assert run("--help").code == 0
    for name, command in COMMANDS.items():
        answer = run(name, "--help")
        assert answer.code == 0
        assert answer.err == ""
        for call, _ in command.examples:
            assert call in answer.out
        assert "JSON keys:" in answer.out
        assert max(map(len, answer.out.splitlines())) <= 100


def test_a_version_is_told(run: Run) -> None:
    answer = run("--version")
    assert answer.code == 0
    assert answer.out.startswith("shmblocks ")
