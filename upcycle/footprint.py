"""What a training step keeps in memory beside weights and moments: the step itself, traced without any storage.

Under FakeTensorMode tensors have shapes, dtypes and lifetimes but no values, so a model of any family and size is built and
run forward and backward in seconds, and what is alive at once is counted rather than estimated by a formula: what autograd
saves, autocast's bf16 copies of weights, logits, and what a recomputation of checkpointed layers holds.
"""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, masking_utils

from upcycle.config import TrainConfig
from upcycle.cpu_kernels import SORTED_MM, use_cpu_kernels
from upcycle.modeling import RoutedExperts
from upcycle.optim import set_trainable
from upcycle.phases import plan_phases
from upcycle.sharded import decoder_layers
from upcycle.team import PARTITIONED
from upcycle.train import Objective, checkpointing_options


@dataclass(frozen=True)
class Footprint:
    """One micro-batch's forward and backward. Bytes; of a run with several phases each figure is the largest.

    activations: what is alive at once at most, weights and finished gradients apart. shapes: of every parameter. buffers: of those that
    are part of a checkpoint. layers: elements of each decoder layer. trained: the parameters of the phase that trains most of them;
    ever_trained: that any phase trains.
    """

    activations: int
    shapes: Mapping[str, tuple[int, ...]]
    buffers: int
    layers: Mapping[int, int]
    trained: tuple[str, ...]
    ever_trained: tuple[str, ...]

    def numel(self, names: Iterable[str] | None = None) -> int:
        """Of these parameters together, or of all."""
        return sum(math.prod(self.shapes[name]) for name in (self.shapes if names is None else names))


class DependsOnValues(Exception):
    """What a step keeps is not known from shapes: weights are merged once for each decision, and how many there are only values say."""


GROUPED_MM = torch.ops.aten._grouped_mm.default


def _grouped_mm(left: torch.Tensor, right: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
    """Its rule for tensors without values knows bf16 alone, though its kernels know more."""
    return GROUPED_MM(left.bfloat16(), right.bfloat16(), *rest, **options).to(left.dtype)


class Alive(TorchDispatchMode):
    """Counts the storages that are made inside, until they go. Bytes."""

    def __init__(self, apart: nn.Module):
        super().__init__()
        self.now = self.gradients = self.activations = 0
        self._hooks: list[Any] = []
        # Kept by their storages' ids, which stay theirs as long as the model, which is outside, holds them.
        self._seen: dict[int, Any] = {
            id(one.untyped_storage()): None for one in (*apart.parameters(), *apart.buffers())
        }
        for parameter in apart.parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._gradient_done))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = _grouped_mm(*args, **(kwargs or {})) if func is GROUPED_MM else func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.activations = max(self.activations, self.now - self.gradients)

    def over(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _gradient_done(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()


@contextmanager
def _without_storage(config: PretrainedConfig, cpu: bool) -> Iterator[Any]:
    """The model, as modules without values, and a place to run it. cpu: with the kernels of training there."""
    # That positions are those of one text a row, only values say; without it transformers builds masks, and kernels other tensors.
    unpacked = mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda *given, **named: None)
    with FakeTensorMode(allow_non_fake_inputs=True), unpacked, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would warn of, the stage itself will
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
        if cpu:
            use_cpu_kernels(model)
        if model.config._experts_implementation == SORTED_MM:  # how many tokens an expert has, only values say
            model.set_experts_implementation("grouped_mm")
        for module in model.modules():
            if isinstance(module, RoutedExperts):
                module.sparse = False  # how many places are taken, only values say
        yield model


def footprint(config: PretrainedConfig, train: TrainConfig, strategy: str = "single", cpu: bool = False) -> Footprint:
    """Of one micro-batch of `train` on a model of this config, in its precision, phases and checkpointing, on CPUs or GPUs.

    Where routers leave places empty, all of them are counted as taken. Raises ValueError: see `optim.trainable_names`.
    """
    with _without_storage(config, cpu) as model:
        if train.gradient_checkpointing:
            model.activation_checkpointing_enable(checkpointing_options(strategy))
        model.train()
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        size = {name: math.prod(shape) for name, shape in shapes.items()}
        kept = set(model.state_dict())
        buffers = sum(one.nbytes for name, one in model.named_buffers() if name in kept)
        layers = {
            number: sum(parameter.numel() for parameter in layer.parameters())
            for number, layer in enumerate(decoder_layers(model))
        }
        trained, traces = [], []
        for phase in dict.fromkeys(phase.config for phase in plan_phases(train)):
            set_trainable(model, phase)
            trained.append([name for name, parameter in model.named_parameters() if parameter.requires_grad])
            objective = Objective(model, train.precision, 1, whole=strategy not in PARTITIONED)
            traces.append(_traced(objective, train.micro_batch_sequences, train.sequence_length))
    return Footprint(
        activations=max(trace.activations for trace in traces),
        shapes=shapes,
        buffers=buffers,
        layers=layers,
        trained=tuple(max(trained, key=lambda names: sum(size[name] for name in names))),
        ever_trained=tuple(name for name in shapes if any(name in names for names in trained)),
    )


def _traced(objective: Objective, sequences: int, length: int) -> Alive:
    """A forward with its losses, and where gradients are recorded the backward."""
    alive = Alive(objective.model)
    tokens, domains = torch.zeros(sequences, length, dtype=torch.long), torch.zeros(2, sequences, dtype=torch.long)
    count = torch.tensor(sequences * length)
    try:
        with alive:
            loss = objective(tokens, domains, count, count, 0)["loss"]
            if torch.is_grad_enabled():
                loss.backward()
    except (DataDependentOutputException, DynamicOutputShapeException):
        raise DependsOnValues from None
    alive.over()
    return alive


def forward_bytes(config: PretrainedConfig, sequences: int, length: int, precision: str) -> tuple[int, int]:
    """(weights in fp32, the most that is alive at once beside them) of a forward without a graph, with its losses."""
    with _without_storage(config, cpu=False) as model, torch.no_grad():
        model.eval()
        weights = sum(parameter.nbytes for parameter in model.parameters())
        alive = _traced(Objective(model, precision, 1).eval(), sequences, length)
    return weights, alive.activations
