"""``python -m benchmarks``: what ``scripts/bench`` starts."""

from __future__ import annotations

import sys

from benchmarks.cli import main

# Each of the worker processes imports this file again, under another name.
if __name__ == "__main__":
    sys.exit(main())
