from __future__ import annotations

import sys

from tests.users.generator.run import main

sys.exit(main(sys.argv[1:]))
