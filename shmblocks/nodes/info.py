"""What can be seen of servers and readers, as plain values of one moment."""

from __future__ import annotations

import msgspec


class PeerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One connection to a server.

    `is_sending`: a fetch is under way; `fetched`: fetches that the reader has confirmed.
    """

    address: str
    age_seconds: float
    is_sending: bool
    fetched: int
    sent_bytes: int


class NodeServerStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the server began.

    fetched       confirmed by their readers
    given_back    not confirmed: the connection ended or stood still; to be fetched again
    refused       answered with an error (a stale handle, say)
    strangers     connections that did not prove the key, or spoke something else
    turned_away   connections beyond `max_connections`
    sent_bytes    rows, of all fetches that were begun
    """

    address: str
    pools: tuple[str, ...]
    peers: tuple[PeerInfo, ...]
    max_connections: int
    fetched: int
    given_back: int
    refused: int
    strangers: int
    turned_away: int
    sent_bytes: int


class RemotePoolStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of one reader since it was made.

    fetched          fetches that succeeded, parts (`fetch_into`) among them
    failed           fetches that raised
    in_flight        fetches that have a connection, or wait for blocks with one reserved for them
    idle             open connections that wait for the next fetch
    received_bytes   rows, of fetches that succeeded
    quarantined      blocks here that wait for the end of a NIXL agent, since something may still
                     come into them though their fetches failed
    """

    address: str
    fetched: int
    failed: int
    in_flight: int
    idle: int
    received_bytes: int
    quarantined: int
