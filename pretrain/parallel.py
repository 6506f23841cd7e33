"""Where parameters live: sharding over ranks, activation checkpointing and compilation, as plain functions on blocks.

One rank is not wrapped at all. With several, the ranks are a grid (copies, ranks that share one copy) for FSDP2:
`replicate` keeps a whole copy on each rank (every gathering is of one rank's own), `full` shards parameters, gradients
and optimizer state over all ranks, `hybrid` over those of one machine, so that only gradients cross between machines.
Weights are made whole on the CPU, from the seed alone, and then copied to where they live, so any number of ranks and
any device starts from the same numbers.

    ParallelError(ValueError)    a number of ranks that cannot be shared out as the settings say
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MethodType
from typing import Any, Literal, cast

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from launch.distributed import World
from launch.settings import Settings
from pretrain.precision import held_in_bf16

__all__ = [
    "ParallelError",
    "ParallelSettings",
    "compile_blocks",
    "fill",
    "initialised",
    "is_compiled",
    "make_mesh",
    "place",
    "place_constant",
    "recompute_blocks",
    "reduce_gradients",
    "shard",
]


Recompute = Literal["none", "blocks", "matmuls"]

# Saved by `matmuls`: what costs most to compute again. A linear layer with bias dispatches addmm, one without mm. Names
# and not operators, because some are missing from some builds of torch, and xformers' until it is first used.
_KEPT = frozenset({
    "aten::mm", "aten::addmm", "aten::_scaled_mm", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward", "xformers_flash::flash_fwd", "xformers_flash3::flash_fwd",
})  # fmt: skip


class ParallelError(ValueError):
    """The ranks there are cannot be shared out as the settings say."""


class ParallelSettings(Settings):
    """How the model is spread over ranks and how its blocks are run."""

    sharding: Literal["replicate", "full", "hybrid"] = Field(
        "replicate",
        description="full: shard weights over all ranks, for models above 1 B parameters; hybrid: over shard_ranks of "
        "them, each such group holding a copy",
    )
    shard_ranks: int | None = Field(
        None, ge=1, description="ranks that share one copy, with hybrid; null: the ranks of one machine"
    )
    teachers: Literal["replicate", "full"] = Field(
        "replicate",
        description="networks that never change (the teachers of multi_teacher): a whole copy on each rank, or sharded "
        "over all of them, for teachers that do not fit; `finetune` has none",
    )
    compile: bool = Field(
        False,
        description="compile each block and head, in `finetune` those of the backbone; minutes at the start, for GPUs",
    )
    recompute: Recompute = Field(
        "none",
        description="what is computed again in the backward pass instead of kept: blocks: all within a block, least "
        "memory, a third more time; matmuls: all but the results of matrix products and attention",
    )

    @field_validator("recompute", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        return {True: "blocks", False: "none"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _belong_together(self) -> ParallelSettings:
        if self.shard_ranks is not None and self.sharding != "hybrid":
            raise ValueError(f"shard_ranks belongs to sharding: hybrid, not {self.sharding}")
        return self


def _blocks(part: nn.Module) -> Sequence[nn.Module]:
    """The transformer blocks of a backbone; none in a head."""
    blocks = getattr(part, "blocks", ())
    return list(blocks) if isinstance(blocks, nn.ModuleList) else ()


def recompute_blocks(part: nn.Module, what: Recompute = "blocks") -> None:
    """Keep less of each block than the backward pass needs and compute the rest again; names stay as they are."""
    runs = {"none": None, "blocks": _recomputed, "matmuls": _recomputed_but_matmuls}
    for block in _blocks(part):
        if (run := runs[what]) is not None:
            # A method, not a closure: the compiler then takes all blocks for one piece of code.
            block.forward = MethodType(run, block)


def _recomputed(block: nn.Module, *given: Any) -> Any:
    return checkpoint(type(block).forward, block, *given, use_reentrant=False)


def _recomputed_but_matmuls(block: nn.Module, *given: Any) -> Any:
    contexts = functools.partial(create_selective_checkpoint_contexts, _kept)
    return checkpoint(type(block).forward, block, *given, use_reentrant=False, context_fn=contexts)


def _kept(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name() in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(part: nn.Module) -> None:
    """Compile each block in place, or a head as a whole: the blocks share their graphs, the model around them is eager.

    A graph is made for the first crop sizes met and one for all others, whatever their number. To be called after
    `recompute_blocks`.
    """
    for module in _blocks(part) or [part]:
        module.forward = torch.compile(module.forward)


def is_compiled(module: nn.Module) -> bool:
    """Whether this very module is one that `compile_blocks` (or `Module.compile`) has compiled."""
    return module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")


def make_mesh(world: World, settings: ParallelSettings) -> DeviceMesh | None:
    """The ranks as FSDP2 takes them; it opens process groups, so make one for all networks of a run. One rank: None.

    Raises ParallelError where the ranks cannot be shared out.
    """
    if world.size == 1:
        return None
    share = {"replicate": 1, "full": world.size}.get(settings.sharding, settings.shard_ranks or world.local_size)
    if world.size % share:
        fitting = ", ".join(str(n) for n in range(1, world.size + 1) if world.size % n == 0)
        raise ParallelError(
            f"parallel.shard_ranks: {share} ranks to a copy do not divide the {world.size} ranks of the run; "
            f"{fitting} do"
        )
    if share == world.size:  # no copies, so no sums over them
        return init_device_mesh(world.device.type, (share,), mesh_dim_names=("shard",))
    return init_device_mesh(world.device.type, (world.size // share, share), mesh_dim_names=("replicate", "shard"))


def shard(
    parts: nn.ModuleDict,
    world: World,
    settings: ParallelSettings,
    frozen: bool = False,
    mesh: DeviceMesh | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Shard each part (backbone, heads) over the ranks, each of its blocks by itself; does nothing with one rank.

    The parts are called one by one, so each is a root; the dict around them is not. A frozen network sees no backward
    pass after which its shards would be put back, so they are after each forward pass. Several networks share one
    `mesh`; a network alone may leave it out. With bf16 the ranks send each other bfloat16 weights and float32
    gradients; inputs are `pretrain.precision.in_bf16`'s to cast.
    """
    if mesh is None:
        mesh = make_mesh(world, settings)
    if mesh is None:
        return
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    apart = mesh.size(mesh.ndim - 1) > 1
    for part in parts.values():
        for module in [*_blocks(part), part]:
            fully_shard(module, mesh=mesh, reshard_after_forward=frozen or apart, mp_policy=policy)
        if apart:
            _prefetch(cast("list[FSDPModule]", [part, *_blocks(part)]))


def _prefetch(modules: Sequence[FSDPModule]) -> None:
    """Gather the weights of the next block while one computes, in both directions."""
    for before, after in pairwise(modules):
        before.set_modules_to_forward_prefetch([after])
    for before, after in pairwise(modules[1:]):
        after.set_modules_to_backward_prefetch([before])


def place_constant(
    parts: nn.ModuleDict, world: World, settings: ParallelSettings, precision: Literal["fp32", "bf16"]
) -> None:
    """Move networks that never change: in the run's precision outright, wrapped only where they are to be sharded."""
    for part in parts.values():
        if precision == "bf16":
            held_in_bf16(part)
        if settings.compile:
            compile_blocks(part)
    if settings.teachers == "full":
        shard(parts, world, ParallelSettings(sharding="full"), frozen=True)
    place(parts, world.device)


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
