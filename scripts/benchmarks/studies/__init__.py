"""Measurements that are no handoffs: contention, throughput, fragmentation, attaching, the budget.

Each module has one function that measures and gives a `Study`: a table, what it means, and the
numbers behind it by name.
"""

from __future__ import annotations
