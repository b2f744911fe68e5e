"""Three photographs that scikit-learn and matplotlib bring, and as many others as one likes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

NAMES = ("grace", "china", "flower")
_FILES = {
    "grace": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
# Pixels that each next variant of a photograph is narrower.
CUT = 3


def path(name: str) -> Path:
    """The file of a photograph. Imports nothing."""
    package, file = _FILES[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise FileNotFoundError(f"{package} is not installed: it brings the photograph {name}")
    return Path(found.origin).parent / file


def photo(name: str) -> Any:  # noqa: ANN401  PIL has no types here
    """`china`, or `china:3`: the same one cut at the left, another picture for every encoder."""
    from PIL import Image

    base, _, cut = name.partition(":")
    image = Image.open(path(base)).convert("RGB")
    return image.crop((int(cut or 0) * CUT, 0, image.width, image.height))


def variants(count: int) -> list[str]:
    """So many different photographs."""
    return [f"{NAMES[at % 3]}:{at // 3 + 1}" for at in range(count)]
