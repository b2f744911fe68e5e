"""The rows of peers in a pool's header, as they lie there; `peers.py` changes them."""

from __future__ import annotations

from shmblocks._state.info import NodePeerInfo, ParticipantId, ParticipantInfo
from shmblocks._state.layout import H_PEERS, PEER, PEER_ROWS, PEER_WORDS, WORD


def peer_word(row: int) -> int:
    """Index of the first word of a row."""
    return H_PEERS + row * PEER_WORDS


def peer_infos(
    region: bytes, people: dict[ParticipantId, ParticipantInfo], now_ns: int
) -> list[NodePeerInfo]:
    """The rows in a copy of the header that living servers have."""
    found = []
    for row in range(PEER_ROWS):
        owner, since_ns, fetched, sent, address = PEER.unpack_from(region, peer_word(row) * WORD)
        server = people.get(ParticipantId.of(owner)) if owner else None
        if server is not None and server.is_alive:
            found.append(
                NodePeerInfo(
                    address=address.decode("utf-8", "replace"),
                    server_slot=server.slot,
                    age_seconds=max(0, now_ns - since_ns) / 1e9,
                    fetched=fetched,
                    sent_bytes=sent,
                )
            )
    return found
