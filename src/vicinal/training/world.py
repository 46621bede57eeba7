"""The processes of a run: who this one is, and how the model is spread over them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vicinal.tasks.protocol import Task, Turn
from vicinal.training.recipe import Parallel


@dataclass(frozen=True)
class World:
    """This process among those of the run. `mesh` is None where it is alone."""

    rank: int
    processes: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every process is here."""
        if self.mesh is not None:
            distributed.barrier()

    def mean(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        """Scalars averaged over the processes."""
        if not values:
            return {}
        stacked = torch.stack([value.detach().double().reshape(()) for value in values.values()])
        if self.mesh is not None:
            distributed.all_reduce(stacked)
            stacked /= self.processes
        return dict(zip(values, stacked.tolist(), strict=True))


def join(timeout_s: float) -> World:
    """This process's world: that of torchrun where it was started by it, else itself alone."""
    if "RANK" not in os.environ:
        return World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    if not distributed.is_initialized():
        distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    processes = distributed.get_world_size()
    mesh = init_device_mesh(device.type, (processes,), mesh_dim_names=("data",))
    return World(distributed.get_rank(), processes, device, mesh)


def leave(world: World) -> None:
    """Close what `join` opened."""
    if world.mesh is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def shard(task: Task, world: World, parallel: Parallel) -> None:
    """For FSDP2: spread the parameters of each unit, and of the rest, over the processes."""
    if world.mesh is None or parallel != "fsdp2":
        return
    if type(task.model).forward is nn.Module.forward:
        raise ValueError(
            "loop.parallel=fsdp2 is for a model that is called as one; the parts of this one are called by turns: ddp"
        )
    from torch.distributed.fsdp import fully_shard

    task.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 takes no other
    for unit in task.units():
        fully_shard(unit, mesh=world.mesh)
    fully_shard(task.model, mesh=world.mesh)


def replicate(turns: Sequence[Turn], world: World, parallel: Parallel) -> list[nn.Module]:
    """The turns' objectives, as they are to be called; for DDP each wrapped, so that gradients are averaged."""
    if world.mesh is None or parallel != "ddp":
        return [turn.objective for turn in turns]
    ids = [world.device.index] if world.device.type == "cuda" else None
    return [nn.parallel.DistributedDataParallel(turn.objective, device_ids=ids) for turn in turns]


def clip(parameters: Sequence[nn.Parameter], most: float) -> torch.Tensor:
    """Scale gradients down to a norm of at most `most`, over all shards; returns the norm before.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip([weight], 1.0).item(), weight.grad.norm().item() < 1.0001
    (5.0, True)
    """
    from torch.distributed.tensor import DTensor

    norm = nn.utils.clip_grad_norm_(parameters, most)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
