"""The one training loop, for branches and mixtures, on Accelerate.

Every rank computes the same global batch from the step number and takes its slice; every loss is a sum divided by the
global count of valid tokens, so accumulation and rank count change nothing. A run goes on from its newest snapshot bit
for bit. Shapes: B batch, S sequence, D hidden, E experts, L layers.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import PreTrainedModel

from upcycle import stopping
from upcycle.batches import Batches
from upcycle.checkpoint import CheckpointWriter
from upcycle.config import TrainConfig
from upcycle.cpu_kernels import use_cpu_kernels
from upcycle.engine import PlainEngine
from upcycle.engines import ENGINES
from upcycle.families import language_model_head
from upcycle.health import health_row, router_health
from upcycle.losses import cross_entropy_sum, next_token_labels
from upcycle.machine import matmul_peak_flops
from upcycle.modeling import UpcycledForCausalLM
from upcycle.optim import learning_rate, phase_at, plan_phases
from upcycle.phases import check_experts, check_ranks, check_strategy
from upcycle.router import Router, RoutingTrace
from upcycle.slices import phase_masks
from upcycle.snapshot import Snapshot, newest_snapshot, save_snapshot
from upcycle.store import Run
from upcycle.team import PARTITIONED, Team

METRICS = "metrics.jsonl"
SHARD_BYTES = 4_000_000_000
BALANCED = 1e-6  # a gap of loads below this is rounding, whose sign depends on how the batch was split


class Objective(nn.Module):
    """A causal LM and its training loss as sums over tokens; the module that Accelerate wraps.

    whole: whether a rank has whole weights also when no module of theirs runs (PARTITIONED strategies do not).
    """

    def __init__(self, model: PreTrainedModel, precision: str, domains: int, whole: bool = True):
        super().__init__()
        self.model, self.precision, self.domains, self.whole = model, precision, domains, whole
        self.mixture = model if isinstance(model, UpcycledForCausalLM) else None

    def forward(
        self, input_ids_BS: Tensor, domains_2B: Tensor, targets: Tensor, tokens: Tensor, step: int
    ) -> dict[str, Tensor]:
        """`loss`, and detached: the sums it is made of and, for mixtures, router health.

        domains_2B: the domain of each sequence, and one drawn for it (Batches.domains). targets, tokens: how many targets and tokens the whole optimizer step has, over all ranks and micro-batches.
        step: optimizer steps taken before this one.
        """
        # bf16 copies of the decoder's weights, all kept until its forward ends, are of use only where the backward takes them from there.
        kept = self.training and not self.model.is_activation_checkpointing
        device, bf16 = input_ids_BS.device.type, self.precision == "bf16"
        with torch.autocast(device, torch.bfloat16, enabled=bf16, cache_enabled=kept):
            trace = RoutingTrace(step=step) if self.mixture else None
            extra = {"trace": trace} if trace else {}
            hidden = self.model.base_model(input_ids=input_ids_BS, use_cache=False, **extra).last_hidden_state
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            labels = next_token_labels(input_ids_BS)
            head, vocabulary = language_model_head(self.model), self.model.config.vocab_size
            linear: Any = self.model.get_output_embeddings()
            weights = tuple(linear.parameters()) if self.whole else ()
            nats, _ = cross_entropy_sum(hidden.flatten(0, 1), head, labels.flatten(), vocabulary, weights)
        parts = {"cross_entropy": nats / targets}
        loss = parts["cross_entropy"]
        if self.mixture and trace:
            for name, value in self.mixture.auxiliary_sums(trace, input_ids_BS).items():
                parts[name] = value / tokens
                loss = loss + self.mixture.auxiliary_coefficients[name] * parts[name]
            parts |= router_health(trace, self.mixture.config, input_ids_BS.numel() / tokens, domains_2B, self.domains)
        return {"loss": loss} | {name: part.detach() for name, part in parts.items()}


@torch.no_grad()
def move_biases(model: Any, totals: dict[str, Tensor], experts: list[int] | None = None) -> None:
    """Balance by selection: b_e += γ · sign(mean load − load_e), once an optimizer step (arXiv:2408.15664, algorithm 1).

    totals: the loads of the whole step, over ranks and micro-batches. A router whose weights do not train now is left alone;
    experts: those whose biases move, None for all.
    """
    routers = {module.name: module for module in model.modules() if isinstance(module, Router)}
    for name, router in routers.items():
        whose = routers[router.logits_of] if router.logits_of else router
        if router.bias is None or whose.weight is None or not whose.weight.requires_grad:
            continue
        part, layer = name.split(".")
        load_E = totals["load" if part == "ffn" else "attention_load"][model.config.routed.index(int(layer))]
        gap_E = load_E.mean() - load_E
        gap_E[gap_E.abs() < BALANCED] = 0.0
        step_E = router.rule.bias_rate * torch.sign(gap_E)
        if experts is None:
            router.bias += step_E
        else:
            router.bias[experts] += step_E[experts]


@dataclass
class Loop:
    """Everything one run needs, ready to step."""

    config: TrainConfig
    engine: PlainEngine
    batches: Batches
    say: Callable[[str], None] = lambda text: None
    experts: list[int] | None = None  # of the present phase

    def __post_init__(self):
        self.phases, self.team = plan_phases(self.config), self.engine.team
        self.device = self.engine.accelerator.device
        if self.device.type == "cpu":
            use_cpu_kernels(self.engine.model)

    def begin(self, step: int, saved: Snapshot | None) -> None:
        """Start, or go on with, the phase that `step` belongs to."""
        phase = phase_at(self.phases, step).config
        masks, shared = phase_masks(self.engine.model, phase)
        if shared:
            self.say(
                f"experts={list(phase.experts)}: {len(shared)} tensors that all experts share train too ({shared[0]}, ...); "
                "freeze them if the other experts are to stay as they are"
            )
        self.engine.begin(phase, saved, masks)
        self.experts = [self.engine.model.config.experts.index(name) for name in phase.experts] or None

    def micro_batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """This rank's share of the global batch, (b, S) at a time, and of each what Batches.domains says, (2, b)."""
        batch, domains = self.batches.batch(step), self.batches.domains(step)
        share, size = len(batch) // self.team.size, self.config.micro_batch_sequences
        mine = slice(self.team.rank * share, (self.team.rank + 1) * share)
        rows, whose = (torch.from_numpy(found).to(self.device) for found in (batch[mine], domains[:, mine]))
        return list(zip(rows.split(size), whose.split(size, dim=1), strict=True))

    def step(self, step: int) -> dict[str, Tensor]:
        """One optimizer step; returns the step's loss parts, summed over micro-batches and ranks.

        Raises FloatingPointError: the loss or the gradient is not finite. Nothing was updated then.
        """
        config, engine = self.config, self.engine
        targets = torch.tensor(config.batch_sequences * (config.sequence_length - 1), device=self.device)
        tokens = torch.tensor(config.batch_tokens, device=self.device)
        totals: dict[str, Tensor] = {}
        micro_batches = self.micro_batches(step)
        for number, (rows, domains) in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with engine.micro_batch(last):
                parts = engine.forward(rows, domains, targets, tokens, step)
                engine.backward(parts["loss"], last)
            for name, part in parts.items():
                totals[name] = totals.get(name, torch.zeros_like(part)) + part.detach()
        totals = summed(totals, self.team)
        try:
            if not torch.isfinite(totals["loss"]):
                raise FloatingPointError(f"loss {totals['loss'].item()}")
            norm, watched = engine.step(learning_rate(config, self.phases, step))
        except FloatingPointError as error:
            raise FloatingPointError(
                f"step {step}, rank {self.team.rank}: {error}; nothing was updated and the last snapshot is kept. "
                "Lower the learning rate or lengthen the warm-up"
            ) from None
        move_biases(engine.model, totals, self.experts)
        norms = {"router_gradient_norm": watched["router"], "expert_gradient_norm": watched["experts"]}
        return totals | {"gradient_norm": norm} | norms


def checkpointing_options(strategy: str) -> dict[str, Any]:
    """For torch.utils.checkpoint. Under ZeRO-3 a frozen weight that a recomputation saves is taken away again before use
    and brought back for it; torch's comparison of shapes would see it empty in between."""
    return {"use_reentrant": False} | ({"determinism_check": "none"} if strategy == "zero3" else {})


def summed(totals: dict[str, Tensor], team: Team) -> dict[str, Tensor]:
    """Each tensor summed over ranks, in one exchange."""
    if team.size == 1:
        return totals
    flat = torch.cat([value.float().flatten() for value in totals.values()])
    torch.distributed.all_reduce(flat)
    pieces = flat.split([value.numel() for value in totals.values()])
    return {name: piece.view(value.shape) for (name, value), piece in zip(totals.items(), pieces, strict=True)}


def train(
    model: PreTrainedModel,
    config: TrainConfig,
    data: dict[str, Path],
    out: Path,
    run: Run,
    train_flops_per_token: float,
    skip_tokens: dict[str, int] | None = None,
) -> PlainEngine:
    """Train `model` in place, saving snapshots under `out`/checkpoints and a row a step in `out`/metrics.jsonl.

    data: token directory of each domain. skip_tokens: how much of each domain's stream earlier stages have used.
    train_flops_per_token: from cost.py, for the share of the machine's peak. Every rank of run.team calls this.
    Returns the engine, which holds what was trained (`write_trained`) until it is closed.
    Raises ValueError: settings that do not fit the data, the model or the ranks. FloatingPointError: see `Loop.step`.
    """
    batches = Batches(
        data, config.proportions, config.sequence_length, config.batch_sequences, config.rng_seed, skip_tokens,
        max_epochs=config.max_epochs,
    )  # fmt: skip
    for warning in batches.check(config.steps):
        run.say(warning)
    check_ranks(config, run.team.size)
    check_strategy(config, run.team.strategy)
    check_experts(config, getattr(model.config, "experts", []))
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable(checkpointing_options(run.team.strategy))
    model.train()
    strategy = run.team.strategy
    objective = Objective(model, config.precision, len(batches.counts), whole=strategy not in PARTITIONED)
    engine = ENGINES[strategy](objective, config, run.team)
    set_seed(config.rng_seed + run.team.rank)  # of dropout: ranks must not drop the same places
    loop = Loop(config, engine, batches, run.say)
    snapshot = newest_snapshot(out / "checkpoints", run.team, run.say)
    if snapshot is not None:
        engine.load_weights(snapshot)
        engine.load_buffers(snapshot)
        snapshot.restore_random_states(run.team)
        run.say(f"going on from step {snapshot.step} of {config.steps}")
    with _MetricsFile(out / METRICS, snapshot.step if snapshot else 0, run.team) as metrics, stopping.looking():
        _run_steps(loop, snapshot, out, run, metrics, train_flops_per_token)
    return engine


def _run_steps(
    loop: Loop, snapshot: Snapshot | None, out: Path, run: Run, metrics: _MetricsFile, train_flops_per_token: float
) -> None:
    config, saved_at, last = loop.config, time.monotonic(), time.monotonic()
    peak = matmul_peak_flops(config.precision, loop.device.type) * run.team.size
    done, starts = snapshot.step if snapshot else 0, {phase.start for phase in loop.phases}
    for step in range(done, config.steps):
        if step == done:
            loop.begin(step, snapshot)
        elif step in starts:
            loop.begin(step, _handed_over(loop, step, out, run) if loop.engine.restarts else None)
        totals = loop.step(step)
        now = time.monotonic()
        rate, last = config.batch_tokens / (now - last), now
        row = _row(totals, step, config, learning_rate(config, loop.phases, step))
        row |= {"tokens_per_second": rate, "peak_share": rate * train_flops_per_token / peak}
        row["train_flops"] = row["tokens"] * train_flops_per_token
        metrics.write(row)
        run.record(row)
        run.advance(step + 1, config.steps, **row)
        by_steps = any(every and (step + 1) % every == 0 for every in (run.checkpoint_steps, run.keep_every))
        by_time = run.checkpoint_seconds and now - saved_at >= run.checkpoint_seconds
        stop = stopping.asked()
        # Clocks differ between ranks, and a signal may reach one of them only.
        if step + 1 < config.steps and run.team.any(bool(by_steps or by_time or stop)):
            metrics.sync()
            save_snapshot(out / "checkpoints", step + 1, loop.engine, run.keep_checkpoints, run.keep_every)
            run.saved()
            saved_at = time.monotonic()
            if run.team.any(stop):
                run.say(
                    f"asked to stop: step {step + 1} of {config.steps} is saved, and the same command goes on from there"
                )
                raise stopping.Stopped


def _handed_over(loop: Loop, step: int, out: Path, run: Run) -> Snapshot:
    """The present state as a snapshot, for an engine that starts anew with every phase."""
    root = out / "checkpoints"
    if not run.team.share((root / f"step-{step:08d}").is_dir()):
        save_snapshot(root, step, loop.engine, run.keep_checkpoints)
    found = newest_snapshot(root, run.team, run.say)
    assert found is not None and found.step == step
    return found


def write_trained(engine: PlainEngine, out: Path) -> None:
    """The trained model as an ordinary Hugging Face directory, the same whatever trained it.

    Tensor by tensor: no rank holds more than one.
    """
    model, team = engine.model, engine.team
    writer = CheckpointWriter(out, SHARD_BYTES) if team.leads else None
    for name, tensor in engine.full_weights():
        if writer:
            writer.add(name, tensor)
    if writer:
        kept = set(model.state_dict())
        for name, tensor in model.named_buffers():
            if name in kept:
                writer.add(name, tensor)
        writer.close()
        model.save_pretrained(out, state_dict={})  # config, generation settings, remote code


def _row(totals: dict[str, Tensor], step: int, config: TrainConfig, rate: float) -> dict:
    """One line of metrics.jsonl. Loss parts in nats a token; of mixtures also `health_row`."""
    row = {"step": step + 1, "tokens": (step + 1) * config.batch_tokens, "lr": rate}
    row |= {name: value.item() for name, value in totals.items() if value.dim() == 0}
    return row | health_row(totals)


class _MetricsFile:
    """metrics.jsonl, cut back to the step that the run goes on from; the first rank's business."""

    def __init__(self, path: Path, done: int, team: Team):
        self._path, self._file = path, None
        if not team.leads:
            return
        kept = []
        if path.is_file():
            lines = path.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= done]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)
        self._file = path.open("a")

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        if self._file:
            self._file.close()

    def write(self, row: dict) -> None:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float)), row
        if self._file:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def sync(self) -> None:
        if self._file:
            os.fsync(self._file.fileno())
