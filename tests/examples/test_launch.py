"""launch.py --small, started as a user starts it: every row, every way to end."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.examples.terminal import Terminal

pytest.importorskip("PIL", reason="the extra `examples` is not installed")
pytest.importorskip("skimage", reason="the extra `examples` is not installed")

ROW = re.compile(
    r"^ *(?P<room>\d+)  (?P<photo>\S.*?) +\d+x\d+ +(?P<tokens>\d+) +(?P<blocks>\d+)"
    r" +(?P<rounds>\d+) +(?P<mib>[\d.]+)  (?P<way>landing|push) +L(?P<reader>\d)"
    r" +(?P<encode>\d+) +(?P<handoff>[\d.]+)  (?P<same>yes|NO) "
)
ENDLESS = ("--requests", "1000000")


def launch(name: str, *arguments: str) -> Terminal:
    return Terminal("launch.py", "--small", "--name", name, *arguments)


def rows(terminal: Terminal) -> list[dict[str, str]]:
    return [match.groupdict() for line in terminal.lines if (match := ROW.match(line))]


def test_photographs_go_both_ways_and_every_token_is_that_of_one_process(pool_name: str) -> None:
    with launch(pool_name) as terminal:
        assert terminal.wait() == 0, terminal.text
    found = rows(terminal)
    assert sorted(int(row["room"]) for row in found) == list(range(12))
    assert {row["same"] for row in found} == {"yes"}
    assert {row["way"] for row in found} == {"landing", "push"}
    assert {row["reader"] for row in found} == {"0", "1"}
    # 64 tokens are the landing allocation: longer prompts come in a second round, if they land.
    for row in found:
        resumes = row["way"] == "landing" and int(row["tokens"]) > 64
        assert int(row["rounds"]) == (2 if resumes else 1), row
    assert any(row["rounds"] == "2" for row in found)
    assert "12 requests, 12 identical to the one-process run" in terminal.text
    assert "64 of 64 blocks free, 0 violations" in terminal.text
    assert terminal.lines[-1] == "segments left: 0"


def test_a_way_can_be_chosen_and_both_change_turns_when_the_photographs_come_again() -> None:
    from launch import plan

    assert plan("landing", 3) == ["landing"] * 3
    assert plan("push", 3) == ["push"] * 3
    both = plan("both", 16)
    assert both[:8] == ["landing", "push"] * 4
    assert both[8:] == ["push", "landing"] * 4


@pytest.mark.slow
def test_a_token_that_differs_ends_with_1(pool_name: str, tmp_path: Path) -> None:
    script = tmp_path / "other_reference.py"
    script.write_text(
        "import sys, launch, msgspec\n"
        "class Other(launch.Launch):\n"
        "    def reference(self):\n"
        "        right = super().reference()\n"
        "        last = list(right)[-1]\n"
        "        tokens = (*right[last].tokens[:-1], -1)\n"
        "        return {**right, last: msgspec.structs.replace(right[last], tokens=tokens)}\n"
        "launch.Launch = Other\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(launch.main())\n"
    )
    with Terminal(
        script, "--small", "--name", pool_name, "--requests", "2", "--tokens", "2"
    ) as terminal:
        assert terminal.wait() == 1, terminal.text
    assert sorted(row["same"] for row in rows(terminal)) == ["NO", "yes"]
    assert "2 requests, 1 identical to the one-process run" in terminal.text


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_leaves_nothing(pool_name: str) -> None:
    with launch(pool_name, *ENDLESS) as terminal:
        terminal.wait_for("yes")
        terminal.press_ctrl_c()
        assert terminal.wait() == 130
    assert terminal.lines[-1] == "launch: stopped"
    assert "Traceback" not in terminal.text


@pytest.mark.slow
def test_ctrl_c_while_the_children_start_ends_them_quietly(pool_name: str) -> None:
    with launch(pool_name, *ENDLESS) as terminal:
        terminal.wait_for("pids:")
        terminal.press_ctrl_c()
        assert terminal.wait() == 130
    assert terminal.lines[-1] == "launch: stopped"
    assert "Traceback" not in terminal.text


@pytest.mark.slow
def test_sigterm_to_the_launcher_alone_ends_all_processes(pool_name: str) -> None:
    with launch(pool_name, *ENDLESS) as terminal:
        terminal.wait_for("yes")
        terminal.send(signal.SIGTERM)
        assert terminal.wait() == 128 + signal.SIGTERM
    assert "Traceback" not in terminal.text


@pytest.mark.slow
@pytest.mark.parametrize("who", ["embedding", "language 1"])
def test_a_killed_child_ends_the_launch_and_is_named(pool_name: str, who: str) -> None:
    with launch(pool_name, *ENDLESS) as terminal:
        pids = terminal.wait_for("pids:")
        terminal.wait_for("yes")
        pid = int(pids.partition(f"{who} ")[2].partition(",")[0])
        os.kill(pid, signal.SIGKILL)
        assert terminal.wait() == 1
    assert f"launch: the {who} process (pid {pid}) died of SIGKILL" in terminal.text


@pytest.mark.slow
def test_a_killed_launcher_takes_its_children_along(pool_name: str) -> None:
    with launch(pool_name, *ENDLESS) as terminal:
        terminal.wait_for("yes")
        terminal.send(signal.SIGKILL)
        assert terminal.wait() == -signal.SIGKILL
