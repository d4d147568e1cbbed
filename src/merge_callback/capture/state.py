"""Shards in a checkpoint: added when it is saved, read back when it is loaded."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor, distribute_tensor

from merge_callback.live.sharding import Sharding, local, rank

# Fills the distributed tensors that it is given by name.
ShardReader: TypeAlias = Callable[[dict[str, Tensor]], None]


def put_shards(
    shards: Iterable[tuple[str, str, Tensor]], sharding: "Sharding", checkpoint: dict[str, Any]
) -> str | dict[str, Tensor]:
    """Adds what every rank holds of some tensors to a Lightning checkpoint that is about to be saved.

    A checkpoint of shards takes them as if they were one more optimizer's, which is written by every rank and never
    asked for when Lightning loads; a checkpoint of whole tensors takes them whole, on rank 0.

    Args:
        shards: Of each tensor the name that it gets, that of the live tensor it is shaped like, and this rank's part.
        sharding: How live tensors are spread.
        checkpoint: Lightning's.

    Returns:
        What `shard_reader` finds them by, to be kept in the checkpoint.
    """
    if any(isinstance(value, DTensor) for value in checkpoint["state_dict"].values()):
        checkpoint["optimizer_states"].append({name: sharding.as_dtensor(like, part) for name, like, part in shards})
        return f"optimizer_{len(checkpoint['optimizer_states']) - 1}"
    # Tensor by tensor: no rank has more than one whole tensor at a time beside what rank 0 keeps.
    gathered = ((name, sharding.full_tensor(like, part)) for name, like, part in shards)
    return {name: tensor.cpu() for name, tensor in gathered if rank() == 0}


def shard_reader(found: str | Mapping[str, Tensor] | None, path: Any) -> ShardReader | None:
    """Reads what `put_shards` added, from a checkpoint at a path; None if it added nothing."""
    if found is None:
        return None

    def read(tensors: dict[str, Tensor]) -> None:
        if isinstance(found, str):
            if tensors:
                dcp.load({found: tensors}, checkpoint_id=path)
            return
        for name, tensor in tensors.items():
            source = found[name]
            if isinstance(tensor, DTensor):
                # Each rank cuts out its own part.
                source = distribute_tensor(source, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
            local(tensor).copy_(source)

    return read
