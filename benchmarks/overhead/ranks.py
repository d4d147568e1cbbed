"""A model spread over processes on one machine, connected by gloo; what each does with its shards, all at once."""

import socket
import time
from dataclasses import dataclass

import torch
import torch.multiprocessing as mp
from models import Weights
from protocol import CAPTURE, COPY, MERGES, UPDATE
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from merge_callback import Ema
from merge_callback.capture.layout import RowLayout
from merge_callback.capture.ring import SnapshotRing
from merge_callback.capture.running_averages import Shadow
from merge_callback.capture.storage import DeviceStorage
from merge_callback.live.weights import LiveTensors
from merge_callback.merging.rules import merge_coefficients, resolve_rule

NUM_LAYERS = 10
NUM_WARM_UP = 2


@dataclass(frozen=True)
class Job:
    """What every process is told.

    Args:
        num_ranks: How many there are.
        num_parameters: Of all of them together.
        num_snapshots: In the ring.
        num_rounds: That count.
    """

    num_ranks: int
    num_parameters: int
    num_snapshots: int
    num_rounds: int


def sharded_seconds(job: Job) -> dict[str, list[float]]:
    """Seconds of every round, by what is done: those of the slowest rank, which all begin at the same time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.get_context("spawn").Manager() as manager:
        found = manager.dict()
        mp.spawn(_measure, (job, port, found), nprocs=job.num_ranks)
        return dict(found)


def _measure(rank, job, port, found) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=job.num_ranks)
    module = nn.Sequential(*Weights([(job.num_parameters // NUM_LAYERS // 100, 100)] * NUM_LAYERS).layers)
    fully_shard(module, mesh=init_device_mesh("cpu", (job.num_ranks,)))
    tensors, shadow = LiveTensors(module), Shadow(Ema(half_life_steps=100))
    live = dict(tensors.parameters())
    ring = SnapshotRing(DeviceStorage(RowLayout(live), job.num_snapshots), job.num_snapshots)
    for step in range(job.num_snapshots):
        ring.append(step, live)
    targets, sources = [torch.empty_like(tensor).fill_(0.5) for tensor in live.values()], list(live.values())
    coefficients = merge_coefficients(resolve_rule("wma"), range(1, job.num_snapshots + 1))
    steps = iter(range(job.num_snapshots, 10**9))

    def update() -> None:
        tensors.find()
        shadow.update(next(steps), tensors.parameters())

    actions = {
        COPY: lambda: torch._foreach_copy_(targets, sources),
        CAPTURE: lambda: ring.append(next(steps), live),
        UPDATE: update,
        MERGES: lambda: list(ring.merges([coefficients])),
    }
    for number in range(NUM_WARM_UP + job.num_rounds):
        for name, action in actions.items():
            distributed.barrier()
            began = time.perf_counter()
            action()
            slowest = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
            distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
            if rank == 0 and number >= NUM_WARM_UP:
                found[name] = [*found.get(name, []), slowest.item()]
    distributed.destroy_process_group()
