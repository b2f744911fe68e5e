"""A gevent worker: everything patched, greenlets instead of threads.

CASES J: a wait of this library is a wait in the kernel and stops the hub. What never waits may be
called in a greenlet; what waits belongs into the hub's pool of real threads.
"""

from __future__ import annotations

import importlib.util

import pytest

from tests.users.kit import Program

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gevent") is None, reason="gevent is not installed"
)


def test_calls_that_do_not_wait_work_in_greenlets_under_monkey_patching(program: Program) -> None:
    assert (
        program.run("""
            from gevent import monkey
            monkey.patch_all()
            import gevent

            pool = BlockPool.create(NAME, CONFIG)
            queue = HandleQueue.create(QUEUE, 16, message_type=BlockHandle)

            def produce(number):
                handle = pool.alloc(5)
                fill(pool.view(handle), number)
                gevent.sleep(0)
                queue.put_nowait(pool.publish(handle))

            def consume():
                while queue.empty():
                    gevent.sleep(0.001)
                with pool.open(queue.get_nowait()) as lease:
                    gevent.sleep(0)
                    return read(lease)

            readers = [gevent.spawn(consume) for _ in range(5)]
            writers = [gevent.spawn(produce, number) for number in range(5)]
            gevent.joinall(readers + writers, raise_error=True)
            print(sorted(reader.value for reader in readers), pool.available_blocks())
        """)
        == "[0, 1, 2, 3, 4] 16\n"
    )


def test_a_wait_in_a_real_thread_of_the_hub_does_not_stop_the_greenlets(program: Program) -> None:
    assert (
        program.run("""
            from gevent import monkey
            monkey.patch_all()
            import gevent

            pool = BlockPool.create(NAME, CONFIG)
            queue = HandleQueue.create(QUEUE, 16, message_type=BlockHandle)
            waiting = gevent.get_hub().threadpool.spawn(queue.get, timeout=20)
            handle = pool.alloc(5)
            gevent.sleep(0.05)
            queue.put(pool.publish(handle))
            with pool.open(waiting.get()) as lease:
                print(lease.handle == handle)
        """)
        == "True\n"
    )


def test_a_forked_gevent_worker_is_a_participant_of_its_own(program: Program) -> None:
    assert (
        program.run("""
            from gevent import monkey
            monkey.patch_all()
            import gevent

            pool = BlockPool.create(NAME, CONFIG)
            queue = HandleQueue.create(QUEUE, 16, message_type=BlockHandle)
            worker = gevent.fork()
            if worker == 0:
                gevent.spawn(send, pool, queue, 4).get()
                sys.exit()
            os.waitpid(worker, 0)
            print(receive(pool, queue), people(pool))
        """)
        == "4 1 here, 0 dead\n"
    )
