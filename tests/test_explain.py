"""What a mixture came from: the same before writing, after writing, and whatever of its files is left."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import upcycle
from launch.cli import explain as explain_word
from tests.tiny import dense_models
from upcycle.checkpoint import Checkpoint
from upcycle.cost import Shape
from upcycle.explain import explain, explain_plan
from upcycle.mixture_config import AssembleConfig
from upcycle.modeling import UpcycledForCausalLM
from upcycle.router_config import RouterConfig

ROOT = Path(__file__).resolve().parent.parent
MIXTURES = [("merged", "expert"), ("mixture", "expert"), ("mixture", "shared")]
NAMES = ("seed", "code", "law")


def write_sources(root, kind="llama", dtype=torch.bfloat16, **changes):
    """Three dense models, as plain transformers writes them."""
    for name, model in zip(NAMES, dense_models(kind, 3, dtype=dtype, **changes), strict=True):
        model.save_pretrained(root / name, max_shard_size="20KB")
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("sources"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def mixture(sources, tmp_path_factory):
    """BAM of the three, proved, in several shards."""
    branches = {name: sources[name] for name in ("code", "law")}
    out = tmp_path_factory.mktemp("mixture") / "moe"
    return assembled(sources["seed"], branches, out, method="bam", max_shard_bytes=20_000)


@pytest.fixture
def copy(mixture, tmp_path):
    return shutil.copytree(mixture, tmp_path / "copy")


def assembled(seed, branches, out, **choices):
    with pytest.warns(UserWarning, match="does not look like a continuation of the seed"):  # they are strangers
        return upcycle.assemble(seed=seed, branches=branches, out=out, **choices)


def branches_of(sources):
    return {name: path for name, path in sources.items() if name != "seed"}


@pytest.mark.parametrize(("attention", "kv"), MIXTURES)
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_counts_are_those_of_the_model_and_of_its_cost(tmp_path, kind, attention, kv):
    sources = write_sources(tmp_path, kind)
    out = assembled(sources["seed"], branches_of(sources), tmp_path / "moe", attention=attention, kv=kv, prove=False)
    found, model = explain(out), UpcycledForCausalLM.from_pretrained(out)
    shape = Shape.of_config(json.loads((out / "config.json").read_text()))
    assert found.parameters == shape.parameters == sum(p.numel() for p in model.parameters())
    idle = sum(p[0].numel() for name, p in model.named_parameters() if ".experts." in name)  # 1 of 3 with top-2
    assert found.active_parameters == shape.active_parameters == found.parameters - idle
    shards = [load_file(path) for path in out.glob("*.safetensors")]
    assert found.bytes == sum(tensor.nbytes for shard in shards for tensor in shard.values())
    assert (found.family, found.layers, found.experts) == (kind, 2, list(NAMES))


def test_a_soft_mixture_has_only_active_parameters(sources, tmp_path):
    out = assembled(sources["seed"], branches_of(sources), tmp_path / "moe", method="btx_soft", prove=False)
    found = explain(out)
    assert found.active_parameters == found.parameters
    assert "routers     soft, every expert in every token, gate_scale none" in found.summary().splitlines()


@pytest.mark.parametrize(("attention", "kv"), MIXTURES)
@pytest.mark.parametrize("include_seed", [True, False])
def test_planned_is_what_gets_written(sources, tmp_path, attention, kv, include_seed):
    choice = {"attention": attention, "kv": kv, "include_seed": include_seed, "dtype": "float16"}
    out = assembled(sources["seed"], branches_of(sources), tmp_path / "moe", **choice, prove=False)
    planned = explain_plan(sources["seed"], branches_of(sources), AssembleConfig(**choice))
    written = explain(out)
    assert [replace(row, files={}) for row in planned.tensors] == [replace(row, files={}) for row in written.tensors]
    for field in ("family", "layers", "experts", "routers", "parameters", "active_parameters", "bytes"):
        assert getattr(planned, field) == getattr(written, field), field
    assert planned.sources == {name: str(sources[name]) for name in planned.experts}


def test_planned_rows_name_the_files_of_every_source(sources):
    found = explain_plan(sources["seed"], branches_of(sources), AssembleConfig(attention="mixture"))
    index = json.loads((sources["code"] / "model.safetensors.index.json").read_text())["weight_map"]
    used = set()
    for row in found.tensors:
        assert row.origin == "fresh" or row.files["code"] == [index[source] for source in row.sources], row.target
        used |= set(row.sources)
    assert used == set(index) and len(set(index.values())) > 1
    (line,) = [line for line in found.text(every_tensor=True).splitlines() if "layers.0.mlp.experts.down_proj" in line]
    place = index["model.layers.0.mlp.down_proj.weight"]
    assert line.endswith(f"  model.layers.0.mlp.down_proj.weight, of 3 experts, in {place}")


def test_every_stored_tensor_has_an_origin(mixture, sources):
    found, stored = explain(mixture), Checkpoint(mixture)
    rows = {row.target: row for row in found.tensors}
    assert set(rows) == set(stored.names)
    origins = {origin: {name for name, row in rows.items() if row.origin == origin} for origin in ("fresh", "averaged")}
    assert origins["fresh"] == {name for name in stored.names if name.endswith("router.weight")}
    for name in origins["averaged"]:
        (source,) = rows[name].sources
        parts = [Checkpoint(path).get(source).float() for path in sources.values()]
        torch.testing.assert_close(stored.get(name).float(), torch.stack(parts).mean(0), rtol=2**-7, atol=1e-6)
    for name in set(rows) - origins["fresh"] - origins["averaged"]:
        assert rows[name].origin == "stacked" and rows[name].experts == list(NAMES)
        assert rows[name].parameters == 3 * sum(Checkpoint(sources["law"]).get(s).numel() for s in rows[name].sources)


def test_the_table_has_a_line_for_each_kind_of_tensor(mixture):
    lines = explain(mixture).text().splitlines()
    assert lines[:3] == [f"mixture     {mixture}", "family      llama, 2 layers", "experts     0 seed, 1 code, 2 law"]
    assert "routers     softmax_topk, top 1 of 3, gate_scale straight_through" in lines
    assert "losses      balance switch, coefficient 0.01, per sequence; z, coefficient 0.001" in lines
    assert "attention   mixture of 3, kv expert" in lines
    assert "  routers   soft, every expert in every token, gate_scale none" in lines
    (proof,) = [line for line in lines if line.startswith("proof ")]
    assert "one hot errors at most " in proof and "mean gate sum 1" in proof
    table = [line.split(maxsplit=6) for line in lines[lines.index("") + 2 :]]
    by_target = {row[5]: row for row in table}
    assert len(by_target) == len(table)
    stem = "model.decoder.layers.*.mlp."
    assert by_target[f"{stem}experts.gate_up_proj"] == [
        "stacked", "2", "3x80x32", "bfloat16", "15,360", f"{stem}experts.gate_up_proj",
        "model.layers.*.mlp.gate_proj.weight + up_proj.weight, of 3 experts",
    ]  # fmt: skip
    assert by_target[f"{stem}router.weight"] == ["fresh", "2", "3x32", "float32", "192", f"{stem}router.weight"]
    assert sum(int(row[1]) for row in table) == len(explain(mixture).tensors)


def test_copied_norms_say_whose_they_are(tmp_path):
    """Query and key norms of a soft mixture: each expert keeps its own."""
    sources = write_sources(tmp_path, "family/qwen3")
    found = explain_plan(sources["seed"], branches_of(sources), AssembleConfig(attention="mixture"))
    copied = [row for row in found.tensors if row.origin == "copied"]
    assert [row.experts for row in copied if "layers.0" in row.target and "q_norm" in row.target] == [
        ["seed"], ["code"], ["law"],
    ]  # fmt: skip
    assert "model.layers.*.self_attn.q_norm.weight, of one expert each" in found.text()


def test_the_word_prints_json_and_every_tensor(mixture, capsys):
    assert explain_word([str(mixture), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = explain(mixture)
    assert (found["parameters"], found["active_parameters"]) == (expected.parameters, expected.active_parameters)
    assert found["proof"] == json.loads((mixture / "proof.json").read_text())
    assert [row["target"] for row in found["tensors"]] == [row.target for row in expected.tensors]
    assert explain_word([str(mixture), "--all"]) == 0
    printed = capsys.readouterr().out
    assert all(f" {name} " in printed for name in Checkpoint(mixture).names)
    assert explain_word([]) == 2 and explain_word([str(mixture), "--al"]) == 2
    assert capsys.readouterr().err == (
        "upcycle: explain: got nothing, expected DIR [--all] [--json]\n"
        f"upcycle: explain: got {mixture} --al, expected DIR [--all] [--json]\n"
    )


def test_explaining_imports_no_torch(mixture):
    code = "import sys; from upcycle.explain import explain; print(explain(sys.argv[1])); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(mixture)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == explain(mixture).text() + "\n", done.stderr


def test_a_missing_shard_is_named_and_nothing_is_counted(copy):
    shard = sorted(copy.glob("*.safetensors"))[1]
    lost = set(load_file(shard))
    shard.unlink()
    found = explain(copy)
    assert found.notes == [f"{shard.name} is missing, which the index names: its tensors are not counted"]
    assert {row.target for row in found.tensors if row.shape is None} == lost
    assert found.parameters is found.active_parameters is found.bytes is None
    assert "parameters  unknown, active per token unknown" in found.text().splitlines()


def test_missing_notes_of_assembly_are_said(copy, mixture):
    (copy / "assembly.json").unlink()
    (copy / "proof.json").unlink()
    found = explain(copy)
    assert found.notes == [
        "assembly.json is missing: what the tensors came from is not known",
        "proof.json is missing: these weights were not compared with the experts they came from",
    ]
    assert {row.origin for row in found.tensors} == {"unknown"} and found.parameters == explain(mixture).parameters
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    assert explain(copy).notes[-1] == "there are no weights (*.safetensors)" and explain(copy).tensors == []


def test_a_trained_mixture_has_the_origins_of_the_one_it_was_trained_from(mixture, tmp_path):
    start, trained = tmp_path / "assemble-bam-0123abcd", tmp_path / "mix-bam-ffff0000"
    for path in (start, trained):
        shutil.copytree(mixture, path)
    (trained / "proof.json").unlink()
    inputs = {"seed": "1" * 64, "branch/code": "2" * 64, "branch/law": "3" * 64}
    (start / "stage.json").write_text(
        json.dumps({"stage": "assemble/bam", "function": "assemble_moe", "inputs": inputs})
    )
    record = {"stage": "mix/bam", "function": "train_model", "inputs": {"assemble/bam": "0123abcd" + "0" * 56}}
    (trained / "stage.json").write_text(json.dumps(record))
    found, before = explain(trained), explain(start)
    assert found.tensors == before.tensors
    assert found.sources == before.sources
    assert found.sources == {"seed": "seed-11111111", "code": "branch-code-22222222", "law": "branch-law-33333333"}
    assert found.notes[0] == f"trained after its assembly (stage mix/bam); origins are those of {start}"
    assert found.proof is None and before.proof is not None


def test_what_is_no_mixture_is_refused(sources, copy, tmp_path):
    with pytest.raises(ValueError) as error:
        explain(sources["seed"])
    assert str(error.value) == (
        f"{sources['seed']}: model_type='llama', expected 'upcycled', a mixture as upcycle.assemble writes it; of other "
        "models nobody has written down what their tensors came from"
    )
    with pytest.raises(ValueError) as error:
        explain(tmp_path)
    assert str(error.value) == f"{tmp_path}: no config.json there; expected the directory of a mixture"
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(ValueError, match=rf"{shard}: not a whole safetensors file \(.*\); copy it again"):
        explain(copy)


def test_a_dry_run_writes_nothing_and_returns_the_plan(sources, tmp_path):
    branches, before = branches_of(sources), sorted(tmp_path.rglob("*"))
    out = tmp_path / "new" / "moe"
    found = upcycle.assemble(seed=sources["seed"], branches=branches, out=out, method="bam_shared_kv", dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert found.directory == f"would be written to {out}" and found.routers["kv"] == "shared"
    assert [note.split(" (")[0] for note in found.notes] == ["branch 'code'", "branch 'law'"]
    assert f"bytes       {found.bytes:,} (bfloat16, float32)" in str(found).splitlines()
    soft = AssembleConfig(router=RouterConfig(kind="soft", top_k=1))
    assert explain_plan(sources["seed"], branches, soft).routers["num_experts_per_tok"] == 3
    with pytest.raises(ValueError, match="a branch is called 'seed'"):
        upcycle.assemble(seed=sources["seed"], branches={"seed": branches["law"]}, dry_run=True)
    with pytest.raises(ValueError, match="^out is missing; name the directory that the mixture is to be written to$"):
        upcycle.assemble(seed=sources["seed"], branches=branches)


def test_files_of_other_names_are_told_apart(sources, tmp_path):
    whole = dense_models("llama", 1, dtype=torch.bfloat16, tie_word_embeddings=True)[0]
    whole.save_pretrained(tmp_path / "whole")  # not in shards
    lines = explain_plan(sources["seed"], {"whole": tmp_path / "whole"}, AssembleConfig()).text(True).splitlines()
    at = next(number for number, line in enumerate(lines) if "layers.0.mlp.experts.down_proj" in line)
    assert lines[at].endswith("of 2 experts") and lines[at + 2].strip() == "whole in model.safetensors"
    assert lines[at + 1].strip() == "seed in model-00001-of-00002.safetensors"


def test_files_that_an_assembly_wrote_down_are_shown(copy, sources):
    planned = explain_plan(sources["seed"], branches_of(sources), AssembleConfig(attention="mixture"))
    assembly = json.loads((copy / "assembly.json").read_text())
    for made, row in zip(assembly["tensors"], planned.tensors, strict=True):
        made["files"] = row.files
    (copy / "assembly.json").write_text(json.dumps(assembly, sort_keys=True))
    found = explain(copy)
    assert found.tensors == planned.tensors
    assert [list(row.files) for row in found.tensors if row.files] == [
        row.experts for row in found.tensors if row.experts
    ]
