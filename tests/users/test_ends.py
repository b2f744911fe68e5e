"""How programs end: daemons that outlive `main`, threads, signals, errors while leaving."""

from __future__ import annotations

import signal

import pytest

from tests.users.kit import Program, rest_of

DAEMON = """
import multiprocessing, time

def live(pool, queue, started):
    pool.available_blocks(), queue.put(b"here")
    started.set()
    time.sleep(600)

def main(method, way):
    context = multiprocessing.get_context(method)
    pool = BlockPool.create(NAME, CONFIG)
    queue = HandleQueue.create(QUEUE, 4)
    started = context.Event()
    context.Process(target=live, args=(pool, queue, started), daemon=True).start()
    started.wait()
    if way == "closed":
        queue.close()
        pool.close()
"""


@pytest.mark.parametrize("first", ["torch", "multiprocessing.util", "shmblocks"])
@pytest.mark.parametrize("way", ["open", "closed"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_program_that_ends_while_its_daemon_uses_the_pool_leaves_nothing(
    program: Program, method: str, way: str, first: str
) -> None:
    """CASES E: ours ran before multiprocessing ended its daemons."""
    if first == "torch" and method == "spawn":
        pytest.skip("the same as multiprocessing.util, two seconds later")
    output = program.run(
        f"import {first}\n{DAEMON}\nif __name__ == '__main__':\n    main({method!r}, {way!r})\n"
    )
    assert output == ""


@pytest.mark.parametrize("last", ["child", "parent"])
def test_a_forkserver_child_that_got_the_pool_as_an_argument_leaves_nothing(
    program: Program, last: str
) -> None:
    """CASES E: Python 3.11 and 3.12 forget the finalizers of what was unpickled before."""
    assert program.run(f"""
            import multiprocessing

            def work(pool, queue, gone):
                pool.alloc(5)
                queue.put(b"here")
                gone.wait(20) if {last!r} == "child" else None

            if __name__ == "__main__":
                context = multiprocessing.get_context("forkserver")
                pool = BlockPool.create(NAME, CONFIG)
                queue = HandleQueue.create(QUEUE, 4)
                gone = context.Event()
                child = context.Process(target=work, args=(pool, queue, gone))
                child.start()
                print(queue.get(timeout=20))
                if {last!r} == "child":
                    pool.close(), queue.close()
                    gone.set()
                child.join()
                if {last!r} == "parent":
                    print(people(pool), pool.available_blocks())
        """) == "b'here'\n" + ("1 here, 0 dead 16\n" if last == "parent" else "")


def test_closing_without_a_free_descriptor_leaves_completely(program: Program) -> None:
    """CASES D: it raised when its slot was cleared already, and others reaped a living process."""
    assert (
        program.run("""
            import resource

            pool = BlockPool.create(NAME, CONFIG)
            queue = HandleQueue.create(QUEUE, 4)
            asleep, awake = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(awake)
                pool.alloc(5)
                queue.put(b"attached")
                os.read(asleep, 1)
                print(people(pool), queue.get_nowait(), flush=True)
                sys.exit()
            queue.get(timeout=20)
            queue.put(b"still there")
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (awake + 1, limits[1]))
            while True:
                try:
                    os.dup(0)
                except OSError:
                    break
            pool.close()
            queue.close()
            print(pool.is_closed, queue.is_closed, flush=True)
            os.write(awake, b"1")
            os.waitpid(child, 0)
        """)
        == "True True\n1 here, 0 dead b'still there'\n"
    )


@pytest.mark.parametrize("way", ["return", "sys.exit(0)", "1 / 0"])
def test_a_program_that_ends_with_everything_open_leaves_nothing(
    program: Program, way: str
) -> None:
    fails = way == "1 / 0"
    program.run(
        f"""
        import threading

        def main():
            pool = BlockPool.create(NAME, CONFIG)
            queue = HandleQueue.create(QUEUE, 4)
            pool.view(pool.alloc(3)), pool.open(pool.publish(pool.alloc(5), readers=2))
            threading.Thread(target=queue.get, daemon=True).start()
            {way}

        main()
        """,
        returncode=1 if fails else 0,
        errors=True,
    )


def test_a_lease_that_is_dropped_by_a_process_that_then_sleeps_is_released_at_once(
    program: Program,
) -> None:
    """CASES G: it was released at the next call, which did not come."""
    assert (
        program.run("""
            import warnings
            warnings.simplefilter("ignore")
            pool = BlockPool.create(NAME, CONFIG)
            asleep, started = HandleQueue.create(QUEUE, 4), HandleQueue.create(QUEUE + "-2", 4)
            handle = pool.publish(pool.alloc(64))
            child = os.fork()
            if child == 0:
                lease = pool.open(handle)
                del lease
                started.put(b"dropped")
                asleep.get(timeout=30)
                os._exit(0)
            started.get(timeout=20)
            print(pool.alloc(64, timeout=10).num_blocks)
            asleep.put(b"end")
            os.waitpid(child, 0)
        """)
        == "16\n"
    )


def test_a_program_that_is_terminated_leaves_a_name_that_reap_and_create_take_away(
    program: Program,
) -> None:
    """SIGTERM without a handler runs nothing of ours: a leftover, told as dead, replaced."""
    with program.running("""
        import time
        print("ready", flush=True)
        sys.stdin.read()
    """) as process:
        process.communicate("", timeout=30)
    program.run(
        "pool = BlockPool.create(NAME, CONFIG); os.kill(os.getpid(), 15)",
        returncode=-signal.SIGTERM,
        leaves=True,
    )
    assert (
        program.run("""
            print([pool.state for pool in shmblocks.list_pools() if NAME in pool.name])
            shmblocks.remove_pool(NAME)
            print([pool.state for pool in shmblocks.list_pools() if NAME in pool.name])
        """)
        == "['dead']\n[]\n"
    )


def test_a_handler_of_sigterm_that_exits_leaves_nothing(program: Program) -> None:
    with program.running("""
        import signal
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        pool = BlockPool.create(NAME, CONFIG)
        queue = HandleQueue.create(QUEUE, 4)
        print("waiting", flush=True)
        queue.get()
    """) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.terminate()
        output, errors = rest_of(process)
    assert (output, errors, process.returncode) == ("", "", 0)


def test_a_timer_signal_every_millisecond_disturbs_no_call(program: Program) -> None:
    """CASES H: a signal during the creation of a large pool, and during every wait."""
    assert (
        program.run("""
            import signal
            beats = []
            signal.signal(signal.SIGALRM, lambda *_: beats.append(1))
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
            config = PoolConfig(total_tokens=1 << 16, fields=(Field("x", (256,), "int32"),))
            with BlockPool.create(NAME + "-large", config) as large:
                large.free(large.alloc(1 << 16))
            pool = BlockPool.create(NAME, CONFIG)
            queue = HandleQueue.create(QUEUE, 4, message_type=BlockHandle)
            child = os.fork()
            if child == 0:
                for number in range(100):
                    send(pool, queue, number)
                sys.exit()
            print([receive(pool, queue) for _ in range(100)] == list(range(100)))
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.waitpid(child, 0)
            print(len(beats) > 2)
        """)
        == "True\nTrue\n"
    )
