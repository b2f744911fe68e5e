"""Pools of processes: concurrent.futures, multiprocessing.Pool, Manager, and a worker as an actor.

The pool (of blocks) is an argument of the tasks, so that it is unpickled again and again.
"""

from __future__ import annotations

import pytest

from tests.users.kit import Program

TASKS = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

def work(pool, queue, number):
    send(pool, queue, number % 200)
    return os.getpid()

def main(method):
    pool = BlockPool.create(NAME, CONFIG)
    queue = HandleQueue.create(QUEUE, 16, message_type=BlockHandle)
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        got, workers = [], set()
        for start in range(0, 300, 10):
            futures = [executor.submit(work, pool, queue, start + n) for n in range(10)]
            got += sorted(receive(pool, queue) for _ in futures)
            workers |= {future.result() for future in futures}
        print(len(got), pool.stats().participants <= len(workers) + 1)
    print(people(pool), pool.available_blocks())
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_three_hundred_tasks_that_get_the_pool_as_an_argument_make_one_participant_per_worker(
    program: Program, method: str
) -> None:
    """CASES F: one slot for each unpickling, until BrokenProcessPool."""
    output = program.run(f"{TASKS}\nif __name__ == '__main__':\n    main({method!r})\n")
    assert output == "300 True\n1 here, 0 dead 16\n"


def test_a_process_has_one_participant_however_often_it_unpickles_the_pool(
    program: Program,
) -> None:
    """CASES F."""
    assert (
        program.run("""
            import gc, pickle
            gc.disable()
            pool = BlockPool.create(NAME, CONFIG)
            queue = HandleQueue.create(QUEUE, 4)
            copies = [pickle.loads(pickle.dumps(pool)) for _ in range(200)]
            queues = [pickle.loads(pickle.dumps(queue)) for _ in range(200)]
            print(people(pool), {each.participant == pool.participant for each in copies})
            queues[7].put(b"through a copy")
            print(queue.get(), {each.qsize() for each in queues})
            handle = copies[3].alloc(5)
            del copies, queues
            print(people(pool), pool.stats().reserved_blocks)
            pool.free(handle)
        """)
        == "1 here, 0 dead {True}\nb'through a copy' {0}\n1 here, 0 dead 2\n"
    )


def test_the_last_reference_that_goes_leaves_at_once_without_the_cyclic_collector(
    program: Program,
) -> None:
    """CASES F: a cycle kept the pool until the collector came."""
    assert (
        program.run("""
            import gc
            gc.disable()
            pool = BlockPool.create(NAME, CONFIG)
            queue = HandleQueue.create(QUEUE, 4)
            pool.alloc(5)
            del pool, queue
            print([name for name in os.listdir("/dev/shm") if NAME in name])
        """)
        == "[]\n"
    )


def test_a_multiprocessing_pool_that_is_terminated_leaves_nothing(program: Program) -> None:
    """`Pool.__exit__` ends its workers by SIGTERM, at any line."""
    assert (
        program.run("""
            import multiprocessing

            def begin(pool, queue):
                global POOL, THEIRS
                POOL, THEIRS = pool, queue

            def work(number):
                send(POOL, THEIRS, number)

            pool = BlockPool.create(NAME, CONFIG)
            queue = HandleQueue.create(QUEUE, 16, message_type=BlockHandle)
            with multiprocessing.get_context("fork").Pool(3, begin, (pool, queue)) as workers:
                done = workers.map_async(work, range(12))
                print(sorted(receive(pool, queue) for _ in range(12)))
                done.get()
            pool.reap()
            print(people(pool), pool.available_blocks())
        """)
        == "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]\n1 here, 0 dead 16\n"
    )


def test_a_pool_in_a_manager_is_one_participant_in_each_process_that_looks_at_it(
    program: Program,
) -> None:
    """CASES F: each look at the Manager's dict took a slot."""
    assert (
        program.run("""
            import multiprocessing

            if __name__ == "__main__":
                pool = BlockPool.create(NAME, CONFIG)
                queue = HandleQueue.create(QUEUE, 16, message_type=BlockHandle)
                with multiprocessing.get_context("spawn").Manager() as manager:
                    shared = manager.dict(pool=pool, queue=queue)
                    for number in range(150):
                        send(shared["pool"], shared["queue"], number)
                        receive(pool, queue)
                    print(people(pool))
                print(people(pool), pool.available_blocks())
        """)
        == "2 here, 0 dead\n1 here, 0 dead 16\n"
    )


ACTOR = """
import multiprocessing

class Embedder:
    def __init__(self, pool, queue):
        self.pool, self.queue, self.calls = pool, queue, 0

    def embed(self, pool, number):
        self.calls += 1
        send(pool, self.queue, number)
        return self.calls

def live(actor_class, arguments, connection):
    actor = actor_class(*arguments)
    while (call := connection.recv()) is not None:
        name, parameters = call
        connection.send(getattr(actor, name)(*parameters))

class Actor:
    def __init__(self, actor_class, *arguments):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=live, args=(actor_class, arguments, theirs))
        self.process.start()

    def call(self, name, *parameters):
        self.connection.send((name, parameters))
        return self.connection.recv()

    def kill(self):
        self.process.kill()
        self.process.join()
"""


def test_an_actor_that_is_killed_is_replaced_and_the_pool_goes_on(program: Program) -> None:
    """As Ray does: arguments by value into a long-lived worker, `ray.kill`, a new one."""
    output = program.run(
        ACTOR
        + """
if __name__ == "__main__":
    pool = BlockPool.create(NAME, CONFIG)
    queue = HandleQueue.create(QUEUE, 16, message_type=BlockHandle)
    for life in range(2):
        actor = Actor(Embedder, pool, queue)
        for number in range(100):
            calls = actor.call("embed", pool, number)
            if receive(pool, queue) != number:
                print("wrong content")
        print(calls, people(pool))
        actor.kill()
        pool.reap()
    print(people(pool), pool.available_blocks())
"""
    )
    assert output == "100 2 here, 0 dead\n100 2 here, 0 dead\n1 here, 0 dead 16\n"
