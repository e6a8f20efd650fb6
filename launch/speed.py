"""A budget of time as tokens: a few measured training steps, and the FLOPs of everything that the recipe declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.budget import fingerprint, read_seconds, remembered, tokens_within
from launch.config import Config, build
from launch.matching import reference_name
from launch.plan import stage_cost
from launch.recipes import Experiment, upcycle
from upcycle.directories import resolve
from upcycle.store import Store
from upcycle.team import in_group

BEFORE = ("documents/", "tokens/", "tokenizer", "seed")  # stages that a budget is not for
FIRST_GUESS = 1_000_000  # tokens, to begin a search with


@dataclass(frozen=True)
class Speed:
    """FLOP/s of training: of a dense model of the seed's shape, and of the reference mixture (None without one)."""

    dense: float
    mixture: float | None

    def seconds(self, experiment: Experiment, cfg: Config) -> float:
        """What everything after the seed takes: every training run, and every evaluation as a third of the training FLOPs
        of as many tokens.

        Where eval.max_tokens is null nobody knows yet how many tokens are scored, and evaluations are left out; so are
        assembling, merging and the report.
        """
        scored = (cfg.eval.max_tokens or 0) * len(cfg.domains) * cfg.eval.sequence_length / cfg.eval.tokens_apart
        total = 0.0
        for stage in experiment.store.stages.values():
            model, flops, _ = stage_cost(experiment, stage)
            if model is None or (stage.name.startswith(BEFORE) and not stage.name.startswith("eval/")):
                continue
            if stage.name.startswith("eval/"):
                flops = model.copies * scored * model.shape.forward_flops_per_token(cfg.eval.sequence_length)
            total += (flops or 0.0) / (self.mixture if model.shape.mixtures and self.mixture else self.dense)
        return total


def worked_out(
    raw: Mapping[str, Any], out: Path, console: Console, prepare: Callable[[], None]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The settings with `tokens` in place of `budget`, and what the manifest keeps of it; both said once. A run that is
    started again goes on with the tokens that it began with. prepare: called before anything is measured.

    Raises ValueError: a budget in a wrong form, beside tokens, in a group of processes, or too short.
    """
    if raw.get("budget") is None:
        return dict(raw), None
    budget, seconds = raw["budget"], read_seconds(raw["budget"])
    if raw.get("tokens") is not None:
        raise ValueError(f"budget={budget} and tokens={raw['tokens']} both say how long the run is; give one of them")
    launch = raw.get("launch") or {}
    if launch.get("scheduler", "none") != "none":
        raise ValueError(
            f"budget={budget} is measured on the machine that trains, and launch=slurm submits from another; give tokens=, such as those that "
            "plan=true without launch=slurm says on a node"
        )
    if in_group() or launch.get("config") is not None:
        raise ValueError(
            f"budget={budget} is measured in one process, and launch.config asks for a group; give it tokens=, such as those "
            "that plan=true without launch.config says"
        )
    found, how = remembered(raw, out), "as measured when this run began"
    if found is None:
        prepare()
        found, how = _measured(raw, seconds, console), "as measured now"
    console.print(
        f"budget={budget}: about {found['seconds']:.0f} s after the seed, {how}. To repeat: tokens={found['tokens']}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return dict(raw) | {"budget": None, "tokens": found["tokens"]}, found


def _measured(raw: Mapping[str, Any], seconds: float, console: Console) -> dict[str, Any]:
    budget, plain = raw["budget"], dict(raw) | {"budget": None}

    def declared(tokens: int) -> tuple[Config, Experiment]:
        cfg = build(plain | {"tokens": tokens})
        return cfg, upcycle(cfg, Store(cfg.artifacts))

    some, _ = declared(FIRST_GUESS)
    speed = measure_speed(some)
    rates = f"{speed.dense:.3g} FLOP/s dense" + (f", {speed.mixture:.3g} mixture" if speed.mixture else "")
    console.print(f"budget={budget}: a few training steps ran at {rates}", highlight=False, soft_wrap=True)

    def seconds_of(tokens: int) -> float:
        cfg, experiment = declared(tokens)
        return speed.seconds(experiment, cfg)

    try:
        tokens = tokens_within(seconds, seconds_of, start=FIRST_GUESS)
    except ValueError as error:
        raise ValueError(f"budget={budget}: {error}") from None
    return {
        "budget": str(budget),
        "tokens": tokens,
        "seconds": seconds_of(tokens),
        "dense_flops_per_second": speed.dense,
        "mixture_flops_per_second": speed.mixture,
        "settings": fingerprint(raw),
    }


def measure_speed(cfg: Config) -> Speed:
    """Train the seed's shape and the reference mixture's for a few steps, with weights drawn at random."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from evals.throughput import training_flops_per_second
    from upcycle.assembly import placed_experts, upcycled_config
    from upcycle.modeling import UpcycledForCausalLM

    seed, name = cfg.seed, reference_name(cfg)
    if seed.path is not None:
        sizes = AutoConfig.from_pretrained(resolve(seed.path))
    else:
        assert seed.tokenizer is not None and seed.architecture is not None
        sizes = AutoConfig.for_model(seed.architecture, **seed.sizes, vocab_size=seed.tokenizer.vocab_size)
    mixture = cfg.mixtures[name] if name else None
    branch = next((branch.train for branch in cfg.branches.values() if branch.train), None)
    train = branch or (mixture.train if mixture else None)
    assert train is not None  # a run with tokens trains something
    model = AutoModelForCausalLM.from_config(sizes, dtype=torch.float32)
    dense = training_flops_per_second(model, train)
    if mixture is None or mixture.train is None:
        return Speed(dense, None)
    choice = mixture.assemble
    shape = upcycled_config(sizes, placed_experts(sizes, list(cfg.branches), choice), choice)
    model = UpcycledForCausalLM._from_config(shape, dtype=torch.float32)
    return Speed(dense, training_flops_per_second(model, mixture.train))
