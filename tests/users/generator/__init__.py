"""Random small programs over the public API, run as real processes and compared with a plain model.

    writer     writes a program from a seed, and knows what must come out of it (the model)
    verbs      the words that programs are written in; each checks what it does
    run        runs programs, and reports a finding with the program, so that it can be replayed

`scripts/random_programs --minutes 30` runs them for a while; the suite runs some of each seed.
"""
