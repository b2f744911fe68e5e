"""A torch DataLoader whose workers put samples into the pool and hand back handles."""

from __future__ import annotations

import pytest

from tests.users.kit import Program

# The dataset goes to the workers with the pool in it: inherited (fork) or pickled (spawn).
LOADER = """
import torch
from torch.utils.data import DataLoader, Dataset

class Samples(Dataset):
    def __init__(self, pool):
        self.pool = pool

    def __len__(self):
        return 12

    def __getitem__(self, index):
        handle = self.pool.alloc(5, timeout=20)
        self.pool.view(handle)["x"].fill_(index)
        return self.pool.publish(handle)

def main(method, workers, persistent):
    with BlockPool.create(NAME, CONFIG) as pool:
        loader = DataLoader(
            Samples(pool),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=method,
            persistent_workers=persistent,
        )
        for epoch in range(2):
            got = []
            for handle in loader:
                with pool.open(handle) as lease:
                    got.append(int(lease["x"].float().mean()))
            print(got == list(range(12)))
        del loader
        print(pool.available_blocks(), pool.stats().allocations)
"""


@pytest.mark.parametrize(
    ("method", "workers", "persistent"), [("fork", 2, False), ("fork", 2, True), ("spawn", 1, True)]
)
def test_the_samples_of_a_loader_arrive_whole_and_its_workers_keep_nothing(
    program: Program, method: str, workers: int, persistent: bool
) -> None:
    call = f"main({method!r}, {workers}, {persistent})"
    output = program.run(f"{LOADER}\nif __name__ == '__main__':\n    {call}\n")
    assert output == "True\nTrue\n16 0\n"


def test_a_worker_that_fails_in_the_middle_of_a_sample_gives_its_blocks_back(
    program: Program,
) -> None:
    assert (
        program.run("""
            import gc
            from torch.utils.data import DataLoader, Dataset

            class Broken(Dataset):
                def __init__(self, pool):
                    self.pool = pool

                def __len__(self):
                    return 4

                def __getitem__(self, index):
                    handle = self.pool.alloc(5, timeout=20)
                    raise ValueError("no such image")

            pool = BlockPool.create(NAME, CONFIG)
            try:
                list(DataLoader(Broken(pool), batch_size=None, num_workers=1))
            except ValueError as error:
                print("no such image" in str(error))
            # torch keeps the workers of a failed loader in a cycle, and terminates them in the end.
            gc.collect()
            pool.reap()
            print(pool.available_blocks(), people(pool))
        """)
        == "True\n16 1 here, 0 dead\n"
    )
