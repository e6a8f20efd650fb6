"""What a submission copies beside its run, so that jobs read what was submitted, whatever is edited meanwhile."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from launch.groups import FILES, launch_file
from launch.overrides import TAKES_A_VALUE, quoted
from launch.running import LaunchConfig, SlurmConfig
from upcycle.store import COMMIT, commit

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("upcycle", "launch", "evals", "conf", "hydra_plugins")
OWN_CONF, OWN_FILES = "own_conf", "own_launch"  # in the copy: the directory of --config-dir; launch files and templates


def new_copy(run: Path) -> Path:
    """Where a submission's copy goes. Named by the moment: jobs that are still queued keep theirs."""
    return run.absolute() / "slurm" / f"code-{time.strftime('%Y%m%d-%H%M%S')}"


def keep_code(code: Path) -> None:
    """Copy the package."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
        )
    (code / COMMIT).write_text(commit())


def keep_settings(settings: Sequence[str], code: Path) -> list[str]:
    """Copy the directory of settings files of the user's; the settings that read the copy."""
    kept, before = [], ""
    for word in settings:
        name, _, value = word.partition("=")
        if name in ("--config-dir", "-cd") and value:
            word = f"{name}={_copied(Path(value), code)}"
        elif before in ("--config-dir", "-cd"):
            word = str(_copied(Path(word), code))
        kept.append(word)
        before = word if word in TAKES_A_VALUE else ""
    return kept


def _copied(directory: Path, code: Path) -> Path:
    return Path(shutil.copytree(directory, code / OWN_CONF, dirs_exist_ok=True))


def own_files(launch: SlurmConfig) -> dict[str, Path]:
    """The launch files and templates that are the user's own, by the setting that names each.

    Raises ValueError: launch.config names neither a file nor one of launch/accelerate.
    """
    given = {"launch": {"config": launch.config, "template": launch.template}}
    given |= {f"launch.kinds.{kind}": values for kind, values in launch.kinds.items()}
    found = {}
    for where, values in given.items():
        if (config := values.get("config")) and (file := launch_file(LaunchConfig(config=config))).parent != FILES:
            found[f"{where}.config"] = file
        if template := values.get("template"):
            found[f"{where}.template"] = Path(template).expanduser().absolute()
    return found


def copies_of(files: Mapping[str, Path], code: Path) -> dict[str, Path]:
    """Where the copy of each of `own_files` is. Two settings may name two files of one name."""
    return {setting: code / OWN_FILES / setting / file.name for setting, file in files.items()}


def of_copies(copies: Mapping[str, Path]) -> list[str]:
    """Settings that name the copies, to follow those that named the files."""
    return [f"++{setting}={quoted(copy)}" for setting, copy in copies.items()]


def keep_files(files: Mapping[str, Path], code: Path) -> None:
    """Copy the user's own launch files and templates, and the DeepSpeed settings that a launch file names, which the copy then names."""
    for setting, copy in copies_of(files, code).items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files[setting], copy)
        if setting.endswith(".config"):
            _keep_inner(copy)


def _keep_inner(copy: Path) -> None:
    found = OmegaConf.load(copy)
    inner = OmegaConf.select(found, "deepspeed_config.deepspeed_config_file") if isinstance(found, DictConfig) else None
    if inner not in (None, "none"):
        beside = copy.parent / "deepspeed" / Path(inner).name
        beside.parent.mkdir(exist_ok=True)
        if not Path(inner).is_file():
            raise ValueError(f"{copy.name}: deepspeed_config_file={inner}: no such file; give its absolute path")
        shutil.copyfile(inner, beside)
        OmegaConf.update(found, "deepspeed_config.deepspeed_config_file", str(beside))
        OmegaConf.save(found, copy)
