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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import PreTrainedModel

from upcycle.batches import Batches
from upcycle.config import TrainConfig
from upcycle.families import language_model_head
from upcycle.losses import cross_entropy_sum, next_token_labels
from upcycle.machine import matmul_peak_flops
from upcycle.modeling import UpcycledForCausalLM
from upcycle.optim import (
    build_optimizer,
    group_of,
    learning_rate,
    phase_at,
    plan_phases,
    set_learning_rate,
    set_trainable,
)
from upcycle.routing import RoutingTrace
from upcycle.snapshot import restore_newest, save_snapshot
from upcycle.store import Run

METRICS = "metrics.jsonl"
DEAD_SHARE = 0.1  # an expert is called dead below this share of the uniform load


class Objective(nn.Module):
    """A causal LM and its training loss as sums over tokens; the module that Accelerate wraps."""

    def __init__(self, model: PreTrainedModel, precision: str):
        super().__init__()
        self.model, self.precision = model, precision
        self.mixture = model if isinstance(model, UpcycledForCausalLM) else None

    def forward(self, input_ids_BS: Tensor, targets: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """`loss`, and detached: the sums it is made of and, for mixtures, router health.

        targets, tokens: how many targets and tokens the whole optimizer step has, over all ranks and micro-batches.
        """
        with torch.autocast(input_ids_BS.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            trace = RoutingTrace(input_ids_BS) if self.mixture else None
            extra = {"trace": trace} if trace else {}
            hidden = self.model.base_model(input_ids=input_ids_BS, use_cache=False, **extra).last_hidden_state
            labels = next_token_labels(input_ids_BS)
            head = language_model_head(self.model)
            nats, _ = cross_entropy_sum(hidden.flatten(0, 1), head, labels.flatten(), self.model.config.vocab_size)
        parts = {"cross_entropy": nats / targets}
        loss = parts["cross_entropy"]
        if self.mixture and trace:
            for name, value in self.mixture.auxiliary_sums(trace, input_ids_BS).items():
                parts[name] = value / tokens
                loss = loss + self.mixture.auxiliary_coefficients[name] * parts[name]
            parts |= _router_health(trace, share=input_ids_BS.numel() / tokens)
        return {"loss": loss} | {name: part.detach() for name, part in parts.items()}


@torch.no_grad()
def _router_health(trace: RoutingTrace, share: Tensor) -> dict[str, Tensor]:
    """Feed-forward load (L, E) and mean entropy of the routers' softmax in nats (L,), times this micro-batch's share."""
    loads, entropies = [], []
    for routing in trace.of("ffn"):
        experts = routing.logits.shape[-1]
        loads.append(torch.bincount(routing.experts.flatten(), minlength=experts) / routing.experts.numel())
        log_probs = routing.logits.log_softmax(-1)
        entropies.append(-(log_probs.exp() * log_probs).sum(-1).mean())
    health = {"load": torch.stack(loads) * share, "ffn_entropy": torch.stack(entropies) * share}
    if attention := trace.of("attention"):
        gates = [routing.gates for routing in attention]
        health["attention_entropy"] = (
            torch.stack([-(g * g.clamp_min(1e-20).log()).sum(-1).mean() for g in gates]) * share
        )
    return health


@dataclass
class Loop:
    """Everything one run needs, ready to step."""

    config: TrainConfig
    accelerator: Accelerator
    objective: nn.Module
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    batches: Batches

    def __post_init__(self):
        self.phases = plan_phases(self.config)
        self.world = self.accelerator.num_processes
        if self.config.batch_sequences % (self.world * self.config.micro_batch_sequences):
            raise ValueError(
                f"train.batch_sequences={self.config.batch_sequences} must be a multiple of ranks × "
                f"micro_batch_sequences = {self.world} × {self.config.micro_batch_sequences}"
            )

    def micro_batches(self, step: int) -> Iterator[Tensor]:
        """This rank's share of the global batch, (b, S) at a time."""
        batch = self.batches.batch(step)
        share = len(batch) // self.world
        mine = batch[self.accelerator.process_index * share :][:share]
        for start in range(0, share, self.config.micro_batch_sequences):
            rows = mine[start : start + self.config.micro_batch_sequences]
            yield torch.from_numpy(rows).to(self.accelerator.device)

    def step(self, step: int) -> dict[str, Tensor]:
        """One optimizer step; returns the step's loss parts, summed over micro-batches and ranks.

        Raises FloatingPointError: the loss or the gradient is not finite. Nothing was updated then.
        """
        config = self.config
        if step in {phase.start for phase in self.phases}:
            set_trainable(self.model, phase_at(self.phases, step).config)
        targets = torch.tensor(config.batch_sequences * (config.sequence_length - 1), device=self.accelerator.device)
        tokens = torch.tensor(config.batch_tokens, device=self.accelerator.device)
        totals: dict[str, Tensor] = {}
        for rows in self.micro_batches(step):
            parts = self.objective(rows, targets, tokens)
            # Data-parallel engines average gradients over ranks; the sum is what we want.
            self.accelerator.backward(parts["loss"] * self.world)
            for name, part in parts.items():
                totals[name] = totals.get(name, torch.zeros_like(part)) + part.detach()
        for name in totals:
            totals[name] = self.accelerator.reduce(totals[name], "sum")  # pyright: ignore[reportArgumentType]
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.optimizer.clip_norm)
        assert norm is not None
        totals["gradient_norm"] = torch.as_tensor(norm)
        if not (torch.isfinite(totals["loss"]) and torch.isfinite(totals["gradient_norm"])):
            raise FloatingPointError(
                f"step {step}, rank {self.accelerator.process_index}: loss {totals['loss'].item()}, gradient norm "
                f"{totals['gradient_norm'].item()}; nothing was updated and the last snapshot is kept. "
                "Lower the learning rate or lengthen the warm-up"
            )
        totals["router_gradient_norm"] = _router_gradient_norm(self.model)
        set_learning_rate(self.optimizer, learning_rate(config, self.phases, step))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return totals


def _router_gradient_norm(model: nn.Module) -> Tensor:
    """Norm of the routers' gradients, after clipping; 0 without routers."""
    squares = [
        parameter.grad.square().sum()
        for name, parameter in model.named_parameters()
        if group_of(name) == "router" and parameter.grad is not None
    ]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def train(
    model: PreTrainedModel,
    config: TrainConfig,
    data: dict[str, Path],
    out: Path,
    run: Run,
    train_flops_per_token: float,
    skip_tokens: dict[str, int] | None = None,
) -> None:
    """Train `model` in place, saving snapshots under `out`/checkpoints and a row a step in `out`/metrics.jsonl.

    data: token directory of each domain. skip_tokens: how much of each domain's stream earlier stages have used.
    train_flops_per_token: from cost.py, for the share of the machine's peak.
    Raises ValueError: settings that do not fit the data, the model or the ranks. FloatingPointError: see `Loop.step`.
    """
    accelerator = Accelerator()
    set_seed(config.rng_seed)
    batches = Batches(
        data, config.proportions, config.sequence_length, config.batch_sequences, config.rng_seed, skip_tokens,
        max_epochs=config.max_epochs,
    )  # fmt: skip
    for warning in batches.check(config.steps):
        run.say(warning)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    optimizer = build_optimizer(model, config)
    done = restore_newest(out / "checkpoints", model, optimizer, run)
    objective, optimizer = accelerator.prepare(Objective(model, config.precision), optimizer)
    loop = Loop(config, accelerator, objective, model, optimizer, batches)
    if done:
        run.say(f"going on from step {done} of {config.steps}")
        set_trainable(model, phase_at(loop.phases, min(done, config.steps - 1)).config)
    with _MetricsFile(out / METRICS, done) as metrics:
        _run_steps(loop, done, out, run, metrics, train_flops_per_token)


def _run_steps(loop: Loop, done: int, out: Path, run: Run, metrics: _MetricsFile, train_flops_per_token: float) -> None:
    config, saved_at, last = loop.config, time.monotonic(), time.monotonic()
    peak = matmul_peak_flops(config.precision, loop.accelerator.device.type)
    for step in range(done, config.steps):
        totals = loop.step(step)
        now = time.monotonic()
        rate, last = config.batch_tokens / (now - last), now
        row = _row(totals, step, config, learning_rate(config, loop.phases, step))
        row |= {"tokens_per_second": rate, "peak_share": rate * train_flops_per_token / peak}
        metrics.write(row)
        run.record(row)
        run.advance(step + 1, config.steps, **row)
        by_steps = run.checkpoint_steps and (step + 1) % run.checkpoint_steps == 0
        by_time = run.checkpoint_seconds and now - saved_at >= run.checkpoint_seconds
        if (by_steps or by_time) and step + 1 < config.steps and loop.accelerator.is_main_process:
            metrics.sync()
            save_snapshot(out / "checkpoints", step + 1, loop.model, loop.optimizer, run.keep_checkpoints)
            run.saved()
            saved_at = time.monotonic()


def _row(totals: dict[str, Tensor], step: int, config: TrainConfig, rate: float) -> dict:
    """One line of metrics.jsonl. Loss parts in nats a token; `dead_experts` and `largest_load` over all layers."""
    row = {"step": step + 1, "tokens": (step + 1) * config.batch_tokens, "lr": rate}
    row |= {name: value.item() for name, value in totals.items() if value.dim() == 0}
    if "load" in totals:
        load_LE = totals["load"]
        row["load"] = [[round(share, 4) for share in layer] for layer in load_LE.tolist()]
        row["largest_load"] = load_LE.max().item()
        row["dead_experts"] = int((load_LE < DEAD_SHARE / load_LE.shape[1]).sum())
        row["ffn_entropy"] = totals["ffn_entropy"].mean().item()
    if "attention_entropy" in totals:
        row["attention_entropy"] = totals["attention_entropy"].mean().item()
    return row


class _MetricsFile:
    """metrics.jsonl, cut back to the step that the run goes on from."""

    def __init__(self, path: Path, done: int):
        kept = []
        if path.is_file():
            lines = path.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= done]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)
        self._path = path

    def __enter__(self):
        self._file = self._path.open("a")
        return self

    def __exit__(self, *_error):
        self._file.close()

    def write(self, row: dict) -> None:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float)), row
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())
