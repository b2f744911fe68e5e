"""The candidates, one per file; ``registry`` lists them."""

from __future__ import annotations
