"""How a process takes one optimizer step, and what it holds of the state: alone, or with others by DDP.

Engines have the same methods: `PlainEngine` here, `ShardedEngine` (sharded.py, FSDP2) and `ZeroEngine` (zero.py, DeepSpeed).
Whatever an engine holds is named as flat ranges of named tensors (`Part`), so that a snapshot written under one strategy
and rank count is read under any other (snapshot.py).
Every engine averages gradients over ranks, hence the factor `size` on every loss: losses here are sums (losses.py).
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from upcycle.config import PhaseConfig, TrainConfig
from upcycle.optim import build_optimizer, group_of, set_learning_rate, set_trainable
from upcycle.team import Team

WEIGHT, STEP = "weight", "step"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, beside its count of steps
WATCHED = ("router", "experts")  # groups whose gradients are reported apart from the rest
NO_MASKS: Mapping[str, Tensor] = {}


class Part(NamedTuple):
    """`values` are the elements [start, start + len(values)) of tensor `name`, flattened; `key` says which of its tensors."""

    name: str
    key: str
    start: int
    values: Tensor


class Saved(Protocol):
    """A snapshot, as engines read it (snapshot.Snapshot)."""

    def read(self, name: str, key: str, start: int, stop: int) -> Tensor: ...

    def steps_of(self, name: str) -> float:
        """How often the optimizer has updated that parameter; 0 for never."""
        ...


Ranges = list[tuple[int, int]]  # [start, stop) in the flattened tensor, in the order in which a rank holds them


def cut(name: str, key: str, local: Tensor, ranges: Ranges) -> Iterator[Part]:
    """What a rank holds of a tensor, range by range. local: at least as many elements as the ranges, in their order."""
    offset, flat = 0, local.detach().flatten()
    assert flat.numel() >= sum(stop - start for start, stop in ranges), f"{name}: {key} is not all here"
    for start, stop in ranges:
        yield Part(name, key, start, flat[offset : offset + stop - start])
        offset += stop - start


@torch.no_grad()
def fill(local: Tensor, ranges: Ranges, read: Callable[[int, int], Tensor]) -> None:
    """The inverse of `cut`: put what a snapshot has of each range into `local`, which is contiguous."""
    offset, flat = 0, local.detach().view(-1)
    for start, stop in ranges:
        flat[offset : offset + stop - start].copy_(read(start, stop))
        offset += stop - start


class PlainEngine:
    """Every rank holds all weights, gradients and moments; with several ranks PyTorch's DDP averages the gradients."""

    restarts = False  # whether a new phase needs the state as a snapshot

    def __init__(self, objective: Any, config: TrainConfig, team: Team):
        from accelerate import Accelerator

        self.accelerator: Any = team.accelerator or Accelerator(mixed_precision="no")
        self.objective, self.config, self.team = objective, config, team
        self.model = objective.model
        self._prepare()

    def _prepare(self) -> None:
        self.module: Any = self.objective.to(self.accelerator.device)
        self.optimizer: Any = build_optimizer(self.model, self.config)

    # One step --------------------------------------------------------------------------------------------------------

    def begin(self, phase: PhaseConfig, saved: Saved | None, masks: Mapping[str, Tensor] = NO_MASKS) -> None:
        """Start a phase: train what it trains. saved: the state to go on from; None keeps the present one.

        masks: of parameters that are trained in part, True where they are (slices.phase_masks).
        """
        set_trainable(self.model, phase)
        self._set_masks(masks)
        if saved is not None:
            self._restore_moments(saved)
        if self._wrapped():  # its buckets are made for what trains when it wraps
            self.module = None
            gc.collect()  # the earlier wrapper takes its hooks off the parameters when it goes
            with warnings.catch_warnings():  # torch would have `broadcast_buffers` renamed, which accelerate can't yet
                warnings.simplefilter("ignore", FutureWarning)
                self.module = self.accelerator.prepare_model(self.objective)
            self.accelerator._models.clear()
            if not isinstance(self.module, nn.parallel.DistributedDataParallel):
                raise RuntimeError(f"ddp was asked for, but Accelerate prepared a {type(self.module).__name__}")

    def _wrapped(self) -> bool:
        """Whether PyTorch's DDP averages the gradients; it has nothing to do in a group of one."""
        return self.team.strategy == "ddp" and self.team.size > 1

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        return self.module(*inputs)

    def micro_batch(self, last: bool) -> Any:
        """The context for the forward and backward of one micro-batch; only the last one exchanges gradients."""
        return self.module.no_sync() if self._wrapped() and not last else nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss * self.team.size).backward()

    def step(self, rate: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Clip, update and clear the gradients; (norm of all gradients before clipping, those of WATCHED after it).

        Raises FloatingPointError: the norm is not finite; nothing was updated then.
        """
        for parameter, mask in self.masks.items():
            if parameter.grad is not None:
                local_of(parameter.grad).masked_fill_(~mask, 0.0)
        limit = self.config.optimizer.clip_norm
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        check_finite(norm)
        watched = {group: self._norm_of(group) for group in WATCHED}
        set_learning_rate(self.optimizer, rate)
        self._update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, watched

    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        self.masks: dict[nn.Parameter, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if name in masks and parameter.requires_grad:
                if masks[name].any():
                    self.masks[parameter] = self._local_mask(masks[name], parameter)
                else:
                    parameter.requires_grad_(False)

    def _local_mask(self, mask: Tensor, parameter: nn.Parameter) -> Tensor:
        """The part of a mask that is this rank's part of the parameter, on its device."""
        return mask.to(parameter.device)

    @torch.no_grad()
    def _update(self) -> None:
        """One step of AdamW. A parameter that is trained in part goes through it alone, and then gets back what is not
        trained of its weights and moments: decay and old moments would move it without any gradient."""
        partly = {parameter: parameter.grad for parameter in self.masks if parameter.grad is not None}
        for parameter in partly:
            parameter.grad = None
        self.optimizer.step()
        for parameter, gradient in partly.items():
            state = self.optimizer.state.get(parameter, {})
            tensors = [local_of(tensor) for tensor in (parameter, *(state[key] for key in MOMENTS if key in state))]
            before = [tensor.clone() for tensor in tensors]
            parameter.grad = gradient
            self.optimizer.step()
            parameter.grad = None
            for tensor, kept in zip(tensors, before, strict=True):
                tensor.copy_(torch.where(self.masks[parameter], tensor, kept))

    def _norm_of(self, group: str) -> Tensor:
        gradients = [
            parameter.grad
            for name, parameter in self.model.named_parameters()
            if group_of(name) == group and parameter.grad is not None
        ]
        return whole(torch.nn.utils.get_total_norm(gradients))

    # The state -------------------------------------------------------------------------------------------------------

    def _mine(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that this rank writes, of those that every rank holds whole."""
        for number, (name, parameter) in enumerate(self.model.named_parameters()):
            if number % self.team.size == self.team.rank:
                yield name, parameter

    def weights(self) -> Iterator[Part]:
        for name, parameter in self._mine():
            yield Part(name, WEIGHT, 0, parameter.detach().flatten())

    def buffers(self) -> Iterator[Part]:
        """The buffers that are part of the model (routers' biases); every rank has them whole, the first one writes them."""
        if self.team.leads:
            kept = set(self.model.state_dict())
            for name, buffer in self.model.named_buffers():
                if name in kept:
                    yield Part(name, WEIGHT, 0, buffer.flatten())

    @torch.no_grad()
    def load_buffers(self, saved: Saved) -> None:
        kept = set(self.model.state_dict())
        for name, buffer in self.model.named_buffers():
            if name in kept:
                buffer.copy_(saved.read(name, WEIGHT, 0, buffer.numel()).view_as(buffer))

    def moments(self) -> Iterator[Part]:
        for name, parameter in self._mine():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield Part(name, key, 0, value.flatten())

    @torch.no_grad()
    def load_weights(self, saved: Saved) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(saved.read(name, WEIGHT, 0, parameter.numel()).view_as(parameter))

    def _restore_moments(self, saved: Saved) -> None:
        self.optimizer.state.clear()
        for name, parameter in self.model.named_parameters():
            if steps := saved.steps_of(name):
                state = {STEP: torch.tensor(steps, device=parameter.device)}  # where the fused update wants it
                for key in MOMENTS:
                    state[key] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                    self._fill(state[key], parameter, lambda start, stop, at=(name, key): saved.read(*at, start, stop))
                self.optimizer.state[parameter] = state

    def _fill(self, moment: Tensor, parameter: nn.Parameter, read: Callable[[int, int], Tensor]) -> None:
        fill(moment, [(0, parameter.numel())], read)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole, one after the other; all ranks must go through them together."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def optimizer_bytes(self) -> int:
        """Of the moments that this rank holds, padding included."""
        return bytes_of(value for state in self.optimizer.state.values() for value in state.values())

    def close(self) -> None:
        """Let go of everything that later stages of this process must not find."""
        self.module = None
        gc.collect()


def bytes_of(tensors: Iterable[Any]) -> int:
    """What this rank holds of tensors, counts of steps left out."""
    local = [local_of(tensor) for tensor in tensors if tensor.dim()]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def local_of(tensor: Any) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(value: Any) -> Tensor:
    """A scalar that may be spread over ranks, as one everywhere."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def check_finite(norm: Tensor) -> None:
    if not torch.isfinite(norm):
        raise FloatingPointError(f"gradient norm {norm.item()}")
