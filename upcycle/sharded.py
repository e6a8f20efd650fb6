"""FSDP2: every rank holds a part of each weight, gradient and moment (torch.distributed.fsdp.fully_shard)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from upcycle.engine import MOMENTS, WEIGHT, Part, PlainEngine, Ranges, Saved, cut, fill, local_of
from upcycle.families import family_of
from upcycle.modeling import UpcycledForCausalLM
from upcycle.optim import build_optimizer
from upcycle.team import Team


def sharded(root: nn.Module, model: nn.Module, team: Team) -> Any:
    """Cut the weights of `root` over the team, in place: each decoder layer of `model` in it, and the rest; the mesh.

    `root` is what is called; every rank must call it equally often.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    def placement(parameter: nn.Parameter) -> Shard:
        shape = parameter.shape
        if parameter.dim() < 3 or shape[0] % team.size == 0:
            return Shard(0)
        even = [dim for dim in range(1, parameter.dim()) if shape[dim] % team.size == 0]  # FSDP2 wants that past dim 0
        return Shard(even[0] if even else 0)

    mesh = init_device_mesh(team.device.type, (team.size,))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, shard_placement_fn=placement)
    fully_shard(root, mesh=mesh, shard_placement_fn=placement)
    return mesh


class ShardedEngine(PlainEngine):
    """FSDP2 (torch.distributed.fsdp.fully_shard): every rank holds a part of each weight, gradient and moment.

    Differs from Accelerate's and transformers' use of it: the whole objective is the root, because the loss calls the
    decoder and the head by themselves; and a stack of fewer experts than ranks is cut along its rows, not along its
    experts, or all but a few ranks would hold nothing of them.
    """

    def _prepare(self) -> None:
        self.mesh = sharded(self.objective, self.model, self.team)
        self.module = self.objective
        self.optimizer = build_optimizer(self.model, self.config)

    def _ranges(self, parameter: Any) -> Ranges:
        """Where this rank's part lies in the flattened whole: one range, or one for each index before the cut dim."""
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, placements = parameter.shape, parameter.placements
        local, offset = compute_local_shape_and_global_offset(shape, self.mesh, placements)
        dim = placements[0].dim
        inner, outer = shape[dim + 1 :].numel(), shape[:dim].numel()
        return [
            ((index * shape[dim] + offset[dim]) * inner, (index * shape[dim] + offset[dim] + local[dim]) * inner)
            for index in range(outer)
            if local[dim]
        ]

    def _local_mask(self, mask: Tensor, parameter: Any) -> Tensor:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        local, offset = compute_local_shape_and_global_offset(parameter.shape, self.mesh, parameter.placements)
        for dim, (size, start) in enumerate(zip(local, offset, strict=True)):
            if mask.shape[dim] > 1:
                mask = mask.narrow(dim, start if size else 0, size)
        return mask.to(local_of(parameter).device)

    def weights(self) -> Iterator[Part]:
        for name, parameter in self.model.named_parameters():
            yield from cut(name, WEIGHT, local_of(parameter), self._ranges(parameter))

    def moments(self) -> Iterator[Part]:
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if key in MOMENTS:
                    yield from cut(name, key, local_of(value), self._ranges(parameter))
                elif self.team.leads:
                    yield Part(name, key, 0, local_of(value).flatten())

    def load_weights(self, saved: Saved) -> None:
        for name, parameter in self.model.named_parameters():
            ranges = self._ranges(parameter)
            fill(local_of(parameter), ranges, lambda start, stop, name=name: saved.read(name, WEIGHT, start, stop))

    def _fill(self, moment: Tensor, parameter: nn.Parameter, read: Callable[[int, int], Tensor]) -> None:
        fill(local_of(moment), self._ranges(parameter), read)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach().full_tensor()  # pyright: ignore[reportAttributeAccessIssue]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a dense model or a mixture."""
    mixture = isinstance(model, UpcycledForCausalLM)
    decoder: Any = model.model.decoder if mixture else model.base_model
    return getattr(decoder, family_of(decoder.config).layers)
