"""Keys of the content cache: what an embedding is, as 16 bytes.

    namespace = Namespace(model="Qwen/Qwen2.5-VL-7B", revision="a1b2c3", dtype="bf16")
    key = namespace.key(image_hash, epoch=pool.epoch)

Contract
- Two embeddings have the same key only if everything that shapes them is the same: the content (the
  identifier stands for it) and the namespace. Identifiers are taken on trust: who reuses one for
  another content is served the wrong embedding, unless its length or width differs.
- The epoch is part of the key. After `pool.bump_epoch()` keys that are made anew reach nothing that
  was published before: what was encoded with other weights is never served.

What it does not do: hash content; engines have identifiers of their own (often a SHA-256).
"""

from __future__ import annotations

import hashlib

import msgspec

KEY_BYTES = 16
# Part of every key: another number when the way keys are made changes.
_VERSION = 1


class Namespace(msgspec.Struct, frozen=True, kw_only=True):
    """Everything but the content that shapes an encoder's output.

    model     its name or path; two names are two models
    revision  of its weights: a commit, a version, a checksum
    dtype     of the embeddings
    config    whatever else changes the output: quantization, vision config, library version
    salt      the operator's own, to keep tenants apart
    """

    model: str
    revision: str = ""
    dtype: str = ""
    config: str = ""
    salt: str = ""

    def digest(self) -> bytes:
        """32 bytes that stand for the namespace."""
        encoded = msgspec.msgpack.encode((_VERSION, msgspec.structs.astuple(self)))
        return hashlib.blake2b(encoded, digest_size=32, person=b"shmblocks-ns").digest()

    def key(self, identifier: str | bytes, *, epoch: int = 0) -> bytes:
        """The key of a content in this namespace; `epoch`: the pool's."""
        return content_key(self.digest() + epoch.to_bytes(8, "little"), identifier)


def content_key(namespace: bytes, identifier: str | bytes) -> bytes:
    """16 bytes for a content in a namespace: a keyed blake2b, so that neither can be made to look
    like the other.

    `namespace` is any bytes (a `Namespace.digest()`, with an epoch behind it); `identifier` names
    the content.
    """
    if not isinstance(namespace, bytes):
        raise TypeError(f"namespace: expected bytes, got {type(namespace).__name__}")
    if isinstance(identifier, str):
        identifier = identifier.encode("utf-8", "surrogatepass")
    elif not isinstance(identifier, bytes):
        raise TypeError(f"identifier: expected str or bytes, got {type(identifier).__name__}")
    secret = hashlib.blake2b(namespace, digest_size=32).digest()
    return hashlib.blake2b(identifier, digest_size=KEY_BYTES, key=secret).digest()
