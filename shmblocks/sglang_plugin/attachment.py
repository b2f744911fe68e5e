"""The pool that a process of SGLang uses: attached now, or as soon as that is possible."""

from __future__ import annotations

import hashlib
import os
import time

from shmblocks._state.layout import ROLE_BYTES
from shmblocks.errors import ShmBlocksError
from shmblocks.pool import BlockPool
from shmblocks.sglang_plugin.process import logger, process
from shmblocks.sglang_plugin.settings import LOCK_TIMEOUT, Settings

# Of the role: participants of another protocol do not find each other. It changes with the meaning
# of what the encoder writes into a message.
PROTOCOL = "sgl1"
# Seconds between two attempts. Smaller: more of them, each some milliseconds of SGLang's thread.
# Larger: bytes for longer.
RETRY = 5.0
# Seconds between two looks for what the dead left, and between two lines about what was counted.
REAP_EVERY = 1.0
REPORT_EVERY = 60.0


def role_of(endpoint: str) -> str:
    """The role of the rank that receives there.

    With the network namespace: two of them may use one address, and share /dev/shm.
    """
    namespace = os.stat("/proc/self/ns/net").st_ino
    role = f"{PROTOCOL} {endpoint} {namespace}"
    if len(role.encode()) > ROLE_BYTES:
        role = f"{PROTOCOL} {hashlib.blake2b(role.encode(), digest_size=20).hexdigest()}"
    return role


class Attachment:
    """A pool, or the wish for one; owns it."""

    def __init__(self, settings: Settings, role: str) -> None:
        self._settings = settings
        self._role = role
        self._pool: BlockPool | None = None
        self._next_attempt = 0.0
        self._said = ""
        self._next_reap = 0.0
        self._next_report = time.monotonic() + REPORT_EVERY
        self._reported = ""

    def pool(self) -> BlockPool | None:
        """The pool, attached if need be; None: it cannot be had now. Never raises."""
        pool = self._pool
        if pool is not None and not pool.is_closed:
            return pool
        if time.monotonic() < self._next_attempt:
            return None
        self._next_attempt = time.monotonic() + RETRY
        try:
            pool = BlockPool.ensure(self._settings.pool, self._settings.config(), role=self._role)
            if self._settings.pin:
                pool.pin()
        except (ShmBlocksError, OSError, ValueError) as error:
            self._say_why_not(error)
            return None
        self._pool = pool
        self._said = ""
        logger.warning(
            "shmblocks: %s attached to pool %s of %d MiB (%s)",
            self._role,
            pool.name,
            self._settings.pool_bytes >> 20,
            "pinned" if pool.is_pinned else "not pinned",
        )
        return pool

    def _say_why_not(self, error: Exception) -> None:
        if str(error) != self._said:
            self._said = str(error)
            logger.warning(
                "shmblocks: not attached, embeddings go as bytes (tried again every %g s): %s",
                RETRY,
                error,
            )

    def look_after(self) -> None:
        """Now and then: give back what the dead held, and say what was counted."""
        now = time.monotonic()
        if now < self._next_reap:
            return
        self._next_reap = now + REAP_EVERY
        pool = self.pool()
        if pool is not None:
            with pool.lock_timeout(LOCK_TIMEOUT):
                pool.reap_if_due()
        if now >= self._next_report:
            self._next_report = now + REPORT_EVERY
            counted = str(process.counters)
            if counted != self._reported:
                self._reported = counted
                logger.info("shmblocks: %s: %s", self._role, counted)

    def close(self) -> None:
        """Leave the pool."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
