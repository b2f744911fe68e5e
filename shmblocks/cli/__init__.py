"""The command `shmblocks`: look at the pools and queues of this node, and clean up after the dead.

    main        arguments, exit codes, where output goes
    commands    what a command is; ls, check, rm, reap, doctor
    stat, map   the two commands that show everything of one pool
    top         a live picture of all pools
    cache       the content cache of a pool
    metrics     for Prometheus
    keep        the one command that joins a pool
    render      documents for people: tables, colours, words
    jsonhelp    the keys of `--json`, for the help

`--json` prints the structs of `shmblocks._state.info` as they are. Nothing but `keep` joins a pool
as a participant, so looking never keeps a pool alive. Nothing here imports torch, which would take
seconds.
"""

from __future__ import annotations
