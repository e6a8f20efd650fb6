"""How a group of processes takes one optimizer step, and which part of the state each of them holds.

Three engines with the same methods: `PlainEngine` (one process, or DDP), `ShardedEngine` (FSDP2) and `ZeroEngine`
(DeepSpeed ZeRO 1 to 3). Whatever an engine holds is named as flat ranges of named tensors (`Part`), so that a snapshot
written under one strategy and rank count is read under any other (snapshot.py).
Every engine averages gradients over ranks, hence the factor `size` on every loss: losses here are sums (losses.py).
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from upcycle.config import PhaseConfig, TrainConfig
from upcycle.families import family_of
from upcycle.modeling import RoutedExperts, UpcycledForCausalLM
from upcycle.optim import build_optimizer, group_of, set_learning_rate, set_trainable
from upcycle.team import Team

WEIGHT, STEP = "weight", "step"
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, beside its count of steps


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


@contextmanager
def partitioned_loading(team: Team) -> Iterator[None]:
    """In here transformers' `from_pretrained` loads straight into ZeRO-3's partitions, where that is the strategy."""
    if team.strategy != "zero3":
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    set_hf_deepspeed_config(team.accelerator.deepspeed_plugin.dschf)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


class PlainEngine:
    """Every rank holds all weights, gradients and moments; with several ranks PyTorch's DDP averages the gradients."""

    restarts = False  # whether a new phase needs the state as a snapshot

    def __init__(self, objective: Any, config: TrainConfig, team: Team):
        from accelerate import Accelerator

        self.accelerator = team.accelerator or Accelerator(mixed_precision="no")
        self.objective, self.config, self.team = objective.to(self.accelerator.device), config, team
        self.model = objective.model
        self.names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self._prepare()

    def _prepare(self) -> None:
        self.module: Any = self.objective
        self.optimizer = build_optimizer(self.model, self.config)

    # One step --------------------------------------------------------------------------------------------------------

    def begin(self, phase: PhaseConfig, saved: Saved | None) -> None:
        """Start a phase: train what it trains. saved: the state to go on from; None keeps the present one."""
        set_trainable(self.model, phase)
        if saved is not None:
            self._restore_moments(saved)
        if self.team.strategy == "ddp":  # its buckets are made for what trains when it wraps
            self.module = None
            gc.collect()  # the earlier wrapper takes its hooks off the parameters when it goes
            with warnings.catch_warnings():  # torch would have `broadcast_buffers` renamed, which accelerate can't yet
                warnings.simplefilter("ignore", FutureWarning)
                self.module = self.accelerator.prepare_model(self.objective)
            self.accelerator._models.clear()
            if self.team.size > 1 and not isinstance(self.module, nn.parallel.DistributedDataParallel):
                raise RuntimeError(f"ddp was asked for, but Accelerate prepared a {type(self.module).__name__}")

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        return self.module(*inputs)

    def micro_batch(self, last: bool) -> Any:
        """The context for the forward and backward of one micro-batch; only the last one exchanges gradients."""
        return nullcontext() if last or self.team.strategy != "ddp" else self.module.no_sync()

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss * self.team.size).backward()

    def step(self, rate: float) -> tuple[Tensor, Tensor]:
        """Clip, update and clear the gradients; (norm of all gradients before clipping, of the routers' after it).

        Raises FloatingPointError: the norm is not finite; nothing was updated then.
        """
        limit = self.config.optimizer.clip_norm
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        check_finite(norm)
        routers = self._router_norm()
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, routers

    def _router_norm(self) -> Tensor:
        squares = [
            whole(parameter.grad.square().sum())
            for name, parameter in self.model.named_parameters()
            if group_of(name) == "router" and parameter.grad is not None
        ]
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())

    # The state -------------------------------------------------------------------------------------------------------

    def _mine(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that this rank writes, of those that every rank holds whole."""
        for number, (name, parameter) in enumerate(self.model.named_parameters()):
            if number % self.team.size == self.team.rank:
                yield name, parameter

    def weights(self) -> Iterator[Part]:
        for name, parameter in self._mine():
            yield Part(name, WEIGHT, 0, parameter.detach().flatten())

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
                state = {STEP: torch.tensor(steps)}
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
        """Of the moments that this rank holds."""
        return sum(part.values.numel() * part.values.element_size() for part in self.moments() if part.key in MOMENTS)

    def close(self) -> None:
        """Let go of everything that later stages of this process must not find."""
        self.module = None
        gc.collect()


def whole(value: Any) -> Tensor:
    """A scalar that may be spread over ranks, as one everywhere."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def check_finite(norm: Tensor) -> None:
    if not torch.isfinite(norm):
        raise FloatingPointError(f"gradient norm {norm.item()}")


class ShardedEngine(PlainEngine):
    """FSDP2 (torch.distributed.fsdp.fully_shard): every rank holds a part of each weight, gradient and moment.

    Differs from Accelerate's and transformers' use of it: the whole objective is the root, because the loss calls the
    decoder and the head by themselves; and a stack of fewer experts than ranks is cut along its rows, not along its
    experts, or all but a few ranks would hold nothing of them.
    """

    def _prepare(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        self.mesh = init_device_mesh(self.accelerator.device.type, (self.team.size,))
        options: dict[str, Any] = {"mesh": self.mesh, "shard_placement_fn": self._placement}
        for layer in decoder_layers(self.model):
            fully_shard(layer, **options)
        self.module = fully_shard(self.objective, **options)
        if not isinstance(self.module, FSDPModule):
            raise RuntimeError(f"fsdp2 was asked for, but the objective is a {type(self.module).__name__}")
        self.names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.optimizer = build_optimizer(self.model, self.config)

    def _placement(self, parameter: nn.Parameter) -> Any:
        from torch.distributed.tensor import Shard

        size, shape = self.team.size, parameter.shape
        if parameter.dim() < 3 or shape[0] % size == 0:
            return Shard(0)
        even = [dim for dim in range(1, parameter.dim()) if shape[dim] % size == 0]  # FSDP2 wants that past dim 0
        return Shard(even[0] if even else 0)

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


def local_of(tensor: Any) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a dense model or a mixture."""
    mixture = isinstance(model, UpcycledForCausalLM)
    decoder: Any = model.model.decoder if mixture else model.base_model
    return getattr(decoder, family_of(decoder.config).layers)


class ZeroEngine(PlainEngine):
    """DeepSpeed ZeRO: optimizer state (1), gradients too (2) and weights too (3) are partitioned (arXiv:1910.02054).

    DeepSpeed lays the trainable parameters out when it starts, so every phase starts it anew from a snapshot. Moments of
    parameters that a phase leaves alone are kept aside (`parked`) until a phase trains them again.
    """

    restarts = True
    engine: Any = None

    def _prepare(self) -> None:
        self.stage = int(self.team.strategy[-1])
        self.parked: list[Part] = []

    def begin(self, phase: PhaseConfig, saved: Saved | None) -> None:
        from deepspeed import DeepSpeedEngine
        from deepspeed.utils import set_z3_leaf_modules

        self.close()
        set_trainable(self.model, phase)
        if self.stage == 3:
            set_z3_leaf_modules(self.model, [RoutedExperts], raise_if_not_found=False)
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        # One count of updates serves a whole flat buffer, so only parameters with the same count may share one.
        counts = {name: saved.steps_of(name) if saved else 0 for name in names}
        optimizer = build_optimizer(self.model, self.config, counts)
        self._configure()
        self.engine, wrapped = self.accelerator.prepare(self.objective, optimizer)
        self.optimizer = wrapped.optimizer if hasattr(wrapped, "optimizer") else wrapped
        if not isinstance(self.engine, DeepSpeedEngine) or self.engine.zero_optimization_stage() != self.stage:
            raise RuntimeError(
                f"{self.team.strategy} was asked for, but Accelerate prepared {type(self.engine).__name__}"
            )
        if saved is not None:
            self._restore_moments(saved)

    def _configure(self) -> None:
        """What DeepSpeed must know of this run; the rest is the launch file's."""
        config, plugin = self.config, self.accelerator.deepspeed_plugin
        accumulated = config.batch_sequences // (self.team.size * config.micro_batch_sequences)
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.micro_batch_sequences,
            "gradient_accumulation_steps": accumulated,
            "train_batch_size": config.batch_sequences,
            "gradient_clipping": config.optimizer.clip_norm,  # unsaid, it would be 1.0
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # offloaded moments are updated by the same AdamW
            "steps_per_print": 2**31,
        }
        self.accelerator.gradient_accumulation_steps = accumulated

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        return self.engine(*inputs)

    def micro_batch(self, last: bool) -> Any:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.backward(loss * self.team.size, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts the micro-batch; updates nothing before the last one

    def step(self, rate: float) -> tuple[Tensor, Tensor]:
        set_learning_rate(self.optimizer, rate)
        squares = self._router_squares()
        self.engine.step()
        norm = torch.as_tensor(float(self.engine.get_global_grad_norm()))
        check_finite(norm)
        routers = sum(self.team.gather(squares)) ** 0.5
        clipped = min(1.0, self.config.optimizer.clip_norm / (norm.item() + 1e-6))
        return norm, torch.tensor(routers * clipped)

    def _router_squares(self) -> float:
        """Sum of squares of this rank's part of the routers' gradients, which are gone after the step."""
        total = 0.0
        for name, parameter in self.model.named_parameters():
            if (
                group_of(name) == "router"
                and parameter.requires_grad
                and (part := self._gradient(parameter)) is not None
            ):
                total += part.float().square().sum().item()
        return total

    def _gradient(self, parameter: Any) -> Tensor | None:
        if self.stage == 3:
            return parameter._z3_optimizer.get_local_fp32_grad_for_param(parameter)
        mapping = parameter._hp_mapping
        return None if mapping is None else mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    def _zero3_ranges(self, parameter: Any) -> Ranges:
        size = parameter.ds_tensor.numel()
        start = min(self.team.rank * size, parameter.ds_numel)
        stop = min(start + size, parameter.ds_numel)
        return [(start, stop)] if stop > start else []

    def weights(self) -> Iterator[Part]:
        if self.stage < 3:
            yield from super().weights()
            return
        for name, parameter in self.model.named_parameters():
            yield from cut(name, WEIGHT, self._zero3_weights(parameter), self._zero3_ranges(parameter))

    def _zero3_weights(self, parameter: Any) -> Tensor:
        """This rank's part; DeepSpeed may have put it on a disk."""
        if parameter.requires_grad and self.engine is not None:
            return parameter._z3_optimizer.get_local_fp32_param(parameter)
        return parameter.ds_tensor

    @torch.no_grad()
    def load_weights(self, saved: Saved) -> None:
        for name, parameter in self.model.named_parameters():
            if hasattr(parameter, "ds_tensor"):
                ranges = self._zero3_ranges(parameter)
                fill(parameter.ds_tensor, ranges, lambda start, stop, name=name: saved.read(name, WEIGHT, start, stop))
            else:
                parameter.copy_(saved.read(name, WEIGHT, 0, parameter.numel()).view_as(parameter))

    def _held(self) -> Iterator[tuple[str, Ranges, Tensor, slice]]:
        """Each trained parameter of which this rank updates a part: the part's ranges, and the flat buffer it lies in."""
        optimizer = self.engine.optimizer
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.stage == 3:
                group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
                flat, ranges = optimizer.fp32_partitioned_groups_flat[group], self._zero3_ranges(parameter)
            elif parameter._hp_mapping is None:  # wholly another rank's
                continue
            else:
                mapping = parameter._hp_mapping
                flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                ranges, offset = [(start, start + length)], mapping.hp_fragment_address.start

            if ranges:
                yield name, ranges, flat, slice(offset, offset + length)

    def moments(self) -> Iterator[Part]:
        for name, ranges, flat, inside in self._held():
            if state := self.optimizer.state.get(flat):
                for key in MOMENTS:
                    yield from cut(name, key, state[key][inside], ranges)
                if ranges[0][0] == 0:
                    yield Part(name, STEP, 0, state[STEP].reshape(1).clone())  # of the whole buffer
        yield from self.parked

    def _restore_moments(self, saved: Saved) -> None:
        self.parked = []
        for name, parameter in self._mine():
            if not parameter.requires_grad and (count := saved.steps_of(name)):
                size = getattr(parameter, "ds_numel", parameter.numel())
                self.parked += [Part(name, key, 0, saved.read(name, key, 0, size)) for key in MOMENTS]
                self.parked.append(Part(name, STEP, 0, torch.tensor([count])))
        for name, ranges, flat, inside in self._held():
            if not (count := saved.steps_of(name)):
                continue
            state = self.optimizer.state[flat]  # a defaultdict
            if not state:
                state |= {STEP: torch.tensor(count)} | {key: torch.zeros_like(flat) for key in MOMENTS}
            for key in MOMENTS:
                fill(state[key][inside], ranges, lambda start, stop, at=(name, key): saved.read(*at, start, stop))

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        if self.stage < 3:
            yield from super().full_weights()
            return
        from deepspeed.runtime.zero import GatheredParameters

        for name, parameter in self.model.named_parameters():
            with GatheredParameters([parameter]):
                yield name, parameter.detach()

    def close(self) -> None:
        if self.engine is not None:
            self.engine.destroy()
            self.engine = self.optimizer = None
            self.accelerator.free_memory()


ENGINES = {
    "single": PlainEngine, "ddp": PlainEngine, "fsdp2": ShardedEngine,
    "zero1": ZeroEngine, "zero2": ZeroEngine, "zero3": ZeroEngine,
}  # fmt: skip
