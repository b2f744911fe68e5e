"""Writes a random program and, with each line, keeps the model of what it must do.

The model is small because every process works on allocations of its own: who has a reservation, a
claim (the right to open what was published once) or a lease is decided here, when the program is
written. So what a program does is known, however its processes run beside each other: every content
(each allocation has a number, which fills it), every error, every exit code, and what is live at
the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

MOST_PROCESSES = 5
MOST_TOKENS = 16
# How a process ends that is not the root. `killed` and `terminated` are done to it, while it waits.
WAYS_OUT = {
    "return": 0,
    "sys.exit(0)": 0,
    "raise PlannedError": 3,
    "os._exit(0)": 0,
    "os.kill(os.getpid(), signal.SIGKILL)": -9,
    "os.kill(os.getpid(), signal.SIGTERM)": -15,
    "killed": -9,
    "terminated": -15,
}
IN_ORDER = ("return", "sys.exit(0)", "raise PlannedError")
RESERVED_WAYS = ("publishes", "publishes", "fails", "forgets")
MISUSES = ("share", "out", "grad", "resize", "copies", "set", "inference")


@dataclass
class Process:
    """What the model knows of one process (or thread) while its function is written."""

    number: int
    method: str
    depth: int
    # Variables, and the number of the allocation that they are of.
    reservations: dict[str, int] = field(default_factory=dict)
    claims: dict[str, tuple[int, int]] = field(default_factory=dict)
    leases: dict[str, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    # Those that run, with what each has put into its queue and how it ends.
    children: list[Child] = field(default_factory=list)
    # Used up: opening them once more is an error.
    spent: list[str] = field(default_factory=list)
    drops: int = 0

    @property
    def is_thread(self) -> bool:
        return self.method == "thread"

    @property
    def is_root(self) -> bool:
        return self.number == 0


@dataclass
class Child:
    """A process as its parent sees it."""

    process: Process
    way_out: str
    # Allocations whose claims are in its queue, oldest first.
    sent: list[int] = field(default_factory=list)


class Writer:
    """One program; `text` is it."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.torch = self.random.random() < 0.15
        self.allocations = 0
        self.processes = 0
        self.names = 0
        # Claims of each allocation that nobody has opened yet.
        self.unread: dict[int, int] = {}
        self.functions: list[str] = []
        self.had_tasks = False
        self.root = Process(self._next_process(), "root", 0)
        self._write_body(self.root, steps=self.random.randint(8, 24))
        self._join_all(self.root)
        self._quiet(self.root)
        if self.random.random() < 0.2 and not self.torch:
            self._leave_a_daemon(self.root)
        for name in self.root.leases:
            self._line(self.root, f"kept.append({name})")
        self._line(self.root, f"end({self.root.drops})")
        self._finish(self.root, [])

    @property
    def text(self) -> str:
        imports = ["from __future__ import annotations", "", "import os", "import signal"]
        imports += ["import sys", ""]
        # First of all: a child that is forked while a thread imports torch waits for it for ever.
        imports += ["import torch", ""] if self.torch else []
        imports += ["from tests.users.generator.verbs import *", ""]
        body = "\n\n\n".join(self.functions)
        start = f'if __name__ == "__main__":\n    run(p0, queues={self.processes})\n'
        return "\n".join(imports) + f"\n\n{body}\n\n\n{start}"

    # ---- writing -----------------------------------------------------------------------------

    def _line(self, process: Process, text: str) -> None:
        process.lines.append(text)

    def _name(self, kind: str) -> str:
        self.names += 1
        return f"{kind}{self.names}"

    def _next_process(self) -> int:
        self.processes += 1
        return self.processes - 1

    def _finish(self, process: Process, parameters: list[str]) -> None:
        arguments = ", ".join(["pool", "queues", *parameters])
        if process.is_root:
            arguments = "pool, *queues"
        indent = "    "
        lines = process.lines or ["pass"]
        if not process.is_thread and self.random.random() < 0.25:
            lines = ["with beats():", *(indent + line for line in lines)]
        body = "\n".join(indent + line for line in lines)
        self.functions.append(f"def p{process.number}({arguments}):\n{body}")

    def _write_body(self, process: Process, steps: int) -> None:
        for _ in range(steps):
            possible = [(step, weight) for step, weight, can in self._steps(process) if can]
            chosen, weights = zip(*possible, strict=True)
            self.random.choices(chosen, weights)[0](process)

    def _steps(self, p: Process) -> list[tuple[Callable[[Process], None], float, bool]]:
        alone = p.is_root and not p.children
        outside = not p.is_thread
        can_start = outside and p.depth < 2 and p.method != "daemon"
        can_start = can_start and self.processes < MOST_PROCESSES
        return [
            (self._alloc, 8, True),
            (self._grow, 2, bool(p.reservations)),
            (self._free, 2, bool(p.reservations)),
            (self._publish, 7, bool(p.reservations)),
            (self._misuse, 8, bool(p.reservations) and self.torch),
            (self._reserved, 3, True),
            (self._put, 4, self.torch),
            (self._read, 5, bool(p.claims)),
            (self._given_back, 1, bool(p.claims)),
            (self._forgo, 1, bool(p.claims)),
            (self._open, 5, bool(p.claims)),
            (self._release, 3, bool(p.leases)),
            (self._drop, 2, bool(p.leases)),
            (self._is_not_copied, 1, bool(p.leases)),
            (self._cannot_open, 1, bool(p.spent)),
            (self._pickled_handle, 1, bool(p.claims)),
            (self._plain("pickled(pool)"), 1, True),
            (self._plain("refused(pool)"), 1, True),
            (self._close_and_attach, 1, outside and not p.is_root and not p.children),
            (self._wait_for_room, 1, outside),
            (self._interrupted, 1, outside),
            (self._start, 6, can_start),
            (self._fetch, 4, any(child.sent for child in p.children)),
            (self._join, 2, bool(p.children)),
            (self._tasks, 0.5, alone and not self.had_tasks and not self.torch),
            (self._quiet, 1, alone),
        ]

    def _plain(self, text: str) -> Callable[[Process], None]:
        return lambda process: self._line(process, text)

    # ---- one allocation ----------------------------------------------------------------------

    def _alloc(self, p: Process) -> None:
        self.allocations += 1
        name, number = self._name("r"), self.allocations
        tokens = self.random.randint(1, MOST_TOKENS)
        by_torch = ", by_torch=True" if self.torch and self.random.random() < 0.5 else ""
        self._line(p, f"{name} = alloc(pool, {tokens}, {number}{by_torch})")
        p.reservations[name] = number

    def _grow(self, p: Process) -> None:
        name = self._pick(p.reservations)
        more = self.random.randint(0, MOST_TOKENS)
        self._line(p, f"{name} = grow(pool, {name}, {more}, {p.reservations[name]})")

    def _free(self, p: Process) -> None:
        name = self._pick(p.reservations)
        del p.reservations[name]
        self._line(p, f"free(pool, {name})")

    def _publish(self, p: Process) -> None:
        name, readers = self._pick(p.reservations), self.random.choice((1, 1, 1, 2, 3))
        number, claim = p.reservations.pop(name), self._name("c")
        self._line(p, f"{claim} = publish(pool, {name}, {readers})")
        self._is_published(p, claim, number, readers)

    def _misuse(self, p: Process) -> None:
        name = self._pick(p.reservations)
        how = self.random.choice(MISUSES)
        self._line(p, f"misuse(pool, {name}, {p.reservations[name]}, {how!r})")

    def _read(self, p: Process) -> None:
        name, number = self._use_claim(p)
        verbs = ("read", "read_by_torch", "taken") if self.torch else ("read",)
        verb = self.random.choice(verbs)
        self._line(p, f"{verb}(pool, {name}, {number})")

    def _reserved(self, p: Process) -> None:
        self.allocations += 1
        tokens, way = self.random.randint(1, MOST_TOKENS), self.random.choice(RESERVED_WAYS)
        name = self._name("c")
        self._line(p, f"{name} = reserved(pool, {tokens}, {self.allocations}, {way!r})")
        if way == "publishes":
            self._is_published(p, name, self.allocations, 1)
        else:
            p.spent.append(name)

    def _put(self, p: Process) -> None:
        self.allocations += 1
        name, tokens = self._name("c"), self.random.randint(1, MOST_TOKENS)
        self._line(p, f"{name} = put(pool, {tokens}, {self.allocations})")
        self._is_published(p, name, self.allocations, 1)

    def _is_published(self, p: Process, claim: str, number: int, readers: int) -> None:
        p.claims[claim] = (number, readers)
        self.unread[number] = readers

    def _given_back(self, p: Process) -> None:
        name = self._pick(p.claims)
        self._line(p, f"given_back(pool, {name}, {p.claims[name][0]})")

    def _forgo(self, p: Process) -> None:
        name, _ = self._use_claim(p)
        self._line(p, f"pool.forgo({name})")

    def _open(self, p: Process) -> None:
        name, number = self._use_claim(p)
        lease = self._name("l")
        self._line(p, f"{lease} = opened(pool, {name}, {number})")
        p.leases[lease] = number

    def _use_claim(self, p: Process) -> tuple[str, int]:
        name = self._pick(p.claims)
        number, count = p.claims.pop(name)
        if count > 1:
            p.claims[name] = (number, count - 1)
        self.unread[number] -= 1
        if not self.unread[number]:
            p.spent.append(name)
        return name, number

    def _release(self, p: Process) -> None:
        lease = self._pick(p.leases)
        self._line(p, f"release({lease}, {p.leases.pop(lease)})")

    def _drop(self, p: Process) -> None:
        lease = self._pick(p.leases)
        del p.leases[lease]
        p.drops += 1
        self._line(p, f"del {lease}")

    def _is_not_copied(self, p: Process) -> None:
        lease = self._pick(p.leases)
        self._line(p, f"is_not_copied({lease}, {p.leases[lease]})")

    def _cannot_open(self, p: Process) -> None:
        self._line(p, f"cannot_open(pool, {self.random.choice(p.spent)})")

    def _pickled_handle(self, p: Process) -> None:
        self._line(p, f"pickled_handle({self._pick(p.claims)})")

    # ---- the pool as a whole -----------------------------------------------------------------

    def _close_and_attach(self, p: Process) -> None:
        for lease in p.leases:
            self._line(p, f"kept.append({lease})")
        self._line(p, "pool = close_and_attach(pool)")
        p.reservations.clear()
        p.leases.clear()

    def _wait_for_room(self, p: Process) -> None:
        by = self.random.choice(("thread", "asyncio"))
        self._line(p, f"wait_for_room({self._name('room')!r}, {by!r})")

    def _interrupted(self, p: Process) -> None:
        seconds = round(self.random.uniform(0, 0.01), 4)
        kind = self.random.choice(("get", "alloc", "line"))
        if kind == "alloc" and not self._alone(p):
            kind = "get"
        if kind == "line" and (p.is_root or any(c.process.is_thread for c in p.children)):
            kind = "get"
        if kind == "line":
            self._line(p, f"interrupted_at_any_line(pool, {seconds})")
        elif kind == "get":
            self._line(p, f"interrupted(queues[-1].get, {seconds})")
        else:
            # Alone, and something is reserved or unread: all 256 blocks are not to be had.
            self._alloc(p)
            self._line(p, f"interrupted(lambda: pool.alloc(1024, timeout=None), {seconds})")

    def _alone(self, p: Process) -> bool:
        return p.is_root and not p.children

    def _quiet(self, p: Process) -> None:
        live = {number for number, count in self.unread.items() if count}
        live |= set(p.reservations.values()) | set(p.leases.values())
        self._line(p, f"quiet(pool, {len(live)})")

    def _tasks(self, p: Process) -> None:
        self.had_tasks = True
        self.allocations += 1
        method = self.random.choice(("fork", "spawn"))
        self._line(p, f"tasks(pool, queues[0], {self.allocations}, {method!r})")

    # ---- processes ---------------------------------------------------------------------------

    def _start(self, p: Process) -> None:
        # A fresh interpreter costs a third of a second, and two with torch.
        spawn = 0.0 if self.torch else 1.0
        # A forked child cannot use the forkserver of its parent: `ChildProcessError`.
        server = spawn if p.is_root else 0.0
        weights = {"fork": 6.0, "thread": 3.0, "spawn": spawn, "forkserver": server}
        method = self.random.choices(list(weights), list(weights.values()))[0]
        process = Process(self._next_process(), method, p.depth + 1)
        for name in list(p.claims):
            if self.random.random() < 0.5:
                process.claims[name] = p.claims.pop(name)
        parameters = list(process.claims)
        way_out = "return" if process.is_thread else self.random.choice(list(WAYS_OUT))
        child = Child(process, way_out)
        self._write_body(process, self.random.randint(2, 9))
        self._join_all(process)
        self._send(process, child)
        self._end(process, way_out)
        self._finish(process, parameters)
        arguments = ", ".join([f"p{process.number}", "pool", "queues", *parameters])
        self._line(p, f"k{process.number} = Started({method!r}, {arguments})")
        p.children.append(child)

    def _send(self, process: Process, child: Child) -> None:
        for name, (number, count) in list(process.claims.items()):
            if self.random.random() < 0.6:
                self._line(process, f"queues[{process.number}].put({name})")
                self._keep(process.claims, name, number, count - 1)
                child.sent.append(number)
        if child.way_out in ("killed", "terminated"):
            # The parent's sign that it has come to where it waits for its end.
            self._line(process, f"queues[{process.number}].put(READY)")

    def _end(self, process: Process, way_out: str) -> None:
        if process.is_thread:
            # The process lives on: what it does not give back stays.
            for name in list(process.reservations):
                self._line(process, f"free(pool, {name})")
            for lease, number in process.leases.items():
                self._line(process, f"release({lease}, {number})")
            return
        for lease in process.leases:
            self._line(process, f"kept.append({lease})")
        if way_out in IN_ORDER:
            self._line(process, f"end({process.drops})")
        waits = way_out in ("killed", "terminated")
        self._line(process, "sleep_for_ever(queues[-1])" if waits else way_out)

    def _fetch(self, p: Process) -> None:
        self._fetch_from(p, self.random.choice([each for each in p.children if each.sent]))

    def _fetch_from(self, p: Process, child: Child) -> None:
        number = child.sent.pop(0)
        name = self._name("c")
        self._line(p, f"{name} = queues[{child.process.number}].get(timeout=PATIENCE)")
        p.claims[name] = (number, 1)

    def _join(self, p: Process) -> None:
        child = p.children.pop(self.random.randrange(len(p.children)))
        number = child.process.number
        if child.way_out in ("killed", "terminated"):
            while child.sent:
                self._fetch_from(p, child)
            which = "SIGKILL" if child.way_out == "killed" else "SIGTERM"
            self._line(p, f"queues[{number}].get(timeout=PATIENCE)")
            self._line(p, f"k{number}.kill(signal.{which})")
        self._line(p, f"k{number}.join({WAYS_OUT[child.way_out]})")
        p.drops += child.process.drops if child.process.is_thread else 0

    def _join_all(self, p: Process) -> None:
        while p.children:
            self._join(p)

    def _leave_a_daemon(self, p: Process) -> None:
        """A child that `multiprocessing` ends when the root has ended."""
        process = Process(self._next_process(), "daemon", 1)
        self._alloc(process)
        self._line(process, f"queues[{process.number}].put(READY)")
        self._line(process, "sleep_for_ever(queues[-1])")
        self._finish(process, [])
        self._line(p, f"Started('daemon', p{process.number}, pool, queues)")
        self._line(p, f"queues[{process.number}].get(timeout=PATIENCE)")

    def _pick(self, among: dict[str, int] | dict[str, tuple[int, int]]) -> str:
        return self.random.choice(list(among))

    def _keep(self, claims: dict[str, tuple[int, int]], name: str, number: int, count: int) -> None:
        if count:
            claims[name] = (number, count)
        else:
            del claims[name]
