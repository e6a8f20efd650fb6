"""DeepSpeed ZeRO 1, 2 and 3 (arXiv:1910.02054). The only file that knows DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from upcycle.config import PhaseConfig
from upcycle.engine import (
    MOMENTS,
    NO_MASKS,
    STEP,
    WATCHED,
    WEIGHT,
    Part,
    PlainEngine,
    Ranges,
    Saved,
    bytes_of,
    check_finite,
    cut,
    fill,
)
from upcycle.modeling import StackedExperts
from upcycle.optim import build_optimizer, group_of, set_learning_rate, set_trainable
from upcycle.team import Team


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

    def begin(self, phase: PhaseConfig, saved: Saved | None, masks: Mapping[str, Tensor] = NO_MASKS) -> None:
        assert not masks, "phases.check_strategy refuses them"
        from deepspeed import DeepSpeedEngine
        from deepspeed.utils import set_z3_leaf_modules

        self.close()
        set_trainable(self.model, phase)
        if self.stage == 3:
            set_z3_leaf_modules(self.model, [StackedExperts], raise_if_not_found=False)
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

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        return self.engine(*inputs)

    def micro_batch(self, last: bool) -> Any:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.backward(loss * self.team.size, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts the micro-batch; updates nothing before the last one

    def step(self, rate: float) -> tuple[Tensor, dict[str, Tensor]]:
        set_learning_rate(self.optimizer, rate)
        squares = self._squares()
        self.engine.step()
        norm = torch.as_tensor(float(self.engine.get_global_grad_norm()))
        check_finite(norm)
        everyone = self.team.gather(squares)
        clipped = min(1.0, self.config.optimizer.clip_norm / (norm.item() + 1e-6))
        return norm, {group: torch.tensor(sum(one[group] for one in everyone) ** 0.5 * clipped) for group in WATCHED}

    def _squares(self) -> dict[str, float]:
        """Of each of WATCHED, the sum of squares of this rank's part of its gradients, which are gone after the step."""
        totals: dict[str, float] = dict.fromkeys(WATCHED, 0.0)
        for name, parameter in self.model.named_parameters():
            group = group_of(name)
            if group in WATCHED and parameter.requires_grad and (part := self._gradient(parameter)) is not None:
                totals[group] += part.float().square().sum().item()
        return totals

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
        for name, ranges, flat, inside in self._held():
            yield from cut(name, WEIGHT, self._own(flat[inside]), ranges)
        frozen = [(name, parameter) for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        parameter: Any
        for name, parameter in frozen:
            yield from cut(name, WEIGHT, parameter.ds_tensor, self._zero3_ranges(parameter))

    @torch.no_grad()
    def load_weights(self, saved: Saved) -> None:
        for name, parameter in self.model.named_parameters():
            if hasattr(parameter, "ds_tensor"):
                ranges = self._zero3_ranges(parameter)
                fill(parameter.ds_tensor, ranges, lambda start, stop, name=name: saved.read(name, WEIGHT, start, stop))
            else:
                parameter.copy_(saved.read(name, WEIGHT, 0, parameter.numel()).view_as(parameter))

    def _held(self) -> Iterator[tuple[str, Ranges, Tensor, slice]]:
        """Each trained parameter of which this rank updates a part: the part's ranges, and the flat buffer it lies in.

        A buffer that DeepSpeed keeps on a disk is in memory until the next one is asked for.
        """
        optimizer, present = self.engine.optimizer, None
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.stage == 3:
                group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
                if group != present:
                    self._to_disk(present)
                    self._to_memory(group)
                    present = group
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
        self._to_disk(present)

    def _on_disk(self, group: int | None) -> bool:
        return group is not None and self.engine.optimizer._swappable_optimizer_subgroup(group)

    def _to_memory(self, group: int | None) -> None:
        if self._on_disk(group):
            self.engine.optimizer._optimizer_states_and_gradient_swap_in(group)

    def _to_disk(self, group: int | None) -> None:
        if self._on_disk(group):
            self.engine.optimizer._optimizer_states_and_gradient_swap_out(group)

    def _own(self, part: Tensor) -> Tensor:
        """A part that outlives the buffer it is a view of, where buffers go back to a disk."""
        return part.clone() if self.stage == 3 and self.engine.optimizer.swap_optimizer else part

    def moments(self) -> Iterator[Part]:
        for name, ranges, flat, inside in self._held():
            if state := self.optimizer.state.get(flat):
                for key in MOMENTS:
                    yield from cut(name, key, self._own(state[key][inside]), ranges)
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
                state[STEP] = torch.tensor(count, device=flat.device)  # where the fused update wants it
                state |= {key: torch.zeros_like(flat) for key in MOMENTS}
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

    def optimizer_bytes(self) -> int:
        return super().optimizer_bytes() + bytes_of(part.values for part in self.parked if part.key in MOMENTS)

    def close(self) -> None:
        if self.engine is not None:
            self.engine.destroy()
            self.engine = self.optimizer = None
            self.accelerator.free_memory()
