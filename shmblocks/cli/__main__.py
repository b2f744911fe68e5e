"""`python -m shmblocks.cli`, for where the command is not on the path."""

from __future__ import annotations

import sys

from shmblocks.cli.main import main

sys.exit(main())
