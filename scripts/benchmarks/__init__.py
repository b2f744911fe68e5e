"""What a handoff costs, beside baselines of the machine and what one would use instead.

From the bottom up; each part knows only those above it in this list:

- ``settings``, ``report``: what a run measures, and what it found.
- ``payload``: the bytes of a message, and the proof that all of them arrived.
- ``transport``: what a transport has to offer; ``transports``: one file for each kind.
- ``pingpong``: how one message is timed, in the producer and in the consumer.
- ``workers``, ``launcher``: start the processes of a transport, give each its turn, end them.
- ``experiments``: what is no handoff: steps, throughput, contention, sizes of pools, fragmentation.
  ``experiments/internals.py`` is the only file that knows what is private in shmblocks.
- ``targets``, ``table``, ``plot``: what is said about the numbers.
- ``against``: the same code with the shmblocks of another checkout, in turns.
- ``handoff_trace``: counts of one handoff (frames, calls upward, locks). ``cuda``: GPU handoffs.
- ``cli``: the command line.

A new peer is a file in ``transports`` and an entry in its table; a new experiment likewise.
"""

from __future__ import annotations
