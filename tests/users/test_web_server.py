"""A web server that loads everything first and then forks its workers (gunicorn, uwsgi)."""

from __future__ import annotations

import os
import sys

import pytest

from tests.users.kit import Program

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its rights")


def test_each_worker_of_a_preloaded_server_is_a_participant_of_its_own(program: Program) -> None:
    assert (
        program.run("""
            pool = BlockPool.create(NAME, CONFIG)
            queue = HandleQueue.create(QUEUE, 16, message_type=BlockHandle)
            workers = []
            for number in range(1, 4):
                worker = os.fork()
                if worker == 0:
                    send(pool, queue, number)
                    sys.exit()
                workers.append(worker)
            print(sorted(receive(pool, queue) for _ in workers))
            print([os.waitpid(worker, 0)[1] for worker in workers], people(pool))
        """)
        == "[1, 2, 3]\n[0, 0, 0] 1 here, 0 dead\n"
    )


def test_workers_that_share_one_queue_lose_no_message_and_get_none_twice(program: Program) -> None:
    assert (
        program.run("""
            queues = [HandleQueue.create(f"{QUEUE}-{number}", 64) for number in range(2)]
            workers = []
            for number in range(4):
                worker = os.fork()
                if worker == 0:
                    for message in range(200):
                        queues[message % 2].put(b"%d %d" % (number, message))
                    os._exit(0)
                workers.append(worker)
            got = [queues[number % 2].get(timeout=20) for number in range(800)]
            [os.waitpid(worker, 0) for worker in workers]
            print(len(set(got)), [queue.qsize() for queue in queues])
        """)
        == "800 [0, 0]\n"
    )


@as_root
def test_a_worker_that_gave_up_its_rights_and_forks_shares_no_lock_and_no_slot_with_its_parent(
    program: Program,
) -> None:
    """CASES B: the first segment that could not be opened again left all later ones shared."""
    assert (
        program.run("""
            pools = [BlockPool.create(f"{NAME}-{number}", CONFIG) for number in range(3)]
            queues = [HandleQueue.create(f"{QUEUE}-{number}", 4) for number in range(3)]

            def outcome(act):
                try:
                    act()
                except Exception as error:
                    return type(error).__name__
                return "works"

            def uses():
                yield from (lambda pool=pool: pool.free(pool.alloc(1)) for pool in pools)
                yield from (lambda queue=queue: queue.put(b"m") for queue in queues)

            child = os.fork()
            if child == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                print("the worker:", *map(outcome, uses()), flush=True)
                grandchild = os.fork()
                if grandchild == 0:
                    print("its child:", *map(outcome, uses()), flush=True)
                    os._exit(0)
                os.waitpid(grandchild, 0)
                print("the worker:", *map(outcome, uses()), flush=True)
                os._exit(0)
            os.waitpid(child, 0)
            for pool in pools:
                pool.reap()
            print("the master:", *map(outcome, uses()), *(queue.qsize() for queue in queues))
        """)
        == "the worker: works works works works works works\n"
        "its child:" + " PoolClosedError" * 6 + "\n"
        "the worker: works works works works works works\n"
        "the master: works works works works works works 3 3 3\n"
    )


@as_root
def test_a_worker_that_gave_up_its_rights_can_leave_but_the_segment_waits_for_its_owner(
    program: Program,
) -> None:
    """/dev/shm is sticky: only the creator's user can remove the name."""
    assert (
        program.run("""
            pool = BlockPool.create(NAME, CONFIG)
            child = os.fork()
            if child == 0:
                os.setuid(65534)
                pool.alloc(3)
                pool.close()
                sys.exit()
            print(os.waitpid(child, 0)[1], people(pool), pool.available_blocks())
        """)
        == "0 1 here, 0 dead 16\n"
    )


def test_a_server_may_restart_its_workers_far_more_often_than_there_are_slots(
    program: Program,
) -> None:
    assert (
        program.run("""
            import signal

            config = PoolConfig(total_tokens=64, block_size=4, max_participants=3, max_leases=4)
            pool = BlockPool.create(NAME, config)
            for number in range(12):
                worker = os.fork()
                if worker == 0:
                    pool.alloc(5)
                    signal.pause() if number % 2 else sys.exit()
                if number % 2:
                    while pool.stats().participants + pool.stats().dead_participants < 2:
                        pass
                    os.kill(worker, signal.SIGKILL)
                os.waitpid(worker, 0)
            pool.reap()
            print(people(pool), pool.available_blocks())
        """)
        == "1 here, 0 dead 16\n"
    )


def test_a_worker_says_nothing_of_the_leases_of_its_parent_and_does_not_end_them(
    program: Program,
) -> None:
    """CASES I: a forked child warned that its parent's lease was not released."""
    assert (
        program.run("""
            pool = BlockPool.create(NAME, CONFIG)
            handle = pool.alloc(5)
            fill(pool.view(handle), 7)
            lease = pool.open(pool.publish(handle))
            worker = os.fork()
            if worker == 0:
                del lease
                pool.free(pool.alloc(1))
                sys.exit()
            os.waitpid(worker, 0)
            print(pool.stats().leases, read(lease))
            lease.release()
            print(pool.stats().leases, pool.available_blocks())
        """)
        == "1 7\n0 16\n"
    )


@pytest.mark.skipif(sys.version_info < (3, 12), reason="only Python 3.12 and later warn of it")
def test_forking_right_after_the_pool_was_created_gives_no_warning(program: Program) -> None:
    """CASES H: the thread that prefaults still ran."""
    program.run("""
        pool = BlockPool.create(NAME, CONFIG)
        worker = os.fork()
        if worker == 0:
            os._exit(0)
        os.waitpid(worker, 0)
    """)
