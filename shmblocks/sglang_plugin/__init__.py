"""SGLang, unpatched: what its encoder makes reaches every rank of this node as a handle.

SGLang runs plug-ins that it finds by the entry point `sglang.srt.plugins`; `load` is ours. It does
nothing unless `SHMBLOCKS_SGLANG_POOL` names a pool. `docs/sglang.md` is for operators.

    encoder                                             each rank of the language model
    MMEncoder._send                                     MMReceiverBase.__init__
      first attached destination: one copy, published      attach; role = the address of my socket
      each attached destination: a claim by name, and    WaitingZmqRequest._extract_embedding_...
        the message without its bytes, with the handle     open: recv_obj.embedding is a view
      everybody else: bytes, as before                   _assemble_mm_inputs_from_embeddings
    ZmqDelivery.release                                    SGLang has copied; release the leases
      the encoder's own lease ends                       release_resources: the same, on failure
                                                         _drain_scheduler_embeddings
                                                           claims of messages that SGLang dropped

    settings        what the environment says
    process         what was counted, and how failures of ours end
    hooks           whether what is hooked is there
    attachment      the pool, now or later
    encoder         the sender, and its hooks
    language        the receiver, and its hooks
    gpu             from the GPU straight into the pool
    pixels, store   two options, off by default
    loading         the entry point

Contract
- An exception of ours ends neither a request that can go on without us nor SGLang's scheduler loop.
- A handle goes only to an address that a living participant of the same pool carries. Everybody
  else gets bytes: another node, another version, no plug-in, a full pool, a small embedding.
- Each claim is announced to the participant that shall take it up, so that it comes back when that
  one dies, whoever else lives.
- This package imports torch only where SGLang has done so before.
"""

from __future__ import annotations

from shmblocks.sglang_plugin.loading import load

__all__ = ["load"]
