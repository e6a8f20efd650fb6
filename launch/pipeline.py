"""`upcycle` = `python -m launch.pipeline`: compose the settings with Hydra, check them, run what is missing."""

from __future__ import annotations

import os
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from launch.config import Config, build, nearest
from launch.plan import print_plan
from launch.recipes import Experiment, upcycle
from upcycle.durable import write_json
from upcycle.store import Artifact, Store

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def compose(raw: DictConfig) -> None:
    plain: Any = OmegaConf.to_container(raw, resolve=True, throw_on_missing=True)
    try:
        run(build(plain), Path(HydraConfig.get().runtime.output_dir))
    except KeyboardInterrupt:
        print("\nupcycle: stopped; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # a user wants a line, and says so when they want the frames
        if os.environ.get("UPCYCLE_TRACEBACK"):
            raise
        sys.exit(_fail(one_line(error)))


def run(cfg: Config, out: Path) -> None:
    """Plan, compute one stage, or compute everything that is missing and write `out`."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a pipe has no width; tables must not lose their units in it
    experiment = upcycle(cfg, Store(cfg.artifacts))
    if cfg.plan:
        print_plan(experiment, console)
        return
    stages = list(experiment.store.stages.values())
    if cfg.stage is not None:
        if cfg.stage not in experiment.store.stages:
            names = list(experiment.store.stages)
            raise ValueError(f"stage={cfg.stage}: no such stage{nearest(cfg.stage, names)} Stages: {', '.join(names)}")
        stages = [experiment.store.stages[cfg.stage]]
    write_manifest(cfg, experiment, out)  # first, so that `upcycle status` sees a run in progress
    compute(cfg, experiment.store, stages, console)
    if experiment.report.finished:
        show_report(experiment.report, out, console)


def compute(cfg: Config, store: Store, stages: list[Artifact], console: Console) -> None:
    """Make what is missing of `stages`, in order."""
    from launch.track import Tracker

    missing = [stage for stage in stages if not stage.finished]
    if missing:
        _prepare_process(cfg, console)
    tracker = Tracker(cfg, console)
    for stage in stages:
        if stage.finished:
            store.make(stage, run=_silent())
            continue
        with tracker.stage(stage.name) as stage_run:
            made = store.make(stage, stage_run)
        console.print(
            f"{stage.name:24} {'made in' if made else 'found'} {stage.seconds():7.1f} s  {stage.path.name}",
            highlight=False,
        )
    if store.foreign:
        first = next(iter(store.foreign.values()))
        console.print(
            f"note: {len(store.foreign)} finished stages were made by other versions: {first}", highlight=False
        )


def _silent() -> Any:
    from upcycle.store import Run

    return Run(say=lambda text: None)


def _prepare_process(cfg: Config, console: Console) -> None:
    """Allocator and threads; before torch allocates."""
    from upcycle.machine import keep_freed_memory

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not Path("/dev/nvidia0").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where it is installed, deepspeed would announce its guess
    # GNU OpenMP's waiting threads spin for long by default, which made a step ten times slower beside another busy
    # process; this short a spin is as fast on an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    import datasets
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # ours says more
    datasets.disable_progress_bars()
    if not torch.cuda.is_available() and keep_freed_memory():
        console.print("CPU run: freed memory is kept by the process (glibc allocator setting)", highlight=False)
    if cfg.launch.threads is not None:
        torch.set_num_threads(cfg.launch.threads)


def write_manifest(cfg: Config, experiment: Experiment, out: Path) -> None:
    """`manifest.json` (stage -> artifact) and `config.yaml` of this run."""
    import json

    from pydantic import TypeAdapter

    out.mkdir(parents=True, exist_ok=True)
    stages = {name: stage.path.name for name, stage in experiment.store.stages.items()}
    write_json(out / "manifest.json", stages, sort_keys=False)  # in the order they are made
    plain = json.loads(TypeAdapter(Config).dump_json(cfg))
    (out / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))


def show_report(report: Artifact, out: Path, console: Console) -> None:
    """Copy the report to the run's directory and print its table."""
    import json

    from evals.findings import findings, headline
    from evals.tables import format_table

    for name in ("report.json", "report.html"):
        shutil.copyfile(report.path / name, out / name)
    shutil.copytree(report.path / "figures", out / "figures", dirs_exist_ok=True)
    found = json.loads((out / "report.json").read_text())
    text = "\n".join([format_table(found), "", headline(found), *findings(found)])
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nreport: {out / 'report.html'}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run, and turn what a user can cause into one clear message and exit status 2."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to here
    try:
        compose()
    except (HydraException, OmegaConfBaseException, OSError) as error:
        if os.environ.get("UPCYCLE_TRACEBACK"):
            raise
        hydras = isinstance(error, HydraException | OmegaConfBaseException)  # some of them are OSErrors too
        sys.exit(_fail(explain_override(str(error)) if hydras else one_line(error)))


def one_line(error: Exception) -> str:
    """The message of a run's error. One that no `raise` of ours wrote says how to see where it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = frames and Path(frames[-1].filename).resolve().parent in (ROOT / "upcycle", ROOT / "evals", ROOT / "launch")
    if ours and (frames[-1].line or "").startswith("raise "):
        return f"{error}"
    return f"{type(error).__name__}: {error} (UPCYCLE_TRACEBACK=1 shows where)"


def _fail(message: str) -> int:
    print(f"upcycle: {message}", file=sys.stderr)
    return 2


def explain_override(message: str) -> str:
    """Hydra's complaint about an override, with the names that would have been valid there."""
    found = re.search(r"full_key: (\S+)", message) or re.search(r"override '([^']+)'", message)
    if found is None:
        return message
    path = found.group(1).split(".")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        experiments = [argument for argument in sys.argv[1:] if argument.startswith("experiment=")]
        try:
            node: Any = hydra.compose("config", overrides=experiments)
        except (HydraException, OmegaConfBaseException):
            return message
    for depth, part in enumerate(path):
        names = [str(key) for key in node] if isinstance(node, DictConfig) else []
        if part not in names:
            where = ".".join(path[: depth + 1])
            return f"{where}: unknown key{nearest(part, names)} Valid here: {', '.join(names)}" if names else message
        node = node[part]
    return message


if __name__ == "__main__":
    main()
