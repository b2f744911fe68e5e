"""Sleeping until a word of shared memory changes, and waking those who sleep.

Contract
- `wait` returns after a wake-up, when the word no longer has the expected value, at the timeout,
  or without a reason (a signal). Always check again what you wait for.
- `wake` wakes sleepers of every process that maps the word. It is a system call: callers keep a
  count of sleepers beside the word and call only when somebody sleeps.
- The word is the lower half of an aligned 64-bit word of a segment. A process that changes what
  others wait for adds one to it, after the change and before the wake.

What it does not do: keep an order among sleepers, or survive a waker that dies between the change
and the wake; sleeps are therefore bounded (`LONGEST_SLEEP`).

Source: futex(2); the shared (not FUTEX_PRIVATE) operations compare inode and offset, so that they
work across processes that map the same file at different addresses.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform

_NUMBERS = {"x86_64": 202, "aarch64": 98}
_FUTEX_WAIT = 0
_FUTEX_WAKE = 1

# Seconds that a waker which dies before its wake-up can cost a sleeper. Smaller: more sleepers wake
# for nothing. Larger: a longer stall after such a death.
LONGEST_SLEEP = 0.25

EVERYONE = 0x7FFFFFFF


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


# Called through a CDLL, so that the interpreter's lock is released while it sleeps.
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_number = _NUMBERS.get(platform.machine(), -1)


class Futex:
    """One word of a mapping to sleep on. Keeps the mapping alive until `drop`."""

    def __init__(self, mapping: mmap.mmap, offset: int) -> None:
        self._word: ctypes.c_uint32 | None = ctypes.c_uint32.from_buffer(mapping, offset)
        self._address = ctypes.c_void_p(ctypes.addressof(self._word))

    @property
    def value(self) -> int:
        """The word now; -1 after `drop`."""
        word = self._word
        return -1 if word is None else word.value

    def wait(self, expected: int, timeout: float) -> None:
        """Sleep while the word (32 bits of it) is `expected`, at most `timeout` seconds."""
        timeout = min(max(timeout, 0.0), LONGEST_SLEEP)
        seconds = int(timeout)
        limit = _Timespec(seconds, int((timeout - seconds) * 1e9))
        _syscall(
            _number,
            self._address,
            _FUTEX_WAIT,
            ctypes.c_uint32(expected & 0xFFFFFFFF),
            ctypes.byref(limit),
            None,
            0,
        )

    def wake(self, count: int = EVERYONE) -> int:
        """Wake up to `count` sleepers; how many were woken."""
        woken: int = _syscall(_number, self._address, _FUTEX_WAKE, count, None, None, 0)
        if woken < 0:
            error = ctypes.get_errno()
            if self._word is None:
                return 0  # dropped, perhaps during the call
            raise OSError(error, os.strerror(error))
        return woken

    def drop(self) -> None:
        """Let go of the mapping, and wake all sleepers; they find that there is no value any more.

        Idempotent. If another thread is about to `wait` or `wake`, its call fails in the kernel,
        which finds no memory at address 0.
        """
        word, self._word = self._word, None
        address, self._address = self._address, ctypes.c_void_p(None)
        if word is not None:
            _syscall(_number, address, _FUTEX_WAKE, EVERYONE, None, None, 0)
