"""`upcycle` = `python -m launch.pipeline`: compose the settings with Hydra, check them, run what is missing."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from launch.branches import make_side_by_side, waiting_branches
from launch.config import Config, build, plain
from launch.group_checks import check_group
from launch.groups import (
    STARTED,
    drives,
    make_in_group,
    member,
    visible_gpus,
)  # fmt: skip
from launch.jobs import INSIDE
from launch.overrides import CONF, check_package, explained, own_arguments, rewritten, swept_keys, task_overrides
from launch.plan import check_sources, check_texts, print_dry_run, print_plan, train_of
from launch.recipes import Experiment, upcycle
from launch.running import SlurmConfig
from launch.submission import check_submitted, hand_over, planned_jobs, within_job
from launch.sweep import Table, note_point, only_shows
from upcycle import stopping
from upcycle.config import nearest
from upcycle.directories import check_new, check_room
from upcycle.durable import atomic_directory, write_json
from upcycle.explain import explain
from upcycle.merged import is_merged, merge_in_words
from upcycle.store import RECORD, Artifact, Run, Store
from upcycle.team import Team, in_group, leave

ROOT = Path(__file__).resolve().parent.parent


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def compose(raw: DictConfig) -> None:
    # Not before, inside Hydra: what a handler raises there comes out as an error of its own. A rank may be inside a call that Python can't leave,
    # because another rank died, until its launcher kills it half a minute later: it heeds the signal only where it can mean a time limit.
    if not in_group() or stopping.FILE in os.environ or stopping.PASSED_ON in os.environ:
        signal.signal(signal.SIGTERM, stopping.on_sigterm)
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep:
        _announce_job()
    out = Path(HydraConfig.get().runtime.output_dir)
    makes = not only_shows(raw) and os.environ.get("RANK", "0") == "0"
    overrides, error = task_overrides(), None
    try:
        if sweep and makes:
            note_point(out, overrides, "it did not come to its end", ended=False)
        check_package(raw)
        plain: Any = OmegaConf.to_container(raw, resolve=True, throw_on_missing=True)
        run(plain, out)
    except KeyboardInterrupt:
        if os.environ.get(STARTED) != "1" and os.environ.get("RANK", "0") == "0":  # a group's driver says it, once
            print("\nupcycle: stopped; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except Exception as failure:  # a user wants a line, and says so when they want the frames
        if os.environ.get("UPCYCLE_TRACEBACK"):
            raise
        code, error = _fail(failure), _in_words(failure)
        if not sweep or in_group():
            sys.exit(code)
        Table.failed = True  # and the other points go on
    finally:
        _drop_empty(out)
    if sweep and makes:
        note_point(out, overrides, error, ended=True)


def _announce_job() -> None:
    """One line for each run of a sweep: what sets it apart."""
    job = HydraConfig.get()
    swept = swept_keys(sys.argv[1:])
    print(f"\nrun {job.job.num}: {' '.join(one for one in job.overrides.task if one.split('=')[0] in swept)}")


def run(raw: dict[str, Any], out: Path) -> None:
    """Plan, compute one stage, or compute everything that is missing and write `out`. raw: the settings as composed."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a pipe has no width; tables must not lose their units in it
    _prepare_environment()
    if raw.get("budget") is not None:
        budgeted, budget = _worked_out(raw, out, console)
    else:
        budgeted, budget = raw, None
    cfg = within_job(build(budgeted))
    team = member(cfg.launch)
    console.quiet = not team.leads  # one voice for a group; errors come from whom they befall
    _plan_or_make(cfg, out, team, console, budget)


def _worked_out(raw: dict[str, Any], out: Path, console: Console) -> tuple[dict, dict | None]:
    """Settings with a budget turned into tokens, measured as the run itself will compute; see `speed.worked_out`."""
    from launch.speed import worked_out

    threads = (raw.get("launch") or {}).get("threads")
    return worked_out(raw, out, console, lambda: _prepare_process(threads, console))


def _plan_or_make(cfg: Config, out: Path, team: Team, console: Console, budget: dict | None) -> None:
    experiment = upcycle(cfg, Store(cfg.artifacts))
    if cfg.plan:
        print_plan(experiment, console)
        if cfg.launch.gpu is not None:
            from launch.capacity import print_capacity  # it needs torch, which makes a plain plan slow

            print_capacity(cfg, experiment, console)
        return
    stages = asked_stages(cfg, experiment.store)
    check_destination(cfg, experiment)
    if isinstance(cfg.launch, SlurmConfig):
        check_texts(stages)
        jobs, queued = planned_jobs(cfg, cfg.launch, stages, experiment.store.stages.values(), out)
        if not cfg.dry_run:
            check_sources(stages, console)
            write_manifest(cfg, experiment, out, None)
            hand_over(cfg, cfg.launch, stages, jobs, queued, out, console)
        return
    if cfg.dry_run:
        print_dry_run(experiment, console)
        return
    check_group(cfg.launch, team, stages)
    if os.environ.get(STARTED) == "1":  # one stage of a run that has a driver
        compute(cfg, experiment.store, stages, console, team, out)
        return
    if INSIDE in os.environ:
        check_submitted(stages, out)
    leads = team.leads and cfg.launch.machine_rank == 0
    if leads and INSIDE not in os.environ:  # else done at submission
        check_sources(stages, console)
        write_manifest(cfg, experiment, out, budget)  # first, so that `upcycle status` sees a run in progress
    compute(cfg, experiment.store, stages, console, team, out)
    if not leads:
        return
    if experiment.report is not None and experiment.report.finished:
        show_report(experiment.report, out, console)
    if experiment.report is None or cfg.out is not None:
        for name, model in (experiment.mixtures | experiment.merges).items():
            if model.finished and (
                INSIDE not in os.environ or model.name in [one.name for one in stages]
            ):  # else several jobs would
                deliver(name, model, cfg.out, console)


def asked_stages(cfg: Config, store: Store) -> list[Artifact]:
    """The stages that `stage` names, in the order they are made; all of them without it. Raises ValueError: no such stage."""
    if cfg.stage is None:
        return list(store.stages.values())
    asked = [cfg.stage] if isinstance(cfg.stage, str) else cfg.stage
    for one in asked:
        if one not in store.stages:
            raise ValueError(
                f"stage={one}: no such stage{nearest(one, store.stages)} Stages: {', '.join(store.stages)}"
            )
    return [stage for name, stage in store.stages.items() if name in asked]


def _prepare_environment() -> None:
    """What torch and others read when they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not visible_gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where it is installed, deepspeed would announce its guess
    # GNU OpenMP's waiting threads spin for long by default, which made a step ten times slower beside another busy
    # process; this short a spin is as fast on an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def compute(cfg: Config, store: Store, stages: list[Artifact], console: Console, team: Team, out: Path) -> None:
    """Make what is missing of `stages`, in order; every process of a group calls it. out: the run's directory."""
    from launch.track import Tracker

    missing = [stage for stage in stages if not stage.finished]
    if missing:
        check_room(store.root)
        _prepare_process(cfg.launch.threads, console)
    tracker = Tracker(cfg, console, out, team)
    for stage in stages:
        if team.any(stopping.asked()):
            console.print(f"asked to stop before {stage.name}; the same command goes on from there", highlight=False)
            raise stopping.Stopped
        if team.share(stage.finished):
            store.make(stage, Run(say=lambda text: None, team=team))
            continue
        if "data" in stage.inputs:
            check_texts(stages)
        driving = drives(cfg.launch)
        if driving and cfg.launch.parallel_branches > 1 and (waiting := waiting_branches(stage, stages)):
            make_side_by_side(cfg.launch, own_arguments(cfg.tokens), waiting, out / "logs", console)
        elif driving and cfg.launch.config is not None and stage.together:
            make_in_group(cfg.launch, own_arguments(cfg.tokens), stage, saves=train_of(stage) is not None)
        else:
            with tracker.stage(stage) as stage_run:
                made = store.make(stage, stage_run)
            _print_made(stage, made, console)
    if store.foreign:
        first = next(iter(store.foreign.values()))
        console.print(
            f"note: {len(store.foreign)} finished stages were made by other versions: {first}", highlight=False
        )


def _print_made(stage: Artifact, made: bool, console: Console) -> None:
    how = "made in" if made else "found"
    console.print(f"{stage.name:24} {how} {stage.seconds():7.1f} s  {stage.path.name}", highlight=False)


def _prepare_process(threads: int | None, console: Console) -> None:
    """Allocator and threads; before torch allocates."""
    import datasets
    import torch
    from transformers.utils import logging

    from upcycle.machine import keep_freed_memory

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # ours says more
    datasets.disable_progress_bars()
    # torch renames its collectives, and DeepSpeed still calls them by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    if not torch.cuda.is_available() and keep_freed_memory() and os.environ.get(STARTED) != "1":
        console.print("CPU run: freed memory is kept by the process (glibc allocator setting)", highlight=False)
    if threads is not None:
        torch.set_num_threads(threads)


def write_manifest(cfg: Config, experiment: Experiment, out: Path, budget: dict | None) -> None:
    """`manifest.json` (stage -> artifact; `budget`, how it became tokens) and `config.yaml` of this run."""
    out.mkdir(parents=True, exist_ok=True)
    stages = {name: stage.path.name for name, stage in experiment.store.stages.items()}
    said = {"budget": budget} if budget else {"budget": {"tokens": cfg.tokens}} if cfg.tokens else {}
    write_json(out / "manifest.json", stages | said, sort_keys=False)  # in the order they are made
    (out / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain(cfg))))


def _drop_empty(out: Path) -> None:
    """Hydra makes a run's directory, and those above it here, before there is anything for them."""
    here = Path.cwd()
    with suppress(OSError):
        for directory in (out, *(parent for parent in out.parents if here in parent.parents)):
            if directory != here:
                directory.rmdir()


def check_destination(cfg: Config, experiment: Experiment) -> None:
    """Raises ValueError: `out` cannot be written to, or has something in it that is not this very model."""
    if cfg.out is None:
        return
    (model,) = (experiment.mixtures | experiment.merges).values()
    out = Path(cfg.out).expanduser()
    if _holds(out, model):
        return
    check_new(out)
    check_room(out)


def _holds(out: Path, model: Artifact) -> bool:
    """Whether an earlier run has put this model there."""
    import json

    try:
        return json.loads((out / RECORD).read_text())["key"] == model.key
    except (OSError, ValueError, KeyError, TypeError):
        return False


def deliver(name: str, model: Artifact, destination: str | None, console: Console) -> None:
    """Say where a mixture or merged model is and what it is; copy it to its destination, whole or not at all."""
    where = model.path
    if destination is not None:
        where = Path(destination).expanduser()
        if not _holds(where, model):
            check_room(where, sum(path.stat().st_size for path in model.path.iterdir() if path.is_file()))
            with atomic_directory(where) as partial:
                shutil.copytree(model.path, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoints"))
    said = merge_in_words(where) if is_merged(where) else explain(where).summary()
    console.print(said, highlight=False, markup=False, soft_wrap=True)
    console.print(f"\n{name}: {where}", highlight=False, markup=False, soft_wrap=True)


def show_report(report: Artifact, out: Path, console: Console) -> None:
    """Copy the report to the run's directory and print its table."""
    import json

    from evals.findings import findings, headline
    from evals.tables import format_table
    from evals.task_table import format_tasks

    for name in ("report.json", "report.html"):
        shutil.copyfile(report.path / name, out / name)
    shutil.copytree(report.path / "figures", out / "figures", dirs_exist_ok=True)
    found = json.loads((out / "report.json").read_text())
    text = "\n".join([format_table(found), *format_tasks(found), "", headline(found), *findings(found)])
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nreport: {out / 'report.html'}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run, and turn what a user can cause into one clear message and exit status 2."""
    stopping.end_with_parent()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to here
    try:
        sys.argv[1:] = rewritten(sys.argv[1:])
        try:
            compose()
        except stopping.Stopped:  # the whole group was
            leave()
            raise
        leave()
        if Table.failed:
            sys.exit(2)
    except Exception as error:  # a settings file may also be no YAML at all
        if os.environ.get("UPCYCLE_TRACEBACK"):
            raise
        sys.exit(_fail(error))


def one_line(error: Exception) -> str:
    """The message of a run's error. One that no `raise` of ours wrote says how to see where it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = frames and Path(frames[-1].filename).resolve().parent in (ROOT / "upcycle", ROOT / "evals", ROOT / "launch")
    if ours and (frames[-1].line or "").startswith("raise "):
        return f"{error}"
    return f"{type(error).__name__}: {error} (UPCYCLE_TRACEBACK=1 shows where)"


def _in_words(error: Exception) -> str:
    return explained(error) if isinstance(error, HydraException | OmegaConfBaseException) else one_line(error)


def _fail(error: Exception) -> int:
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"upcycle: {rank}{_in_words(error)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
