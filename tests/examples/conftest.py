"""The examples' own modules can be imported, as they can from a script that lies beside them."""

from __future__ import annotations

import sys

from tests.examples.terminal import EXAMPLES

sys.path.insert(0, str(EXAMPLES))
