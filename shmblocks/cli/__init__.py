"""The command `shmblocks`: look at the pools of this node, and clean up after the dead.

    main        arguments, exit codes, errors
    command     what a command is; one file per command: ls, stat, map, check, rm, reap, doctor
    reports     what the commands found, as data: this is what `--json` prints
    gather      asks a pool or the node, fills the reports
    document    what is shown, without saying how; plain and pretty say how
    blockmap    the picture of `map`

Nothing here joins a pool as a participant: looking at a pool never keeps it alive. Nothing here
imports torch: the command must be there at once.
"""

from __future__ import annotations
