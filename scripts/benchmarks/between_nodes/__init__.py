"""Blocks of another node: ours beside raw TCP, zmq, NIXL, Mooncake, Ray and a memcpy.

Each transport has two processes of its own, the *source* with pool A and the *reader* with pool B,
over loopback. They have their turns one after the other in each round, so that what else the
machine does falls on all alike, and while one has its turn the others sleep. Told are the median
and the best time of one payload, and the seconds of CPU per GB of each process, all its threads
and helpers counted.

    kit         payloads, pools, memory that is walked along
    baselines   memcpy, raw TCP
    ours        NodeServer and RemotePool
    peers       zmq; NIXL; Mooncake
    ray_objects Ray's object transfer
    turns       processes, rounds, and what came out

A pool never gives the same blocks twice in a row, so that its memory is never in the processor's
caches. The others go along their memory in the same way.
"""
