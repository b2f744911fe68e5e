"""Who is attached: each process by itself, alive exactly as long as it lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import pytest

from shmblocks import BlockPool, InvalidStateError, ParticipantId
from shmblocks._os.segment import path_of
from shmblocks._state import participants
from shmblocks._state.layout import PARTICIPANT, WORD
from shmblocks._state.participants import utf8_prefix
from tests.core import pools
from tests.core.conftest import require_right
from tests.support.children import Channel, fork, run_in_fork, wait_until
from tests.support.inside import run_inside


def pid_word(pool: BlockPool, who: ParticipantId) -> int:
    """The word of a participant's record that its pid stands in."""
    return (pool.state.layout.participants + who.slot * PARTICIPANT.size) // WORD + 1


def living(pool: BlockPool) -> list[int]:
    """The pids of those who live."""
    return [each.pid for each in pool.participants() if each.is_alive]


# --- what is known of one ---------------------------------------------------------------------


def test_a_participant_is_shown_with_what_is_known_of_it(pool: BlockPool) -> None:
    with pools.attach(pool.name, role="language rank 1") as other:
        creator, attached = pool.participants()
        assert (creator.pid, creator.is_creator, creator.is_self) == (os.getpid(), True, True)
        assert (attached.role, attached.is_creator, attached.is_self) == (
            "language rank 1", False, False,
        )  # fmt: skip
        assert creator.pid_namespace == os.stat("/proc/self/ns/pid").st_ino
        assert creator.age_seconds >= attached.age_seconds >= 0
        assert other.participant is not None
        said = f"participant 1 (pid {os.getpid()}, language rank 1)"
        assert pool.describe(other.participant) == said
        gone = other.participant
    assert pool.describe(gone) == "participant 1 (gone)"


@pytest.mark.parametrize(
    ("role", "shown"),
    [("", ""), ("é" * 40, "é" * 31), ("x" * 63, "x" * 63), ("x" * 62 + "é", "x" * 62)],
)
def test_a_role_is_cut_between_characters(pool: BlockPool, role: str, shown: str) -> None:
    with pools.attach(pool.name, role=role):
        assert [each.role for each in pool.participants()] == ["tester", shown]


def test_text_that_is_no_text_is_shown_somehow() -> None:
    assert utf8_prefix("a\ud800b", 10) == b"a?b"


def test_a_participant_word_gives_its_id_back() -> None:
    for who in (ParticipantId(0, 1), ParticipantId(1023, 2**40)):
        assert ParticipantId.of(who.word) == who


# --- fork -------------------------------------------------------------------------------------


def test_a_forked_child_is_a_participant_of_its_own_from_its_first_call(pool: BlockPool) -> None:
    parent = pool.participant
    handle = pools.take(pool, 3)

    def in_child() -> tuple[ParticipantId | None, ParticipantId | None, list[int], str]:
        before = pool.participant
        pool.available_blocks()
        with pytest.raises(InvalidStateError, match="belongs to participant 0") as caught:
            pool.view(handle)
        pools.take(pool, 20)
        return before, pool.participant, living(pool), str(caught.value)

    before, after, pids, told = run_in_fork(in_child)
    assert before is None
    assert after is not None
    assert after != parent
    assert len(set(pids)) == 2
    assert f"pid {os.getpid()}" in told
    # It ended in good order: what it held is back, what its parent holds is untouched.
    assert pool.participant == parent
    assert pool.stats().reserved_blocks == 1
    assert living(pool) == [os.getpid()]
    pool.free(handle)


def test_a_forked_child_that_never_calls_is_no_participant(pool: BlockPool) -> None:
    assert run_in_fork(lambda: pool.participant) is None
    assert len(pool.participants()) == 1


def test_a_forked_child_may_close_what_is_its_parents_too(pool: BlockPool) -> None:
    handle = pools.take(pool)
    with_lease = pool.publish(pools.take(pool))
    lease = pool.open(with_lease)

    def in_child() -> bool:
        lease.release()  # the parent's: nothing happens
        pool.close()
        return pool.is_closed

    assert run_in_fork(in_child)
    assert not pool.is_closed
    assert not lease.is_released
    assert pool.stats().leased_blocks == 1
    lease.release()
    pool.free(handle)
    assert pool.stats().participants == 1


def test_a_fork_of_a_fork_is_one_more(pool: BlockPool) -> None:
    def in_child() -> int:
        pool.available_blocks()
        return run_in_fork(lambda: pool.stats().participants)

    assert run_in_fork(in_child) == 3


def test_a_process_that_forks_while_another_thread_is_inside_gives_its_child_a_free_lock(
    pool: BlockPool,
) -> None:
    inside, leave = threading.Event(), threading.Event()

    def body() -> None:
        inside.set()
        leave.wait(60)

    thread = threading.Thread(target=run_inside, args=(pool, body))
    thread.start()
    assert inside.wait(60)
    with fork(lambda channel: pools.take(pool).start_block) as child:
        leave.set()
        thread.join()
        assert child.result() == 0


def test_the_death_of_a_parent_is_seen_although_its_forked_child_lives(pool: BlockPool) -> None:
    """The child inherits the mapping, and with it whatever is locked on the mapped description."""
    reader, writer = os.pipe()

    def in_parent(channel: Channel) -> None:
        other = pools.attach(pool.name, role="parent")
        pools.take(other, 7)
        told, tell = os.pipe()
        if os.fork() == 0:
            os.close(writer)
            os.write(tell, b".")
            if os.read(reader, 1) == b"u":
                other.available_blocks()
                os.write(tell, b".")
                os.read(reader, 1)
            os._exit(0)
        channel.say("parent")
        os.read(told, 1)
        channel.say("forked")
        channel.receive()

    with fork(in_parent) as parent:
        parent.hear("parent")
        parent.hear("forked")
        parent.kill()
    dead = [each for each in pool.participants() if not each.is_alive]
    assert [each.role for each in dead] == ["parent"]
    report = pool.reap()
    assert (report.participants, report.reservations, report.blocks) == (1, 1, 2)
    # And the child, which was never asked, becomes a participant when it calls.
    os.write(writer, b"u")
    wait_until(lambda: len(living(pool)) == 2, "the child has joined")
    assert [each.role for each in pool.participants()] == ["tester", "parent"]
    os.close(writer)
    os.close(reader)
    wait_until(lambda: len(living(pool)) == 1, "the child has ended")


# --- exec, subprocesses, threads --------------------------------------------------------------


def test_a_process_that_becomes_another_program_is_no_participant_any_more(
    pool: BlockPool,
) -> None:
    def become_another(channel: Channel) -> None:
        other = pools.attach(pool.name)
        pools.take(other)
        os.execv("/bin/sleep", ["sleep", "1000"])

    with fork(become_another) as child:
        wait_until(lambda: pool.stats().dead_participants == 1, "the program has changed")
        assert child.exit_code is None
        assert pool.reap().reservations == 1
        child.kill()


@pytest.mark.parametrize("close_fds", [True, False])
def test_a_program_that_was_started_keeps_no_dead_participant_alive(
    pool: BlockPool, close_fds: bool
) -> None:
    reader, writer = os.pipe()

    def start_program(channel: Channel) -> None:
        other = pools.attach(pool.name)
        subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"],
            stdin=reader,
            close_fds=close_fds,
            pass_fds=() if not close_fds else (reader,),
        )
        channel.say("started")
        channel.receive()
        other.close()  # until then it is held, and not left to the collector

    with fork(start_program) as child:
        child.hear("started")
        os.close(reader)
        child.kill()
    assert pool.stats().dead_participants == 1
    os.close(writer)


def test_threads_that_come_and_go_are_one_participant(pool: BlockPool) -> None:
    def use() -> None:
        for _ in range(20):
            handle = pools.take(pool)
            assert pool.view(handle).num_tokens == 1
            pool.free(handle)

    for _ in range(3):
        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(pool.participants()) == 1
    assert pool.available_blocks() == 16


def test_a_thread_that_ended_leaves_what_it_reserved_to_its_process(pool: BlockPool) -> None:
    taken: list[object] = []
    thread = threading.Thread(target=lambda: taken.append(pools.take(pool)))
    thread.start()
    thread.join()
    assert pool.reap().blocks == 0
    assert pool.stats().reserved_blocks == 1


# --- death ------------------------------------------------------------------------------------


def stay(channel: Channel, name: str) -> None:
    pool = pools.attach(name, role="victim")
    pools.take(pool, 5)
    channel.say(pool.participant)
    channel.receive()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
def test_a_death_of_any_kind_is_seen_at_once(pool: BlockPool, number: signal.Signals) -> None:
    with fork(stay, pool.name) as child:
        who = child.receive()
        assert isinstance(who, ParticipantId)
        assert pool.is_alive(who)
        child.signal(number)
        child.wait()
        assert not pool.is_alive(who)
        assert pool.describe(who) == f"participant 1 (pid {child.pid}, victim, dead)"
        child.kill()
    assert pool.reap().reservations == 1


def test_a_stopped_process_lives_and_keeps_what_it_holds(pool: BlockPool) -> None:
    with fork(stay, pool.name) as child:
        child.receive()
        child.stop()
        assert len(living(pool)) == 2
        assert pool.reap().blocks == 0
        assert pool.alloc_blocks(15, 1) is None
        child.resume()
        child.kill()


def test_a_slot_is_used_again_under_another_incarnation(pool: BlockPool) -> None:
    first = pools.attach(pool.name)
    who = first.participant
    assert who is not None
    handle = pools.take(first, 5)
    pools.abandon(first)
    assert pool.reap().blocks == 2
    with pools.attach(pool.name) as second:
        newcomer = second.participant
        assert newcomer is not None
        assert newcomer.slot == who.slot
        assert newcomer.incarnation != who.incarnation
        assert not pool.is_alive(who)
        assert pool.is_alive(newcomer)
        # The same blocks, the same slot: still not the same.
        again = second.alloc_blocks(16, 1)
        assert again is not None
        assert again.generation != handle.generation
        assert pool.reap().blocks == 0


def test_what_the_dead_held_is_never_taken_for_the_newcomers(pool: BlockPool) -> None:
    first = pools.attach(pool.name)
    pools.take(first, 5)
    pools.abandon(first)
    with pools.attach(pool.name) as second:
        assert pool.reap().blocks == 2
        mine = pools.take(second, 9)
        assert second.reap().blocks == 0
        assert second.view(mine).num_tokens == 9


def test_a_dead_participant_whose_pid_belongs_to_another_now_is_dead(pool: BlockPool) -> None:
    """As after pid reuse: its record names a process that lives."""
    other = pools.attach(pool.name)
    who = other.participant
    assert who is not None
    pools.abandon(other)
    pools.set_word(pool, pid_word(pool, who), os.getpid())
    assert not pool.is_alive(who)
    assert pool.reap().participants == 1


def test_a_participant_is_alive_whatever_its_record_says_of_its_pid(pool: BlockPool) -> None:
    with pools.attach(pool.name) as other:
        who = other.participant
        assert who is not None
        pools.set_word(pool, pid_word(pool, who), 2**22)
        assert not Path(f"/proc/{2**22}").exists()
        assert pool.is_alive(who)
        assert pool.reap().participants == 0


def test_a_process_that_proc_hides_is_not_taken_for_one_that_dies(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: with /proc mounted with hidepid=1, `close` failed with the PermissionError."""

    def denied(path: str, mode: str) -> NoReturn:
        raise PermissionError(1, "Operation not permitted", path)

    other = pools.attach(pool.name)
    monkeypatch.setattr(participants, "open", denied, raising=False)
    other.close()
    assert other.is_closed
    assert Path(path_of(pool.name)).exists()


def test_nobody_who_was_never_there_is_alive(pool: BlockPool) -> None:
    for who in (
        ParticipantId(0, 0),
        ParticipantId(0, 99),
        ParticipantId(7, 1),
        ParticipantId(99, 1),
    ):
        assert not pool.is_alive(who)


def test_killed_between_locking_its_slot_and_writing_its_record_nobody_was_there(
    pool: BlockPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def join_and_die(channel: Channel) -> None:
        from shmblocks._state.participants import Participants

        monkeypatch.setattr(Participants, "_fill", lambda *args: os.kill(os.getpid(), 9))
        pools.attach(pool.name)

    with fork(join_and_die) as child:
        assert child.wait() == -signal.SIGKILL
        child.kill()
    assert len(pool.participants()) == 1
    with pools.attach(pool.name) as other:
        assert other.participant is not None
        assert other.participant.slot == 1
        require_right(pool)


# --- processes that write for others -----------------------------------------------------------


def test_what_a_dead_process_held_waits_for_those_who_write_for_it(pool: BlockPool) -> None:
    with fork(_hold_with_a_writer, pool.name) as holder:
        writer = holder.receive()
        assert isinstance(writer, int)
        holder.kill()
    dead = next(each for each in pool.participants() if not each.is_self)
    assert not dead.is_alive
    for _ in range(2):
        pool.reap()
        assert len(pool.allocations()) == 1
    os.kill(writer, signal.SIGKILL)
    wait_until(lambda: pool.reap().participants == 1, "nobody writes any more")
    assert pool.allocations() == []
    require_right(pool)


def _hold_with_a_writer(channel: Channel, name: str) -> None:
    """Reserve, and start a process that maps what `open_for_writer` gave, and has nothing else."""
    pool = pools.attach(name)
    pools.take(pool, 3)
    file = pool.state.open_for_writer()
    program = (
        "import mmap, os, signal, sys; fd = int(sys.argv[1]); mapping = mmap.mmap(fd, 4096); "
        "os.close(fd); print(flush=True); signal.pause()"
    )
    with file:
        command = [sys.executable, "-c", program, str(file.fileno())]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[file.fileno()])
    assert writer.stdout is not None
    writer.stdout.readline()
    channel.say(writer.pid)
    channel.receive()


def test_leaving_gives_nothing_back_while_somebody_writes_for_the_leaver(pool: BlockPool) -> None:
    other = pools.attach(pool.name)
    pools.take(other, 3)
    first, second = other.state.open_for_writer(), other.state.open_for_writer()
    first.close()
    other.close()
    pool.reap()
    assert len(pool.allocations()) == 1
    second.close()
    assert pool.reap().participants == 1
    assert pool.allocations() == []
    require_right(pool)


def test_a_living_process_is_not_changed_by_those_who_write_for_it(pool: BlockPool) -> None:
    handle = pools.take(pool, 3)
    with pool.state.open_for_writer():
        assert all(each.is_alive for each in pool.participants())
        pool.free(handle)
        assert pool.allocations() == []
    require_right(pool)
