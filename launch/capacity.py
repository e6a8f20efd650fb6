"""`plan=true launch.gpu=...`: what every training and evaluation needs of each process, whether it fits, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from evals.stages import evaluate_ensemble, evaluate_model
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
from upcycle.footprint import DependsOnValues, footprint, forward_bytes
from upcycle.stages import draw_moe
from upcycle.store import Artifact
from upcycle.team import PARTITIONED

PER_MACHINE = 8  # devices of a machine, where nobody says how many
DOUBLINGS = 4  # of processes, that advice tries
EVALUATIONS = (evaluate_model, evaluate_ensemble)
WIDE = 190  # characters; a pipe has no width, and figures must not be cut


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
    """Raises ValueError: nobody says how many processes."""
    assert cfg.launch.gpu is not None
    models, planned, remarks = Models(cfg, experiment), [], []
    for stages in _alike(experiment, models):
        try:
            planned.append(_planned(stages, cfg.launch, models))
        except DependsOnValues:
            names = _short(tuple(stage.name for stage in stages))
            remarks.append(
                f"{names}: weights are merged once for each decision, and how many there are only a run knows; not planned"
            )
    if not planned and not remarks:
        console.print("nothing here is left to train or to evaluate", highlight=False)
        return
    for group in dict.fromkeys(one.group for one in planned):
        console.print(f"\n{describe(cfg.launch, group)}", highlight=False)
        narrow, console.width = console.width, max(WIDE, console.width)
        console.print(_table([one for one in planned if one.group == group]))
        console.width = narrow
    console.print(
        "Bytes of the rank that needs most; peak: all of them together, and the runtime. FLOPs, sent: of a step. Checkpoint: of all ranks. Cache: of 1,000 tokens in generation, in bf16. "
        "Hours: of training, on all ranks. Rules, and how far off they were: docs/planning.md",
        highlight=False,
    )
    remarks += filter(None, map(_uneven, planned))
    for remark in (*remarks, *(advice(one, models, cfg.launch) for one in planned if not one.fits)):
        console.print(remark, style="bold", highlight=False, soft_wrap=True)


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
        # Nothing else of a trace depends on the strategy.
        strategy = "zero3" if group.strategy in PARTITIONED else "single"
        key = (config.to_json_string(), train.micro_batch_sequences, train.sequence_length, train.precision)
        key = (*key, train.gradient_checkpointing, train.phases, strategy, group.device.cpu)
        if key not in self._traced:
            self._traced[key] = footprint(config, train, strategy, group.device.cpu)
        return needs(Shape.of_config(config.to_dict()), self._traced[key], train, group)

    def evaluation(self, config: Any, settings: EvalConfig, copies: int, group: Group) -> Needs:
        """Every rank holds the whole model in fp32, of an ensemble all of them."""
        weights, activations = forward_bytes(
            config, settings.batch_sequences, settings.sequence_length, settings.precision
        )
        held = Held(copies * weights, 0, 0)
        peak = held.on_device + activations + group.device.runtime
        return Needs(weights // 4, held, activations, peak, 0, 0, 0.0, 0.0, 0)


def _alike(experiment: Experiment, models: Models) -> list[list[Artifact]]:
    """Stages that train or evaluate and are not done; those that need the same together."""
    alike: dict[tuple, list[Artifact]] = {}
    for stage in experiment.store.stages.values():
        if not stage.finished and (train_of(stage) is not None or stage.function in EVALUATIONS):
            kind, _, name = stage.name.partition("/")
            key = (kind, models.config(name).to_json_string(), repr(_settings(stage)), _copies(stage))
            alike.setdefault(key, []).append(stage)
    return list(alike.values())


def _planned(stages: list[Artifact], launch: LaunchConfig, models: Models) -> Planned:
    """Raises DependsOnValues."""
    kind, _, name = stages[0].name.partition("/")
    config, settings, group = models.config(name), _settings(stages[0]), group_of(launch, kind)
    names = tuple(stage.name for stage in stages)
    if isinstance(settings, TrainConfig):
        return Planned(names, config, settings, group, models.needs(config, settings, group))
    return Planned(names, config, None, group, models.evaluation(config, settings, _copies(stages[0]), group))


def _settings(stage: Artifact) -> TrainConfig | EvalConfig:
    """Those that memory depends on: which texts a training reads is not among them."""
    train = train_of(stage)
    if train is None:
        return stage.config["eval"] if stage.function is evaluate_ensemble else stage.config
    return replace(train, proportions={"all": 1.0}, rng_seed=0)


def _copies(stage: Artifact) -> int:
    """How many models a stage holds at once."""
    return len(stage.inputs["models"]) if stage.function is evaluate_ensemble else 1


def group_of(launch: LaunchConfig, kind: str) -> Group:
    """The processes that make a stage of this kind. Raises ValueError: nobody says how many."""
    assert launch.gpu is not None
    own = launch.of(kind) if isinstance(launch, SlurmConfig) else launch
    at_once = own.parallel_branches if kind == "branch" else 1
    machines, ranks, strategy = own.machines, 1, "single"
    if own.config is not None:
        strategy = strategy_of(launch_file(own))
        if isinstance(own, SlurmConfig):
            machines, ranks = own.nodes, own.processes or own.nodes * (own.gpus or 1)
        else:
            ranks = max(1, processes_of(own) // at_once)
    if machines == 1 and launch.gpu != CPU and not isinstance(own, SlurmConfig):
        machines = -(-ranks // PER_MACHINE)
    found = device(launch.gpu, at_once * -(-ranks // machines))
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
    where, micro = where_of(one.stages[0]), train.micro_batch_sequences
    return (
        f"{_short(one.stages)}: {ranks} processes cannot share batches of {train.batch_sequences} sequences in micro-batches of {micro}, and the run will "
        f"be refused; make {where}.batch_sequences a multiple of {ranks * micro}, or {where}.micro_batch_sequences smaller"
    )


def where_of(stage: str) -> str:
    """The settings of a stage's training; dense continuations follow the branches."""
    return {"seed": "seed.train", "mix": "mix"}.get(stage.partition("/")[0], "branch")


def size(count: float) -> str:
    return human(count, "B")


COLUMNS = [
    "weights",
    "gradients",
    "moments",
    "buffers",
    "host",
    "activations",
    "peak",
    "-",
    "checkpoint",
    "cache",
    "FLOPs",
    "sent",
    "s/step",
    "hours",
]


def _table(planned: list[Planned]) -> Table:
    """host: only where something is kept there."""
    columns = [name for name in COLUMNS if name != "host" or any(one.needs.held.host for one in planned)]
    table = Table(title=None, box=None, header_style="bold", pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for name in columns:
        table.add_column(name.replace("-", ""), justify="right", no_wrap=True)
    for one in planned:
        found, held = one.needs, one.needs.held
        row = {
            "weights": size(held.weights), "gradients": size(held.gradients), "moments": size(held.moments),
            "buffers": size(held.copies + held.buffers), "host": size(held.host), "activations": size(found.activations),
            "peak": size(found.peak), "-": "fits" if one.fits else "TOO MUCH", "cache": one.cache,
        }  # fmt: skip
        if one.train:
            row |= {"checkpoint": size(found.checkpoint), "FLOPs": human(found.flops), "sent": size(found.sent)}
            row |= {"s/step": f"{found.step_seconds:.3g}", "hours": f"{found.hours:.3g}"}
        table.add_row(_short(one.stages), *(row.get(name, "") for name in columns))
    return table


def _short(names: tuple[str, ...]) -> str:
    return names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "")


def advice(one: Planned, models: Models, launch: LaunchConfig) -> str:
    """What to change, one thing after another until it fits."""
    memory, weights = one.group.device.memory, one.needs.held.weights
    start = f"{_short(one.stages)} needs {size(one.needs.peak)} of {size(memory)}: "
    if one.train is None:
        smaller = "lower eval.batch_sequences, or " if weights < memory else ""
        return f"{start}every process holds all of it, {size(weights)} in fp32; {smaller}measure it on a larger device"
    least, changed = one.needs.peak, dict[str, str]()
    for setting, value, train, group in _changes(one, launch):
        changed[setting] = value
        least = models.needs(one.config, train, group).peak
        if least <= memory:
            break
    said = ", ".join(f"{setting}={value}" for setting, value in changed.items())
    if least <= memory:
        return f"{start}{said} brings it to {size(least)}"
    return f"{start}even {said or 'nothing left to change'} leaves {size(least)}; take a larger device, or a smaller mixture"


def _changes(one: Planned, launch: LaunchConfig) -> Iterator[tuple[str, str, TrainConfig, Group]]:
    """Settings to change, each together with those before it. On CPUs more processes share the same memory, and so does what is offloaded."""
    train, group, where = one.train, one.group, where_of(one.stages[0])
    assert train is not None
    if not train.gradient_checkpointing:
        train = replace(train, gradient_checkpointing=True)
        yield f"{where}.gradient_checkpointing", "true", train, group
    if train.micro_batch_sequences > 1:
        train = replace(train, micro_batch_sequences=1)
        yield f"{where}.micro_batch_sequences", "1", train, group
    if group.strategy not in PARTITIONED and (group.ranks > 1 or not group.device.cpu):
        group = replace(group, strategy="zero3")
        yield "launch.config", "zero3", train, group
    by_nodes = isinstance(launch, SlurmConfig) and launch.processes is None
    for doublings in range(1, DOUBLINGS + 1):
        ranks = one.group.ranks * 2**doublings
        if not group.device.cpu and train.batch_sequences % ranks == 0:
            group = replace(group, ranks=ranks)
            value = launch.nodes * 2**doublings if isinstance(launch, SlurmConfig) and by_nodes else ranks
            yield "launch.nodes" if by_nodes else "launch.processes", str(value), train, group
    if group.strategy.startswith("zero") and not group.offload and not group.device.cpu:
        yield "launch.offload", "cpu", train, replace(group, offload=True)
