"""A notebook: cells that run again, an interrupted cell, a kernel that is killed and started anew.

The cells are run in one namespace, as a kernel does, which also keeps the last result and error.
"""

from __future__ import annotations

import signal

from tests.users.kit import Program, rest_of

KERNEL = """
import code, traceback

class Kernel:
    def __init__(self):
        self.names = dict(globals())

    def run(self, cell):
        try:
            exec(compile(cell, "<cell>", "exec"), self.names)
        except Exception as error:
            sys.last_value = error
            sys.last_traceback = error.__traceback__
            print(type(error).__name__)

kernel = Kernel()
"""


def test_a_cell_that_ensures_the_pool_can_run_again_and_again(program: Program) -> None:
    output = program.run(
        KERNEL
        + """
for _ in range(5):
    kernel.run("pool = BlockPool.ensure(NAME, CONFIG); handle = pool.alloc(5)")
kernel.run("print(people(pool))")
kernel.run("pool = BlockPool.ensure(NAME, PoolConfig(total_tokens=128, block_size=4))")
kernel.run("print(people(pool), pool.config.total_tokens)")
"""
    )
    assert output == "1 here, 0 dead\nIncompatibleConfigError\n1 here, 0 dead 64\n"


def test_a_cell_that_creates_again_is_told_who_has_the_name(program: Program) -> None:
    output = program.run(
        KERNEL
        + """
cell = "pool = BlockPool.create(NAME, CONFIG)"
kernel.run(cell)
kernel.run(cell)
kernel.run("print(f'stat {NAME}' in str(sys.last_value), people(pool))")
kernel.run("pool.close()")
kernel.run(cell)
kernel.run("print(people(pool))")
"""
    )
    assert output == "PoolExistsError\nTrue 1 here, 0 dead\n1 here, 0 dead\n"


def test_a_name_that_is_bound_anew_lets_the_old_pool_go_at_once(program: Program) -> None:
    output = program.run(
        KERNEL
        + """
kernel.run("pool = BlockPool.create(NAME, CONFIG)")
kernel.run("pool = None")
kernel.run("pool = BlockPool.create(NAME, CONFIG)")
kernel.run("print(people(pool))")
"""
    )
    assert output == "1 here, 0 dead\n"


def test_an_error_that_the_kernel_keeps_does_not_keep_blocks_of_a_reservation(
    program: Program,
) -> None:
    output = program.run(
        KERNEL
        + '''
kernel.run("pool = BlockPool.create(NAME, CONFIG)")
kernel.run("""
with pool.reserve(5) as reservation:
    raise ValueError("the model failed")
""")
kernel.run("print(pool.available_blocks())")
'''
    )
    assert output == "ValueError\n16\n"


def test_an_interrupted_cell_leaves_a_pool_and_a_queue_that_work(program: Program) -> None:
    with program.running("""
        import signal
        pool = BlockPool.create(NAME, CONFIG)
        queue = HandleQueue.create(QUEUE, 4, message_type=BlockHandle)
        everything = pool.alloc(64)
        for cell in (queue.get, lambda: pool.alloc(1, timeout=None)):
            try:
                print("waiting", flush=True)
                cell()
            except KeyboardInterrupt:
                print("interrupted", flush=True)
        pool.free(everything)
        send(pool, queue, 3)
        print(receive(pool, queue), pool.stats().waiters, pool.available_blocks())
    """) as process:
        assert process.stdout is not None
        for _ in range(2):
            assert process.stdout.readline() == "waiting\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted\n"
        output, errors = rest_of(process)
    assert (output, errors, process.returncode) == ("3 0 16\n", "", 0)


def test_a_kernel_that_was_killed_leaves_a_name_that_the_next_one_takes_over(
    program: Program,
) -> None:
    program.run(
        "pool = BlockPool.create(NAME, CONFIG); pool.alloc(5); os.kill(os.getpid(), 9)",
        returncode=-9,
        leaves=True,
    )
    assert (
        program.run("pool = BlockPool.ensure(NAME, CONFIG); print(pool.available_blocks())")
        == "16\n"
    )


def test_a_copy_of_what_owns_something_is_refused_with_what_to_do_instead(
    program: Program,
) -> None:
    """CASES C: a dropped copy of a lease ended the claim of the original."""
    assert (
        program.run("""
            import copy, pickle

            pool = BlockPool.create(NAME, CONFIG)
            handle = pool.alloc(5)
            fill(pool.view(handle), 5)
            lease = pool.open(pool.publish(handle, readers=2))
            reservation = pool.reserve(4)

            def outcome(act, thing):
                try:
                    act(thing)
                except TypeError as error:
                    return "refused" if len(str(error)) > 40 else f"refused without advice: {error}"
                return "copied"

            acts = (copy.copy, copy.deepcopy, pickle.dumps)
            for thing in (lease, reservation):
                print(type(thing).__name__, *(outcome(act, thing) for act in acts))
            print(pool.stats().leases, read(lease))
            lease.release()
            reservation.__exit__(None, None, None)
        """)
        == "Lease refused refused refused\n"
        "Reservation refused refused refused\n"
        "1 5\n"
    )
