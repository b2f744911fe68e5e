"""Looks at what was built: an sdist and a wheel of the right version, with the right files in them.

python scripts/releasing/contents.py dist
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Of an sdist: what somebody needs who builds, tests or reads it without the repository.
IN_SDIST = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "setup.py",
)


def main(folder: Path) -> None:
    version = version_of_the_project()
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    front = f"shmblocks-{version}"
    require(sdist.name == f"{front}.tar.gz", f"expected {front}.tar.gz, got {sdist.name}")
    require(wheel.name.startswith(f"{front}-"), f"expected {front}-*.whl, got {wheel.name}")

    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "shmblocks").rglob("*.py")}
    modules.add("shmblocks/py.typed")
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(f"{front}/") for name in archive.getnames()}
    core = {str(path.relative_to(ROOT)) for path in (ROOT / "shmblocks/_core").glob("*.[ch]")}
    missing = (modules | core | set(IN_SDIST)) - names
    require(not missing, f"{sdist.name} lacks {sorted(missing)}")

    with zipfile.ZipFile(wheel) as built:
        names = set(built.namelist())
    missing = modules - names
    require(not missing, f"{wheel.name} lacks {sorted(missing)}")
    require(not core & names, f"{wheel.name} has sources of the core")
    others = {name.split("/")[0] for name in names} - {"shmblocks", f"{front}.dist-info"}
    require(not others, f"{wheel.name} installs beside shmblocks: {sorted(others)}")
    print(f"dist/{sdist.name}, dist/{wheel.name}: {len(modules)} files of the package")


def version_of_the_project() -> str:
    """The one place where the version stands."""
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    require(found is not None, "pyproject.toml has no version")
    return found[1] if found else ""


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(f"release-check: {otherwise}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
