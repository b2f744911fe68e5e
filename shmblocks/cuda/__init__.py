"""The GPU part of a pool; imported only by a process that asks for it.

    driver     the few calls of the CUDA driver that are used, checked; the one place that knows
               `cuda.bindings`
    memory     the CUDA allocation of a pool: made by its creator, opened once per process by others
    tensors    the fields of a CUDA pool as torch tensors on that memory
    watcher    the thread that ends the waits of streams whose producer died
    use        one process's use of the GPU with one pool: all of these together

Order between processes is kept by two kinds of words in the segment, which every process that uses
a GPU registers with CUDA:

    producer's stream   ... work on the blocks, then: ready = generation
    reader's stream     waits until ready >= generation, then: work on the blocks, then:
                        acknowledged = generation
    any CPU             reads both as plain memory: what is acknowledged is over

No event, no kernel and no synchronisation: what is to be ordered is ordered by the streams.

What it does not do: copy, choose streams, or synchronise; only `close` waits for the GPU.
"""

from __future__ import annotations
