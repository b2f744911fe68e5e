"""What the hand-over costs, from the encoder's send to the last rank's assembled request.

Real: `MMEncoder.send_with_url`, `ZmqDelivery` and `_send` in one process; `MMReceiverHTTP` and
`WaitingZmqRequest` in one process for each rank. Only the models are left out: the encoder's
embedding is given, and the rank's processor takes it. Every embedding is summed up and compared.

    bytes    as SGLang sends it without the plug-in
    handle   through the pool; SGLang's own copy (`torch.cat`) on the rank is kept
    view     through the pool, and read in place

The three kinds take turns in one run, so that what else the machine does hits all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import secrets
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from sglang_cases import watching
from sglang_cases.model import build

KINDS = ("bytes", "handle", "view")
HEADINGS = (
    "rows x 3584 bf16",
    "ranks",
    "bytes, ms",
    "handle, ms",
    "view, ms",
    "bytes / handle",
    "bytes / view",
    "CPU of all, ms",
    "bytes on the wire",
)
WIDTH = 3584
WARM_UP = 2
# For SGLang's own classes in a process without a GPU and without a network.
ON_A_CPU = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_HOST_IP": "127.0.0.1",
    "CUDA_VISIBLE_DEVICES": "",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# More than any embedding: everything goes as bytes.
NO_HANDLES = 1 << 40


class Sample(NamedTuple):
    """One embedding: milliseconds until the last rank has it, of CPU time of all processes, and
    bytes that all ranks received."""

    milliseconds: float
    cpu_milliseconds: float
    wire_bytes: int


class Row(NamedTuple):
    """All samples of one size and number of ranks, by kind."""

    rows: int
    ranks: int
    samples: dict[str, list[Sample]]

    def median(self, kind: str, field: str) -> float:
        values: list[float] = [getattr(sample, field) for sample in self.samples[kind]]
        return statistics.median(values)


class Report(NamedTuple):
    """What one rank says of one embedding."""

    is_right: bool
    at_ns: int
    cpu_ns: int
    wire_bytes: int
    total: int


def start(model: Path, role: str, *more: str) -> object:
    """SGLang's configuration in this process, with its plug-ins."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    arguments = [
        "--device", "cpu", "--model-path", str(model), "--host", "127.0.0.1",
        "--encoder-transfer-backend", "zmq_to_scheduler", "--attention-backend", "torch_native",
    ]  # fmt: skip
    args = prepare_server_args([*arguments, *more])
    args.resolve_once()
    publish(args, role=role)
    return args


def total_of(tensor: object) -> int:
    """A sum over the bits, which no other embedding has by chance."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"expected a tensor, got {type(tensor).__name__}")
    return int(tensor.view(torch.int16).to(torch.int64).sum())


# ---- a rank --------------------------------------------------------------------------------------


class Processor:
    """Takes the embedding, as the model's processor would."""

    prefer_tokenized_input = False

    def __init__(self) -> None:
        self.embedding: dict[object, object] = {}

    def get_validated_mm_data(
        self, prompt: object, embedding: dict[object, object], **more: object
    ) -> object:
        self.embedding = embedding
        return _Inputs()


class _Inputs:
    def __init__(self) -> None:
        self.input_ids = [1]
        self.mm_items: list[object] = []


def run_rank(rank: int, ranks: int, model: Path, to_encoder: Connection) -> None:
    """One rank: for each (kind, request) it waits for the embedding and reports."""
    import torch

    torch.set_num_threads(1)
    urls = ("--language-only", "--encoder-urls", "http://127.0.0.1:1", "--skip-server-warmup")
    args = start(model, "scheduler", *urls)
    from sglang.srt.disaggregation.encoder import receiver as module

    parallel = SimpleNamespace(pp_rank=0, tp_rank=rank, tp_size=ranks, tp_group=None, nnodes=1)
    module.get_parallel = lambda: parallel
    module.get_device = lambda: SimpleNamespace(gpu_id=0)
    receiver = module.MMReceiverHTTP(args, hf_config=None, scheduler=SimpleNamespace())
    counted = _count_bytes(module)
    to_encoder.send(f"127.0.0.1:{receiver.scheduler_embedding_port}")
    while (message := to_encoder.recv()) is not None:
        kind, rid = message
        to_encoder.send(_receive(module, receiver, kind, rid, ranks, counted, to_encoder))


def _count_bytes(module: object) -> list[int]:
    counted = [0]
    kind = vars(module)["WaitingZmqRequest"]
    consume: Callable[..., None] = kind.consume_parts

    def consume_parts(request: object, parts: list[bytes]) -> None:
        counted[0] += sum(len(part) for part in parts)
        consume(request, parts)

    kind.consume_parts = consume_parts
    return counted


def _receive(
    module: object,
    receiver: SimpleNamespace,
    kind: str,
    rid: str,
    ranks: int,
    counted: list[int],
    to_encoder: Connection,
) -> Report:
    from sglang.srt.managers.schedule_batch import Modality

    from shmblocks.sglang_plugin.language import Receiver

    if Receiver.active is None:
        raise RuntimeError("the plug-in is not active")
    Receiver.active.settings = Receiver.active.settings._replace(view=kind == "view")
    processor, counted[0] = Processor(), 0
    wanted = SimpleNamespace(
        rid=rid,
        num_items_assigned={Modality.IMAGE: [1]},
        input_text="x",
        input_ids=None,
        mm_inputs=None,
    )
    request = vars(module)["WaitingZmqRequest"](
        rid=rid,
        recv_req=wanted,
        mm_processor=processor,
        encoder_urls=[],
        model_type="qwen2_5_vl",
        host_name=receiver.hostname,
        receive_count=ranks,
        embedding_port=receiver.scheduler_embedding_port,
        registration_runner=receiver.registration_runner,
    )
    receiver.waiting_by_rid[rid] = request
    to_encoder.send("ready")
    cpu = time.process_time_ns()
    while request.status == 0:
        receiver._drain_scheduler_embeddings()
        time.sleep(0.0002)
    at, cpu = time.monotonic_ns(), time.process_time_ns() - cpu
    receiver.waiting_by_rid.pop(rid)
    embedding = processor.embedding.get(Modality.IMAGE)
    return Report(int(request.status) == 1, at, cpu, counted[0], total_of(embedding))


# ---- the encoder ---------------------------------------------------------------------------------


def encoder_without_model() -> SimpleNamespace:
    """SGLang's `MMEncoder` with what sending needs, and the plug-in; it has no embedding yet."""
    import zmq.asyncio
    from sglang.srt.disaggregation.encoder import server

    from shmblocks.sglang_plugin import encoder as plugin

    encoder = server.MMEncoder.__new__(server.MMEncoder)
    vars(encoder).update(
        rank=0,
        transfer_backend="zmq_to_scheduler",
        context=zmq.asyncio.Context(2),
        scheduler_send_sockets={},
        scheduler_send_locks={},
        send_timeout=30,
        req_states={},
    )
    encoder.delivery = server.ZmqDelivery(encoder, cleanup_receive_state=True)
    plugin.after_init(None, encoder)
    return encoder  # type: ignore[no-any-return]


def give_embedding(
    encoder: SimpleNamespace, part: str, embedding: object, urls: list[str]
) -> object:
    """The encoder has computed it, and these ranks have asked for it; the request's state."""
    import torch
    from sglang.srt.disaggregation.encoder import server
    from sglang.srt.disaggregation.encoder.receiver import EmbeddingData
    from sglang.srt.managers.schedule_batch import Modality

    state = server.ReqState(part)
    grid = torch.tensor([[1, 2, 2]])
    state.embedding_data = EmbeddingData(part, 1, 0, grid, Modality.IMAGE, embedding)
    state.embedding_ready.set()
    encoder.req_states[part] = state
    server.rid_to_receive_endpoint[part] = set(urls)
    server.rid_to_receive_count[part] = len(urls)
    return state


async def send_all(
    ranks: list[Connection], urls: list[str], rows: int, count: int
) -> dict[str, list[Sample]]:
    """Embeddings of all kinds in turn."""
    encoder = encoder_without_model()
    samples: dict[str, list[Sample]] = {kind: [] for kind in KINDS}
    for number in range(WARM_UP + count):
        for kind in KINDS:
            sample = await _send(encoder, kind, ranks, urls, rows)
            if number >= WARM_UP:
                samples[kind].append(sample)
    return samples


async def _send(
    encoder: SimpleNamespace, kind: str, ranks: list[Connection], urls: list[str], rows: int
) -> Sample:
    import torch

    from shmblocks.sglang_plugin.encoder import Sender

    if Sender.active is None:
        raise RuntimeError("the plug-in is not active")
    least = NO_HANDLES if kind == "bytes" else 0
    Sender.active.settings = Sender.active.settings._replace(min_bytes=least)
    embedding = torch.randn(rows, WIDTH).to(torch.bfloat16)
    expected = total_of(embedding)
    rid = uuid.uuid4().hex
    part = f"{rid}_local_part_0"
    for rank in ranks:
        rank.send((kind, rid))
    for rank in ranks:
        if rank.recv() != "ready":
            raise RuntimeError("a rank is out of step")
    give_embedding(encoder, part, embedding, urls)
    await asyncio.sleep(0.01)
    cpu, began = time.process_time_ns(), time.monotonic_ns()
    await encoder.send_with_url(part)
    cpu = time.process_time_ns() - cpu
    reports: list[Report] = [await asyncio.to_thread(rank.recv) for rank in ranks]
    wrong = [each for each in reports if not each.is_right or each.total != expected]
    if wrong:
        raise RuntimeError(f"{kind}: a rank has another embedding than was sent: {wrong}")
    return Sample(
        (max(each.at_ns for each in reports) - began) / 1e6,
        (cpu + sum(each.cpu_ns for each in reports)) / 1e6,
        sum(each.wire_bytes for each in reports),
    )


def measure(rows: int, ranks: int, count: int, model: Path) -> Row:
    """One size and number of ranks, in processes of their own."""
    context = multiprocessing.get_context("spawn")
    ours, processes = [], []
    for rank in range(ranks):
        here, there = context.Pipe()
        process = context.Process(target=run_rank, args=(rank, ranks, model, there), daemon=True)
        process.start()
        there.close()
        ours.append(here)
        processes.append(process)
    result: multiprocessing.SimpleQueue[dict[str, list[Sample]]] = context.SimpleQueue()
    encoder = context.Process(target=_encode, args=(ours, rows, count, model, result))
    try:
        encoder.start()
        samples = result.get()
        encoder.join()
    finally:
        for process in (encoder, *processes):
            process.kill()
            process.join()
        watching.remove(os.environ["SHMBLOCKS_SGLANG_POOL"])
    return Row(rows, ranks, samples)


def _encode(
    ranks: list[Connection],
    rows: int,
    count: int,
    model: Path,
    result: multiprocessing.SimpleQueue[dict[str, list[Sample]]],
) -> None:
    import torch

    start(model, "encoder", "--encoder-only")
    torch.set_num_threads(1)
    urls = [rank.recv() for rank in ranks]
    result.put(asyncio.run(send_all(ranks, urls, rows, count)))


# ---- the report ----------------------------------------------------------------------------------


def table(found: list[Row]) -> str:
    """Medians and their ratios."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    for row in found:
        times = [row.median(kind, "milliseconds") for kind in KINDS]
        cpu = " / ".join(f"{row.median(kind, 'cpu_milliseconds'):.0f}" for kind in KINDS)
        wire = " / ".join(f"{row.median(kind, 'wire_bytes'):,.0f}" for kind in KINDS[:2])
        ratios = " | ".join(f"{times[0] / each:.2f}" for each in times[1:])
        milliseconds = " | ".join(f"{each:.1f}" for each in times)
        size = row.rows * WIDTH * 2 / 1e6
        lines.append(
            f"| {row.rows:,} ({size:.1f} MB) | {row.ranks} | {milliseconds} | {ratios} | {cpu} "
            f"| {wire} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure, print the table, and write all samples."""
    parser = argparse.ArgumentParser(prog="scripts/sglang --handover", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 2000, 8192])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--count", type=int, default=15, help="embeddings of each kind")
    parser.add_argument("--json", type=Path, help="where all samples are written")
    arguments = parser.parse_args()
    os.environ |= ON_A_CPU | {
        "SHMBLOCKS_SGLANG_POOL": f"sglang-handover-{secrets.token_hex(4)}",
        "SHMBLOCKS_SGLANG_POOL_MB": "256",
    }
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"sglang-handover-{os.getuid()}"
    model = build(folder / "model")
    found = []
    for rows in arguments.rows:
        for ranks in arguments.ranks:
            found.append(measure(rows, ranks, arguments.count, model))
            print(table(found[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
            if arguments.json is not None:
                # After each: a run of all takes long.
                arguments.json.write_text(json.dumps([row._asdict() for row in found]))
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
