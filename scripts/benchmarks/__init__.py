"""What a handoff costs, against the floors of the machine and what one would use instead.

Parts, from the bottom up (each knows only what is above it in this list):

- ``settings``, ``results``: what a run is asked to do, and what it found.
- ``payload``: the bytes, and the proof that they arrived.
- ``link``: what a candidate has to offer; ``links``: the candidates, one per file.
- ``pingpong``, ``solo``: how a candidate is measured, inside its own processes.
- ``memory``: what its processes take.
- ``crew``, ``conductor``: start those processes, give each its turn, leave nothing behind.
- ``studies``: throughput, contention, attaching, fragmentation, the budget of a handoff.
- ``stats``, ``targets``, ``table``, ``plot``, ``plot_studies``: what is said about the numbers.
- ``cli``: the command line.

A new peer is a file in ``links`` and a line in ``links/registry.py``; a new study a file in
``studies`` and two lines in ``studies/registry.py``.
"""

from __future__ import annotations
