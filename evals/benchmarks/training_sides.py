"""Processes that train: upcycle's own loop, and a plain PyTorch loop around a class of transformers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from evals.benchmarks.models import about, built, decoder_layers, probe
from upcycle.batches import Batches
from upcycle.config import OptimizerConfig, PhaseConfig, ScheduleConfig, TrainConfig
from upcycle.engines import ENGINES
from upcycle.machine import matmul_peak_flops
from upcycle.team import ALONE, PARTITIONED, Team
from upcycle.train import Loop, Objective, checkpointing_options

RATE = 1e-4
SHOWN = 14  # rows of a profile
SEEN_ROWS = slice(3, 35)  # of the embedding


def settings(config: Mapping[str, Any]) -> TrainConfig:
    """config: `sequences`, `length`, and `micro` sequences at a time (all, where it is not given)."""
    return TrainConfig(
        tokens=10**9, proportions={"random": 1.0}, sequence_length=config["length"], batch_sequences=config["sequences"],
        micro_batch_sequences=config.get("micro", config["sequences"]), lr=RATE, phases=(PhaseConfig(),),
        schedule=ScheduleConfig(kind="constant", warmup_steps=0), max_epochs=float("inf"),
    )  # fmt: skip


def batches(config: Mapping[str, Any]) -> Batches:
    """Of the tokens below `data`, the same for every side."""
    train = settings(config)
    data = {"random": Path(config["data"])}
    return Batches(
        data,
        train.proportions,
        train.sequence_length,
        train.batch_sequences,
        train.rng_seed,
        max_epochs=train.max_epochs,
    )


class _Training(ABC):
    """Steps of a training, timed: `steps` of them a measurement, after one that is left out, or `warm_up` the first time.

    What is timed is what is held against the other side: of the first step its loss, and the gradients of some rows of the
    embedding, which hang on the batch's tokens.
    """

    def __init__(self, config: Mapping[str, Any], model: Any):
        self.config, self.model, self.done = config, model, 0
        self.about = about(model, config["length"]) if config.get("planned", True) else {}
        self.about["probe"] = probe(model)
        model.train()
        self.rows: list[float] = []
        model.get_input_embeddings().weight.register_post_accumulate_grad_hook(self._see_rows)
        if config.get("compile"):
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # it would go on uncompiled, without a word
            for layer in decoder_layers(model):
                layer.compile()

    def _see_rows(self, weight: torch.Tensor) -> None:
        if not self.rows and weight.grad is not None:
            self.rows = weight.grad[SEEN_ROWS].float().norm(dim=1).tolist()

    @abstractmethod
    def step(self) -> float:
        """One optimizer step; its cross-entropy in nats a token."""

    def measure(self) -> dict[str, Any]:
        warm_up = 1 if self.done else self.config.get("warm_up", 1)
        losses = [self.step() for _ in range(warm_up)]
        first = [] if self.done else losses[:1]
        self.done += 1
        seconds = []
        for _ in range(self.config["steps"]):
            start = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - start)
        middle = median(seconds)
        tokens = self.config["sequences"] * self.config["length"]
        peak = matmul_peak_flops.__wrapped__("bf16")  # now, not as remembered
        return {
            "seconds": middle,
            "tokens_per_second": tokens / middle,
            "peak": peak,
            "first_loss": first,
            "rows": self.rows,
        }

    def profile(self) -> dict[str, Any]:
        """Shares of the operators' own time in two steps, the largest first."""
        from torch.profiler import ProfilerActivity, profile

        self.step()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            self.step()
            self.step()
        rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
        total = sum(row.self_cpu_time_total for row in rows)
        shares = [[row.key, row.self_cpu_time_total / total, row.count // 2] for row in rows[:SHOWN]]
        return {"seconds": total / 2e6, "operators": shares}


class LoopSide(_Training):
    """A mixture or a dense model in upcycle's training loop: auxiliary losses and what it records of routers are computed too."""

    def __init__(self, config: Mapping[str, Any], team: Team = ALONE):
        super().__init__(config, built(config))
        train = settings(config)
        if config.get("checkpointing"):
            self.model.activation_checkpointing_enable(checkpointing_options(team.strategy))
        objective = Objective(self.model, train.precision, 1, whole=team.strategy not in PARTITIONED)
        engine = ENGINES[team.strategy](objective, train, team)
        self.loop, self.number = Loop(train, engine, batches(config)), 0
        self.loop.begin(0, None)

    def step(self) -> float:
        totals = self.loop.step(self.number)
        self.number += 1
        self.gradient_norm = totals["gradient_norm"].item()
        return totals["cross_entropy"].item()


class PlainSide(_Training):
    """What one writes around a model of transformers: autocast, its own loss, clipping, fused AdamW.

    config: `implementation` of the experts; None is what transformers takes by itself.
    """

    def __init__(self, config: Mapping[str, Any]):
        model = built(config)
        if config.get("implementation"):
            model.set_experts_implementation(config["implementation"])
        super().__init__(dict(config) | {"planned": False}, model)
        self.about["implementation"] = model.config._experts_implementation
        options = OptimizerConfig()
        self.clip = options.clip_norm
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=RATE,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.batches, self.number = batches(config), 0

    def step(self) -> float:
        ids = torch.from_numpy(self.batches.batch(self.number))
        self.number += 1
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()
