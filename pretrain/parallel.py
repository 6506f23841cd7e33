"""Where parameters live: sharding over ranks, activation checkpointing and compilation, as plain functions on blocks.

One rank is not wrapped at all. With several, `replicate` keeps a whole copy on each (FSDP2 on a mesh of (ranks, 1):
every gathering is of one rank's own) and `full` shards parameters, gradients and optimizer state over all. Weights are
made whole on the CPU, from the seed alone, and then copied to where they live, so any number of ranks and any device
starts from the same numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from launch.distributed import World
from launch.settings import Settings

__all__ = [
    "ParallelSettings",
    "compile_blocks",
    "fill",
    "initialised",
    "make_mesh",
    "place",
    "recompute_blocks",
    "reduce_gradients",
    "shard",
]


class ParallelSettings(Settings):
    """How the model is spread over ranks and how its blocks are run."""

    sharding: Literal["replicate", "full"] = Field(
        "replicate", description="full: shard weights over ranks, for models above 1 B parameters"
    )
    compile: bool = Field(False, description="compile each block; a minute at the start, for GPUs")
    recompute: bool = Field(
        False, description="recompute activations of each block in the backward pass: less memory, a third more time"
    )


def _blocks(part: nn.Module) -> Iterable[nn.Module]:
    """The transformer blocks of a backbone; none in a head."""
    blocks = getattr(part, "blocks", ())
    return blocks if isinstance(blocks, nn.ModuleList) else ()


def recompute_blocks(part: nn.Module) -> None:
    """Keep only the inputs of each block and recompute it in the backward pass; parameter names stay as they are."""
    for block in _blocks(part):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(part: nn.Module) -> None:
    """Compile each block in place: the blocks share one graph, the model around them stays eager."""
    for block in _blocks(part):
        block.compile()


def make_mesh(world: World, settings: ParallelSettings) -> DeviceMesh | None:
    """The ranks as FSDP2 takes them; it opens process groups, so make one for all networks of a run. One rank: None."""
    if world.size == 1:
        return None
    if settings.sharding == "full":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (world.size, 1), mesh_dim_names=("replicate", "shard"))


def shard(
    parts: nn.ModuleDict,
    world: World,
    settings: ParallelSettings,
    frozen: bool = False,
    mesh: DeviceMesh | None = None,
) -> None:
    """Shard each part (backbone, heads) over all ranks, each of its blocks by itself; does nothing with one rank.

    The parts are called one by one, so each is a root; the dict around them is not. A frozen network sees no backward
    pass after which its shards would be put back, so they are after each forward pass. Several networks share one
    `mesh`; a network alone may leave it out.
    """
    if mesh is None:
        mesh = make_mesh(world, settings)
    if mesh is None:
        return
    reshard = frozen or settings.sharding == "full"
    for part in parts.values():
        for block in _blocks(part):
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard)


def reduce_gradients(student: nn.Module, now: bool) -> None:
    """Whether the coming backward pass adds the gradients of copies on other ranks, or leaves that to a later one.

    Shards of one copy are always added up, since whole gradients are what sharding is to avoid. Unsharded: nothing.
    """
    for module in student.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(now, recurse=False)


def initialised(part: nn.Module, seed: int) -> dict[str, Tensor]:
    """Give the state of `part` (built on the meta device) freshly initialised from `seed`, on the CPU.

    Every number is NaN until `init_weights` writes it, so a forgotten parameter is found here.
    """
    place(part, torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        part.init_weights()  # type: ignore[operator]
    state = part.state_dict()
    forgotten = [name for name, tensor in state.items() if tensor.is_floating_point() and tensor.isnan().any()]
    assert not forgotten, f"init_weights of {type(part).__name__} leaves {forgotten} unset"
    return state


def place(part: nn.Module, device: torch.device) -> None:
    """Give a module that is on the meta device memory on `device`, all NaN until `fill`."""
    part.to_empty(device=device)
    with torch.no_grad():
        for tensor in [*part.parameters(), *part.buffers()]:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))


@torch.no_grad()
def fill(part: nn.Module, state: Mapping[str, Any]) -> None:
    """Copy whole tensors into a module, sharded or not; every rank brings all of `state`, with the module's keys."""
    own = part.state_dict()
    assert own.keys() == state.keys(), f"keys differ: {sorted(own.keys() ^ state.keys())}"
    for name, tensor in own.items():
        whole = state[name].to(tensor.device, tensor.dtype)
        if isinstance(tensor, DTensor):
            tensor.copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None))
        else:
            tensor.copy_(whole)
