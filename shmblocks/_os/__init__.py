"""One facility of the kernel in each module; nothing here knows of pools.

segment        a file in /dev/shm: made, found, mapped, removed
prefault       its pages mapped ahead           limits    why it cannot be made, in words
filelock       who is inside, and who lives     cgroup    limits of a container
futex          sleep on a word, and wake        process   this process, and what /proc says
futex_asyncio  the same for event loops
wait           spin, then sleep, until a deadline
"""

from __future__ import annotations
