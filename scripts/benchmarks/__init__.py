"""What a handoff costs, against the floors of the machine and what one would use instead.

Parts, from the bottom up (each knows only what is above it in this list):

- ``settings``, ``results``: what a run is asked to do, and what it found.
- ``payload``: the bytes, and the proof that they arrived.
- ``link``: what a candidate has to offer; ``links``: the candidates, one per file.
- ``pingpong``, ``solo``: how a candidate is measured, inside its own processes.
- ``crew``, ``conductor``: start those processes, give each its turn, leave nothing behind.
- ``stats``, ``targets``, ``table``, ``plot``: what is said about the numbers.
- ``cli``: the command line.

A new peer is a file in ``links`` and a line in ``links/registry.py``. A new way to measure (many
consumers, throughput) is a sibling of ``pingpong`` over the same links.
"""

from __future__ import annotations
