"""A server on asyncio: hundreds of requests that wait, cancellations, and Ctrl-C."""

from __future__ import annotations

import signal

from tests.users.kit import Program, rest_of


def test_ctrl_c_ends_a_server_whose_tasks_wait_without_any_traceback(program: Program) -> None:
    """CASES G: the tasks got PoolClosedError instead of CancelledError, and asyncio showed it."""
    with program.running("""
        import asyncio

        async def serve():
            pool = BlockPool.create(NAME, CONFIG)
            queue = HandleQueue.create(QUEUE, 4)
            with pool, queue:
                everything = pool.alloc(64)
                tasks = [asyncio.create_task(queue.get_async()) for _ in range(3)]
                tasks += [asyncio.create_task(pool.alloc_async(5)) for _ in range(3)]
                await asyncio.sleep(0)
                print("serving", flush=True)
                await asyncio.gather(*tasks)

        try:
            asyncio.run(serve())
        except KeyboardInterrupt:
            print("bye")
    """) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "serving\n"
        process.send_signal(signal.SIGINT)
        output, errors = rest_of(process)
    assert (output, errors, process.returncode) == ("bye\n", "", 0)


def test_ctrl_c_ends_a_server_that_closes_before_its_tasks_are_cancelled_without_any_traceback(
    program: Program,
) -> None:
    """The usual order: the `with` of `main` is left first, then asyncio cancels what still runs."""
    with program.running("""
        import asyncio

        async def serve():
            with HandleQueue.create(QUEUE, 4) as queue, BlockPool.create(NAME, CONFIG) as pool:
                everything = pool.alloc(64)
                tasks = [asyncio.create_task(queue.get_async()) for _ in range(3)]
                tasks += [asyncio.create_task(pool.alloc_async(5)) for _ in range(3)]
                await asyncio.sleep(0)
                print("serving", flush=True)
                await asyncio.Event().wait()

        try:
            asyncio.run(serve())
        except KeyboardInterrupt:
            print("bye")
    """) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "serving\n"
        process.send_signal(signal.SIGINT)
        output, errors = rest_of(process)
    assert (output, errors, process.returncode) == ("bye\n", "", 0)


def test_a_cancelled_wait_ends_as_cancelled_whatever_is_closed_after_it(program: Program) -> None:
    """CASES G."""
    assert (
        program.run("""
            import asyncio

            async def main():
                pool = BlockPool.create(NAME, CONFIG)
                queue = HandleQueue.create(QUEUE, 1)
                queue.put(b"full")
                pool.alloc(64)
                empty = HandleQueue.create(QUEUE + "-empty", 1)
                waits = [empty.get_async(), queue.put_async(b"more"), pool.alloc_async(1)]
                tasks = [asyncio.create_task(wait) for wait in waits]
                await asyncio.sleep(0.05)
                for task in tasks:
                    task.cancel()
                for each in (pool, queue, empty):
                    each.close()
                for end in await asyncio.gather(*tasks, return_exceptions=True):
                    print(type(end).__name__)

            asyncio.run(main())
        """)
        == "CancelledError\n" * 3
    )


def test_a_queue_that_is_closed_under_a_waiting_task_tells_it_so(program: Program) -> None:
    assert (
        program.run("""
            import asyncio

            async def main():
                queue = HandleQueue.create(QUEUE, 1)
                task = asyncio.create_task(queue.get_async())
                await asyncio.sleep(0.05)
                queue.close()
                (end,) = await asyncio.gather(task, return_exceptions=True)
                print(type(end).__name__)

            asyncio.run(main())
        """)
        == "PoolClosedError\n"
    )


def test_four_hundred_coroutines_that_wait_for_blocks_are_all_served(program: Program) -> None:
    """CASES G: 136 of them failed, since 256 waited already."""
    assert (
        program.run("""
            import asyncio

            async def request(pool):
                handle = await pool.alloc_async(8, timeout=50)
                await asyncio.sleep(0)
                pool.free(handle)
                return "served"

            async def main():
                with BlockPool.create(NAME, CONFIG) as pool:
                    ends = await asyncio.gather(
                        *(request(pool) for _ in range(400)), return_exceptions=True
                    )
                    print({repr(end): ends.count(end) for end in ends}, pool.available_blocks())

            asyncio.run(main())
        """)
        == "{\"'served'\": 400} 16\n"
    )


def test_coroutines_are_served_in_the_order_in_which_they_asked(program: Program) -> None:
    assert (
        program.run("""
            import asyncio

            async def main():
                with BlockPool.create(NAME, CONFIG) as pool:
                    first, order = pool.alloc(64), []

                    async def request(number):
                        handle = await pool.alloc_async(40, timeout=20)
                        order.append(number)
                        pool.free(handle)

                    tasks = [asyncio.create_task(request(number)) for number in range(8)]
                    await asyncio.sleep(0.05)
                    pool.free(first)
                    await asyncio.gather(*tasks)
                    print(order)

            asyncio.run(main())
        """)
        == "[0, 1, 2, 3, 4, 5, 6, 7]\n"
    )


def test_a_wait_that_was_cancelled_keeps_no_blocks_and_no_place_in_the_wait_queue(
    program: Program,
) -> None:
    """Cancelled before, in, and after the moment in which it was its turn."""
    assert (
        program.run("""
            import asyncio

            async def cancel_after(pool, turns_before, turns_after):
                everything = pool.alloc(64)
                task = asyncio.create_task(pool.alloc_async(5))
                for _ in range(turns_before):
                    await asyncio.sleep(0)
                pool.free(everything)
                for _ in range(turns_after):
                    await asyncio.sleep(0)
                if task.cancel():
                    await asyncio.gather(task, return_exceptions=True)
                if not task.cancelled():
                    pool.free(task.result())

            async def main():
                with BlockPool.create(NAME, CONFIG) as pool:
                    for before in range(4):
                        for after in range(8):
                            await cancel_after(pool, before, after)
                    print(pool.stats().waiters, pool.stats().allocations)

            asyncio.run(main())
        """)
        == "0 0\n"
    )


def test_one_pool_serves_one_event_loop_after_another_and_loops_in_threads(
    program: Program,
) -> None:
    assert (
        program.run("""
            import asyncio, threading

            pool = BlockPool.create(NAME, CONFIG)
            queue = HandleQueue.create(QUEUE, 4, message_type=BlockHandle)

            async def produce(byte):
                handle = await pool.alloc_async(5, timeout=20)
                fill(pool.view(handle), byte)
                await queue.put_async(pool.publish(handle))

            async def consume():
                with pool.open(await queue.get_async()) as lease:
                    return read(lease)

            for byte in (1, 2):
                asyncio.run(produce(byte))
                print(asyncio.run(consume()))
            thread = threading.Thread(target=lambda: asyncio.run(produce(3)))
            thread.start()
            print(asyncio.run(consume()))
            thread.join()
        """)
        == "1\n2\n3\n"
    )


def test_waits_in_asyncio_have_timeouts_of_their_own(program: Program) -> None:
    assert (
        program.run("""
            import asyncio, queue as standard

            async def main():
                with HandleQueue.create(QUEUE, 1) as queue:
                    try:
                        await queue.get_async(timeout=0.01)
                    except standard.Empty:
                        print("empty")
                    await queue.put_async(b"1", timeout=0.01)
                    try:
                        await queue.put_async(b"2", timeout=0.01)
                    except standard.Full:
                        print("full")
                    print(await queue.get_many_async(4, timeout=0.01))

            asyncio.run(main())
        """)
        == "empty\nfull\n[b'1']\n"
    )


def test_a_reservation_is_freed_when_its_task_fails_in_it(program: Program) -> None:
    assert (
        program.run("""
            import asyncio

            async def main():
                with BlockPool.create(NAME, CONFIG) as pool:
                    try:
                        async with await pool.reserve_async(5) as reservation:
                            raise ValueError("the model failed")
                    except ValueError as error:
                        print(error, pool.available_blocks())
                    async with await pool.reserve_async(5) as reservation:
                        fill(reservation, 9)
                        handle = reservation.publish()
                    with await pool.open_async(handle) as lease:
                        print(read(lease))
                    print(pool.available_blocks())

            asyncio.run(main())
        """)
        == "the model failed 16\n9\n16\n"
    )
