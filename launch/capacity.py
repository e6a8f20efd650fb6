"""`plan=true launch.gpu=...`: what every training and evaluation needs of each process, whether it fits, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from evals.stages import evaluate_model
from launch.branches import shares
from launch.config import Config
from launch.groups import launch_file, processes_of, strategy_of
from launch.hardware import CPU, device
from launch.plan import human, train_of
from launch.planner import Group, Held, Needs, needs
from launch.recipes import Experiment
from launch.running import LaunchConfig, SlurmConfig
from upcycle.config import EvalConfig, TrainConfig
from upcycle.cost import Shape
from upcycle.directories import resolve
from upcycle.stages import draw_moe
from upcycle.store import Artifact

PER_MACHINE = 8  # devices of a machine, where nobody says how many
RANKS_TRIED = 4  # doublings


@dataclass(frozen=True)
class Planned:
    """A stage, or several alike, with its settings and what they need."""

    stages: tuple[str, ...]
    config: Any
    train: TrainConfig | None
    group: Group
    needs: Needs

    @property
    def cache(self) -> str:
        """Keys and values of 1,000 tokens of one sequence, in bf16, when it generates."""
        return human(1000 * Shape.of_config(self.config.to_dict()).cache_bytes_per_token(), "B")

    @property
    def fits(self) -> bool:
        return self.needs.peak <= self.group.device.memory


def print_capacity(cfg: Config, experiment: Experiment, console: Console) -> None:
    """Raises ValueError: an unknown launch.gpu; batches that the processes cannot share."""
    assert cfg.launch.gpu is not None
    models = Models(cfg, experiment)
    planned = list(_planned(cfg, experiment, models))
    for group in dict.fromkeys(one.group for one in planned):
        console.print(f"\n{describe(cfg.launch, group)}", highlight=False)
        console.print(_table([one for one in planned if one.group == group]))
    console.print(
        "Bytes of the rank that needs most; peak: all of them together. Checkpoint: of all ranks. Cache: of 1,000 tokens in generation, in bf16. "
        "Hours: of training, on all ranks. Rules, and how far off they were: docs/planning.md",
        highlight=False,
    )
    for one in planned:
        for remark in (_uneven(one), "" if one.fits else advice(one, models)):
            if remark:
                console.print(remark, style="bold", highlight=False)


class Models:
    """Configs of the models that stages train and evaluate, known before any of them is there, and their traces."""

    def __init__(self, cfg: Config, experiment: Experiment):
        from transformers import AutoConfig

        import upcycle.modeling  # noqa: F401  (registers the mixture's classes)

        self._experiment, self._traced = experiment, {}
        if cfg.seed.path is not None:
            self.dense: Any = AutoConfig.from_pretrained(resolve(cfg.seed.path))
        else:
            assert cfg.seed.architecture is not None and cfg.seed.tokenizer is not None
            sizes = {**cfg.seed.sizes, "vocab_size": cfg.seed.tokenizer.vocab_size}
            self.dense = AutoConfig.for_model(cfg.seed.architecture, **sizes)

    def config(self, name: str) -> Any:
        """Of the model by that name: a mixture's, or the seed's, which every dense model has."""
        from upcycle.assembly import placed_experts, upcycled_config

        assembly = self._experiment.store.stages.get(f"assemble/{name}")
        if assembly is None:
            return self.dense
        if assembly.function is draw_moe:
            choice, branches = assembly.config["assemble"], assembly.config["branches"]
        else:
            choice, branches = assembly.config, list(assembly.inputs["branches"])
        return upcycled_config(self.dense, placed_experts(self.dense, branches, choice), choice)

    def needs(self, config: Any, train: TrainConfig, group: Group) -> Needs:
        from upcycle.footprint import footprint

        strategy = (
            group.strategy if train.gradient_checkpointing else "single"
        )  # nothing else of the trace depends on it
        key = (config.to_json_string(), train.micro_batch_sequences, train.sequence_length, train.precision)
        key = (*key, train.gradient_checkpointing, train.phases, strategy)
        if key not in self._traced:
            self._traced[key] = footprint(config, train, strategy)
        return needs(Shape.of_config(config.to_dict()), self._traced[key], train, group)

    def evaluation(self, config: Any, settings: EvalConfig, group: Group) -> Needs:
        """Every rank holds the whole model, in fp32."""
        from upcycle.footprint import forward_bytes

        weights, activations = forward_bytes(
            config, settings.batch_sequences, settings.sequence_length, settings.precision
        )
        held = Held(weights, 0, 0)
        peak = weights + activations + group.device.runtime
        return Needs(weights // 4, held, activations, peak, 0, 0, 0.0, 0.0, 0, group.ranks)


def _planned(cfg: Config, experiment: Experiment, models: Models) -> Iterator[Planned]:
    """Stages that train or evaluate and are not done; those alike together."""
    alike: dict[tuple, list[Artifact]] = {}
    for stage in experiment.store.stages.values():
        if not stage.finished and (train_of(stage) is not None or stage.function is evaluate_model):
            kind, _, name = stage.name.partition("/")
            alike.setdefault((kind, models.config(name).to_json_string(), repr(_settings(stage))), []).append(stage)
    for stages in alike.values():
        kind, _, name = stages[0].name.partition("/")
        config, settings, group = models.config(name), _settings(stages[0]), group_of(cfg.launch, kind)
        names = tuple(stage.name for stage in stages)
        if isinstance(settings, TrainConfig):
            yield Planned(names, config, settings, group, models.needs(config, settings, group))
        else:
            yield Planned(names, config, None, group, models.evaluation(config, settings, group))


def _settings(stage: Artifact) -> TrainConfig | EvalConfig:
    """Those that memory depends on: which texts a training reads is not among them."""
    train = train_of(stage)
    return stage.config if train is None else replace(train, proportions={"all": 1.0}, rng_seed=0)


def group_of(launch: LaunchConfig, kind: str) -> Group:
    """The processes that make a stage of this kind. Raises ValueError: nobody says how many; an unknown launch.gpu."""
    assert launch.gpu is not None
    own = launch.of(kind) if isinstance(launch, SlurmConfig) else launch
    machines, ranks, strategy = own.machines, 1, "single"
    if own.config is not None:
        strategy = strategy_of(launch_file(own))
        if isinstance(own, SlurmConfig):
            machines, ranks = own.nodes, own.processes or own.nodes * (own.gpus or 1)
        elif kind == "branch" and own.parallel_branches > 1:
            ranks = shares(own)[0]["processes"]
        else:
            ranks = processes_of(own)
    if machines == 1 and launch.gpu != CPU and not isinstance(own, SlurmConfig):
        machines = -(-ranks // PER_MACHINE)
    found = device(launch.gpu, -(-ranks // machines))
    link = found.link if machines == 1 else min(found.link, launch.interconnect * 1e9 / 8)
    return Group(strategy, ranks, found, link, launch.utilisation, own.offload != "none")


def describe(launch: LaunchConfig, group: Group) -> str:
    """One line: what the processes are, and what the plan assumes of them."""
    found = group.device
    processes = f"{group.ranks} processes, {group.strategy}," if group.ranks > 1 else "one process"
    return (
        f"{processes} on {launch.gpu}: {size(found.memory)} each, {human(found.bf16)}FLOP/s in bf16 "
        f"({human(found.fp32)} in fp32) of which {group.utilisation:.0%} is reached, {human(group.link)}B/s between processes"
    )


def _uneven(one: Planned) -> str:
    """That the processes cannot share a training's batches; "" if they can."""
    ranks, train = one.group.ranks, one.train
    if train is None or train.batch_sequences % (ranks * train.micro_batch_sequences) == 0:
        return ""
    return (
        f"{_short(one.stages)}: {ranks} processes cannot share batches of {train.batch_sequences} sequences in micro-batches of "
        f"{train.micro_batch_sequences}; it will be refused, and is planned as one micro-batch each"
    )


def size(count: float) -> str:
    return human(count, "B")


def _table(planned: list[Planned]) -> Table:
    table = Table(title=None, box=None, header_style="bold", pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for title in (
        "weights",
        "gradients",
        "moments",
        "buffers",
        "activations",
        "peak",
        "",
        "checkpoint",
        "cache",
        "sent",
        "s/step",
        "hours",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for one in planned:
        found, held = one.needs, one.needs.held
        fits = "fits" if one.fits else "TOO MUCH"
        step = (size(found.sent), f"{found.step_seconds:.3g}", f"{found.hours:.3g}") if one.train else ("", "", "")
        table.add_row(
            _short(one.stages), size(held.weights), size(held.gradients), size(held.moments),
            size(held.copies + held.buffers), size(found.activations), size(found.peak), fits,
            size(found.checkpoint) if one.train else "", one.cache, *step,
        )  # fmt: skip
    return table


def _short(names: tuple[str, ...]) -> str:
    return names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "")


def advice(one: Planned, models: Models) -> str:
    """What to change, one thing after another until it fits."""
    least, changed = one.needs.peak, []
    start = f"{_short(one.stages)} needs {size(one.needs.peak)} of {size(one.group.device.memory)}: "
    if one.train is None:
        return (
            f"{start}every process holds the whole model; lower eval.batch_sequences, or measure it on a larger device"
        )
    for change, train, group in _changes(one.train, one.group, one.stages[0]):
        changed.append(change)
        least = models.needs(one.config, train, group).peak
        if least <= group.device.memory:
            return f"{start}{', '.join(changed)} brings it to {size(least)}"
    return f"{start}even {', '.join(changed)} leaves {size(least)}; take a larger device, or a smaller mixture"


def _changes(train: TrainConfig, group: Group, stage: str) -> Iterator[tuple[str, TrainConfig, Group]]:
    """Each with those before it."""
    kind = stage.partition("/")[0]
    where = {"seed": "seed.train", "mix": "mix"}.get(kind, "branch")  # dense continuations follow the branches
    if not train.gradient_checkpointing:
        train = replace(train, gradient_checkpointing=True)
        yield f"{where}.gradient_checkpointing=true", train, group
    if train.micro_batch_sequences > 1:
        train = replace(train, micro_batch_sequences=1)
        yield f"{where}.micro_batch_sequences=1", train, group
    if group.ranks > 1 and group.strategy not in ("zero3", "fsdp2"):
        group = replace(group, strategy="zero3")
        yield "launch.config=zero3", train, group
    for _ in range(RANKS_TRIED if group.ranks > 1 else 0):
        if train.batch_sequences % (2 * group.ranks) == 0:
            group = replace(group, ranks=2 * group.ranks)
            yield f"launch.processes={group.ranks}", train, group
    if group.strategy.startswith("zero") and not group.offload:
        yield "launch.offload=cpu", train, replace(group, offload=True)
