"""Before a run: `plan=true`, every stage with its state and cost; `assemble.dry_run=true`, what the mixtures would be
made of; and, always, whether the checkpoints that were brought along fit together."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from evals.stages import ablate_model, evaluate_model
from launch.lineage import Lineage, train_flops
from launch.merges import learning_cost
from launch.recipes import Experiment
from upcycle.config import TrainConfig
from upcycle.explain import check_family, explain_plan
from upcycle.stages import (
    assemble_moe,
    draw_moe,
    import_model,
    learn_camex,
    measure_curvature,
    merge_models,
    prepare_seed,
    train_model,
)
from upcycle.store import Artifact


def human(number: float | None, unit: str = "") -> str:
    """1234567 -> "1.23M"."""
    if number is None:
        return ""
    for size, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}{unit}"
    return f"{number:.3g}{unit}"


def stage_cost(experiment: Experiment, stage: Artifact) -> tuple[Lineage | None, float | None, int | None]:
    """(lineage of the model it makes or measures, FLOPs of its training, bytes it keeps in memory for it)."""
    _, _, name = stage.name.rpartition("/")
    if stage.function is learn_camex:
        seed = experiment.lineages["seed"]
        held = 4 * seed.parameters * (len(stage.config["weights"]) + 2)  # the models, the merged one and its gradient
        return seed, learning_cost(stage.config, seed.shape)[1], held
    lineage = experiment.lineages.get(name)
    if lineage is None or stage.name.startswith(("documents/", "tokens/", "questions/")):
        return None, None, None
    train = train_of(stage)
    if train is None:  # assembled, merged, evaluated: the weights only
        return lineage, None, lineage.parameters * 4
    return lineage, train_flops(lineage.shape, train), lineage.shape.train_bytes


def train_of(stage: Artifact) -> TrainConfig | None:
    """The settings of a training stage; None of any other."""
    if stage.function is prepare_seed:
        return stage.config.train
    return stage.config["train"] if stage.function is train_model else None


def print_plan(experiment: Experiment, console: Console) -> None:
    table = Table(title=None, box=None, header_style="bold", pad_edge=False)
    for title in ("stage", "state", "key"):
        table.add_column(title, no_wrap=True)
    for title in ("parameters", "active", "train FLOPs", "bytes"):
        table.add_column(title, justify="right", no_wrap=True)
    total = 0.0
    for stage in experiment.store.stages.values():
        model, flops, size = stage_cost(experiment, stage)
        total += 0 if stage.finished else flops or 0
        counts = (human(model.parameters), human(model.active_parameters)) if model else ("", "")
        table.add_row(stage.name, stage.state, stage.key[:8], *counts, human(flops), human(size, "B"))
    console.print(table)
    done = sum(stage.finished for stage in experiment.store.stages.values())
    console.print(
        f"\n{done} of {len(experiment.store.stages)} stages done; {human(total)} training FLOPs left. Bytes: weights, "
        "gradients and optimizer state of training stages, weights of the others; activations come on top."
    )


def sources(assembly: Artifact) -> dict[str, Path]:
    """The checkpoints of a mixture or merge that are there already, the seed first: brought along, or made by an earlier run."""
    found = {}
    for name, stage in {"seed": assembly.inputs["seed"], **assembly.inputs["branches"]}.items():
        if stage.function is import_model:
            found[name] = Path(stage.outside["path"])
        elif stage.finished:
            found[name] = stage.path
    return found


def check_sources(stages: list[Artifact], console: Console) -> None:
    """Compare checkpoints that were brought along before anything is copied, trained or assembled.

    Raises ValueError: see `assembly.write_mixture`.
    """
    compared: set[tuple[str, ...]] = set()  # for merges it is the same whatever the method
    for assembly in (
        stage for stage in stages if stage.function in (assemble_moe, merge_models) and not stage.finished
    ):
        found, mixture = sources(assembly), assembly.function is assemble_moe
        new = [stage for stage in assembly.parents() if stage.function is import_model and not stage.finished]
        if "seed" not in found:
            continue
        if mixture:
            check_family(found["seed"], list(assembly.inputs["branches"]), assembly.config)
        if not new or len(found) < 2 or (not mixture and tuple(found) in compared):
            continue
        compared.add(tuple(found))
        seed, branches = found.pop("seed"), found
        if mixture and len(branches) == len(assembly.inputs["branches"]):
            planned = explain_plan(seed, branches, assembly.config)
            notes, kinship = planned.notes, planned.kinship
        else:
            notes, kinship = _compared(seed, branches)
        console.print(f"{assembly.name}: {len(branches) + 1} checkpoints fit together", highlight=False)
        for line in [*kinship, *(f"note: {note}" for note in notes)]:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def check_texts(stages: list[Artifact]) -> None:
    """Every domain holds a sequence of each training run and something to predict, before the first of them starts.

    Raises ValueError: see `batches.TokenArray`.
    """
    from upcycle.batches import TokenArray

    for stage in stages:
        data = stage.inputs.get("data", {})
        if stage.finished or not all(tokens.finished for tokens in data.values()):
            continue
        for tokens in data.values():
            if stage.function in (evaluate_model, ablate_model):
                TokenArray(tokens.path, stage.config.split, sequence_length=2)  # one prediction
            elif train := train_of(stage):
                TokenArray(tokens.path, "train", train.sequence_length)
            elif stage.function is measure_curvature:
                TokenArray(tokens.path, "train", stage.config["curvature"].sequence_length)


def _compared(seed: Path, branches: dict[str, Path]) -> tuple[list[str], list[str]]:
    """Notes and kinship of checkpoints that are not all of a mixture's; see `explain_plan`."""
    from upcycle.checkpoint import Checkpoint
    from upcycle.preflight import check_alike
    from upcycle.relatedness import check_related

    first, others = Checkpoint(seed), {name: Checkpoint(path) for name, path in branches.items()}
    notes, kin = check_alike(first, others), check_related(first, others)
    return notes + kin.warnings, kin.figures()


def print_dry_run(experiment: Experiment, console: Console) -> None:
    """What every mixture would be made of, after the checks that come before writing it; nothing is written. Of merges, whether
    their checkpoints fit together.

    Raises ValueError: a branch that is still to be trained; see `assembly.write_mixture`.
    """
    if experiment.merges:
        check_sources([experiment.store.stages[f"merge/{name}"] for name in experiment.merges], console)
    for name in experiment.mixtures:
        assembly = experiment.store.stages[f"assemble/{name}"]
        if assembly.function is draw_moe:
            console.print(f"{name}: every weight is drawn at random; there is nothing to look at", highlight=False)
            continue
        found = sources(assembly)
        models = [assembly.inputs["seed"], *assembly.inputs["branches"].values()]
        missing = [stage.name for stage in models if not stage.finished and stage.function is not import_model]
        if missing:
            raise ValueError(
                f"assemble.dry_run=true: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not trained yet, expected "
                f"checkpoints to look at; run stage={missing[0]} first, or give a path in its place"
            )
        seed, branches = found.pop("seed"), found
        console.print(
            explain_plan(seed, branches, assembly.config, f"would be written to {assembly.path}").text(),
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
