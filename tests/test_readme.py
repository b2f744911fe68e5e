"""The README's twenty lines do what it says, as two programs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def programs(pool_name: str, folder: Path) -> list[Path]:
    """The README's Python blocks as files, under names that nobody else uses."""
    blocks = re.findall(r"```python\n(# (\w+\.py)\n.*?)```", README.read_text(), re.DOTALL)
    assert [file for _, file in blocks] == ["encoder.py", "language.py"]
    paths = []
    for text, file in blocks:
        mine = text.replace('"vision"', f'"{pool_name}-pool"').replace("65_536", "4096")
        paths.append(folder / file)
        paths[-1].write_text(mine.replace('"handles"', f'"{pool_name}-queue"'))
    return paths


def test_the_twenty_lines_hand_an_embedding_over(pool_name: str, tmp_path: Path) -> None:
    encoder, language = (
        subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for program in programs(pool_name, tmp_path)
    )
    printed, _ = language.communicate(timeout=100)
    encoder.communicate("\n", timeout=100)
    assert printed.startswith("torch.Size([2000, 3584]) tensor(")
    assert (encoder.returncode, language.returncode) == (0, 0)


def test_the_readme_has_its_parts_in_order() -> None:
    headings = re.findall(r"^## (.*)$", README.read_text(), re.MULTILINE)
    assert headings[:5] == [
        "Two commands",
        "Twenty lines",
        "When to use it, and when not",
        "Concepts",
        "What the design puts first",
    ]
    assert "Layout of the code" in headings
