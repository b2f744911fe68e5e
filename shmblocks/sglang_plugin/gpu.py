"""An embedding into the pool, from the CPU or straight from the GPU.

From the GPU the copy runs on a stream of its own into the pinned pool, in a thread that waits for
it, so that neither the encoder's event loop nor its next batch stands still.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def mark_ready(embedding: torch.Tensor) -> torch.cuda.Event | None:
    """What the GPU comes to when the embedding is there; None: it is on the CPU, and there."""
    if not embedding.is_cuda:
        return None
    import torch

    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(embedding.device))
    return event


def fill(target: torch.Tensor, embedding: torch.Tensor, ready: object) -> None:
    """Copy `embedding` to `target`, which is in the pool; it is there when this returns."""
    import torch

    with torch.no_grad():
        if not isinstance(ready, torch.cuda.Event):
            target.copy_(embedding)
            return
        stream = torch.cuda.Stream(embedding.device)  # type: ignore[no-untyped-call]
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            target.copy_(embedding, non_blocking=True)
        stream.synchronize()
