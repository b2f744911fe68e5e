"""Every participant dies, and every operation is interrupted, at every line; then all is looked at.

These modules import no torch, and the tests run them in fresh interpreters: forking a process that
has imported it takes ten times as long, and there are thousands of forks.
"""
