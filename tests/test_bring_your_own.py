"""Bring your own checkpoints: the command, from directories that plain transformers wrote to a proved mixture."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import upcycle
from launch.config import build
from launch.overrides import rewritten
from launch.pipeline import main
from launch.recipes import upcycle as declare
from tests.tiny import dense_models, tokens
from upcycle.checkpoint import Checkpoint
from upcycle.explain import explain
from upcycle.store import Store

ROOT = Path(__file__).resolve().parent.parent
OWN = "experiment=bring_your_own"
PRESETS = ", ".join(sorted(path.stem for path in (ROOT / "conf" / "assemble").glob("*.yaml")))


def write_models(root, vocab_size=300, **changes):
    """A seed and two branches that come from it: tied, bf16, in several shards, with a tokenizer."""
    (seed,) = dense_models("llama", 1, dtype=torch.float32, tie_word_embeddings=True, vocab_size=vocab_size, **changes)
    text = [f"{a} plus {b} is {a + b}" for a in range(30) for b in range(30)]
    words = ByteLevelBPETokenizer()
    words.train_from_iterator(text, vocab_size=vocab_size, special_tokens=["<|end|>"], show_progress=False)
    words = PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, eos_token="<|end|>")
    start = {name: tensor.clone() for name, tensor in seed.state_dict().items()}
    for number, name in enumerate(("A", "B", "C")):
        generator = torch.Generator().manual_seed(number)
        for key, tensor in seed.state_dict().items():
            tensor.copy_(start[key] + 0.05 * number * torch.randn(tensor.shape, generator=generator))
        seed.to(torch.bfloat16).save_pretrained(root / name, max_shard_size="20KB")
        seed.to(torch.float32)
        words.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = write_models(tmp_path_factory.mktemp("models"))
    assert len(list((root / "A").glob("*.safetensors"))) > 1
    return root


@pytest.fixture
def command(monkeypatch, tmp_path, tmp_path_factory, capsys):
    """Run `upcycle ...` in this process and an empty directory; gives (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # the cache of hashes
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["upcycle", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as exit:
            status = exit.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def given(models, **more):
    branches = {"code": models / "B", "math": models / "C"} | more
    return [f"seed.path={models / 'A'}", *(f"branches.{name}.path={path}" for name, path in branches.items())]


def everything(root):
    return sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*") if path.suffix != ".lock")


def test_one_command_makes_proves_and_delivers_the_mixture(models, tmp_path):
    """As typed, in a process of its own; the same bits as the function writes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "HOME": str(tmp_path)}
    arguments = [OWN, *given(models), "assemble=bam", "out=moe"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "assemble/mixture: 3 checkpoints fit together" in done.stdout and "note" not in done.stdout
    assert done.stdout.endswith("\nmixture: moe\n") and "\nproof       " in done.stdout
    path = upcycle.assemble(
        seed=models / "A", branches={"code": models / "B", "math": models / "C"}, out=tmp_path / "same", method="bam"
    )
    ours, theirs = Checkpoint(tmp_path / "moe"), Checkpoint(path)
    assert ours.names == theirs.names and all(torch.equal(ours.get(name), theirs.get(name)) for name in ours.names)
    assert explain(tmp_path / "moe").tensors == explain(path).tensors
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    assert found.config.experts == ["seed", "code", "math"] and found.config.attention == "mixture"
    assert found.dtype == torch.bfloat16 and torch.isfinite(found(tokens()).logits).all()
    assert (tmp_path / "moe" / "tokenizer.json").read_bytes() == (models / "A" / "tokenizer.json").read_bytes()
    (stored,) = (tmp_path / "artifacts").glob("assemble-mixture-*/")
    for file in (path for path in stored.iterdir() if path.is_file()):
        assert (tmp_path / "moe" / file.name).read_bytes() == file.read_bytes()


def test_a_second_run_computes_nothing_and_sources_enter_by_content(models, tmp_path, command):
    status, first, _ = command(OWN, *given(models))
    assert status == 0 and first.count("made in") == 4
    (stored,) = (tmp_path / "artifacts").glob("assemble-mixture-*/")
    assert first.endswith(f"\nmixture: {stored}\n") and "family      llama, 2 layers" in first
    before = everything(tmp_path / "artifacts")
    moved = shutil.copytree(models, tmp_path / "moved elsewhere=")
    status, second, _ = command(OWN, *given(moved), "out=to/here")
    assert status == 0 and "made in" not in second and "fit together" not in second
    assert everything(tmp_path / "artifacts") == before
    delivered = everything(tmp_path / "to")
    status, third, _ = command(OWN, *given(moved), "out=to/here")
    assert status == 0 and third == second and everything(tmp_path / "to") == delivered
    manifest = json.loads((tmp_path / "runs" / "bring_your_own" / "manifest.json").read_text())
    assert list(manifest) == ["seed", "branch/code", "branch/math", "assemble/mixture"]


def test_names_on_the_hub_are_found_in_its_cache(models, tmp_path, command, monkeypatch):
    """The cache's own layout: snapshots of links into blobs. The same content is the same artifact."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("A", "B"):
        folder, revision = tmp_path / "hub" / f"models--me--{name}", "0123456789abcdef0123456789abcdef01234567"
        for part in ("blobs", "refs", f"snapshots/{revision}"):
            (folder / part).mkdir(parents=True)
        (folder / "refs" / "main").write_text(revision)
        for number, file in enumerate(sorted((models / name).iterdir())):
            shutil.copyfile(file, folder / "blobs" / f"{number}")
            (folder / "snapshots" / revision / file.name).symlink_to(f"../../blobs/{number}")
    status, printed, error = command(OWN, "seed.path=me/A", "branches.code.path=me/B@main", "out=hub_moe")
    assert status == 0, error
    status, again, error = command(OWN, f"seed.path={models / 'A'}", f"branches.code.path={models / 'B'}", "out=moe")
    assert status == 0 and "made in" in printed and "made in" not in again
    assert not any(path.is_symlink() for path in (tmp_path / "artifacts").rglob("*"))


def test_a_sweep_over_presets_shares_the_checkpoints(models, tmp_path, command):
    status, printed, _ = command("-m", OWN, *given(models), "assemble=btx,bam")
    assert status == 0
    lines = printed.splitlines()
    assert [line for line in lines if line.startswith("run ")] == ["run 0: assemble=btx", "run 1: assemble=bam"]
    made = [line.split()[0] for line in lines if "made in" in line]
    assert made == ["seed", "branch/code", "branch/math", "assemble/mixture", "assemble/mixture"]


# What a plan and a written mixture say in their own words, or only one of them.
ELSEWHERE = ("mixture ", "  seed", "  code", "  math", "proof ", "kinship ")


def test_a_dry_run_prints_what_explain_prints_later_and_writes_nothing(models, tmp_path, command):
    arguments = [OWN, *given(models), "assemble=bam_shared_kv", "assemble.router.top_k=2", "assemble.dtype=float16"]
    arguments += ["assemble.router.gate_scale=none"]
    status, planned, _ = command(*arguments, "assemble.dry_run=true")
    assert status == 0 and list(tmp_path.iterdir()) == []
    assert command(*arguments, "out=moe")[0] == 0
    later = explain(tmp_path / "moe").text().splitlines()
    same = [line for line in planned.splitlines() if not line.startswith(ELSEWHERE)]
    assert "routers     softmax_topk, top 2 of 3, gate_scale none" in same and len(same) > 15
    assert same == [line for line in later if not line.startswith(ELSEWHERE)]
    assert f"  code      {models / 'B'}" in planned.splitlines()
    assert sum(line.startswith("kinship ") for line in planned.splitlines()) == 3
    assert planned.startswith(f"mixture     would be written to {tmp_path / 'artifacts' / 'assemble-mixture-'}")


def test_a_dry_run_needs_checkpoints_to_look_at(models, command):
    status, _, error = command("experiment=tiny", "+assemble.dry_run=true", f"branches.code.path={models / 'A'}")
    assert status == 2 and error == (
        "upcycle: assemble.dry_run=true: seed, branch/law, branch/math are not trained yet, expected checkpoints to look "
        "at; run stage=seed first, or give a path in its place\n"
    )


@pytest.mark.parametrize("content", ["a file", "a directory with something in it"])
def test_a_destination_in_use_is_refused_before_any_work(models, tmp_path, command, content):
    if content == "a file":
        (tmp_path / "moe").write_text("mine")
    else:
        (tmp_path / "moe").mkdir()
        (tmp_path / "moe" / "stage.json").write_text('{"key": "another"}')
    status, _, error = command(OWN, *given(models), "out=moe")
    assert status == 2
    assert error == "upcycle: out=moe exists already and is not an empty directory; name one that is, or a new one\n"
    assert not (tmp_path / "artifacts").exists()


def test_checkpoints_that_do_not_fit_stop_before_they_are_copied(models, tmp_path, command):
    other = shutil.copytree(models / "C", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.25}))
    status, _, error = command(OWN, *given(models, math=other))
    assert status == 2 and "Traceback" not in error and not (tmp_path / "artifacts").exists()
    assert f"branch 'math' ({other}) against the seed ({models / 'A'})" in error
    assert "rms_norm_eps is 0.25, expected the seed's 1e-06" in error


def test_a_brought_branch_is_checked_before_the_others_are_trained(models, tmp_path, command):
    other = shutil.copytree(models / "C", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.25}))
    training = ["branch.tokens=64", "+branches.sums.train.proportions.sums=1.0", "branch.sequence_length=32"]
    arguments = with_domains(models, tmp_path, *training, "assemble.include_seed=false")
    status, _, error = command(*arguments, f"branches.law.path={other}")
    assert status == 2 and "branch 'law'" in error and "rms_norm_eps is 0.25" in error
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "seed.path: missing; give it a value (seed.path=...)"),
        (["seed.path=A"], "mixtures.mixture has no branch to be made of, expected at least one; give it as "
         "branches.NAME.path=DIR with a name of your choice"),
        (["seed.path=A", "branches.code.path=B", "assemble.router.top_k=3"],
         "assemble.router.top_k=3 exceeds the 2 experts (seed, code); lower top_k or add a branch"),
        (["seed.path=A", "branches.code.path=B", "assemble=bamm"],
         f"assemble=bamm: no such file; did you mean bam? Choices: {PRESETS}."),
        (["seed.path=A", "branches.code.path=B", "branches.code.path=C"],
         "branches.code.path is given twice (B, C), expected one checkpoint for each branch; give the other branch a name "
         "of its own"),
        (["seed.path=A", "branches.code=B"],
         "branches.code=B: expected settings of the branch; write branches.code.path=B"),
        (["seed.path=A", "branches.2nd.path=B"],
         "branches.2nd: expected a name of letters, digits, - and _ that starts with a letter; rename the branch"),
        (["seed.path=A", "branches.seed.path=B"],
         "branches.seed: that name belongs to a model of every report, expected names that are all different (and none of "
         "seed, soup, greedy_soup, btm, dense, dense_compute, oracle); rename branches.seed"),
        (["seed.path=A", "branches.code.path=B", "+branches.code.train.tokens=5"],
         "branches.code: got path=B and train, expected exactly one of them; set branches.code.train=null to take the "
         "checkpoint as it is"),
        (["seed.path=A", "branches.code.path=B", "+branches.law.path=null"],
         "branches.law: got path=None and no train, expected exactly one of them; give the branch its checkpoint (path) or "
         "tokens to train on (train)"),
        (["seed.path=A", "branches.code.path=B", "mix.tokens=512"],
         "mix: proportions={} must name domains with shares >= 0 that sum above 0"),
        (["seed.path=A", "branches.code.path=B", "mix.tokens=512", "+mix.proportions.code=1.0"],
         "mix.tokens=512, but no domain has text to train on; add one (such as +domains@domains.code=code) and its share "
         "(+mix.proportions.code=1.0), or set the tokens to 0"),
        (["seed.path=A", "branches.code.path=B", "mixtures=null", "out=moe"],
         "out=moe: this experiment makes 0 mixtures (none), expected exactly one to copy there; leave out= out and take them "
         "from the store"),
    ],
)  # fmt: skip
def test_mistakes_are_named(models, tmp_path, command, arguments, message):
    for name in ("A", "B", "C"):
        (tmp_path / name).symlink_to(models / name)
    status, printed, error = command(OWN, *arguments)
    assert (status, printed, error) == (2, "", f"upcycle: {message}\n")


def test_any_branch_of_any_experiment_may_be_brought(models):
    overrides = rewritten(["experiment=tiny", f"branches.law.path={models / 'B'}", f"branches.new.path={models / 'C'}"])
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        raw = compose("config", overrides=overrides)
    cfg = build(OmegaConf.to_container(raw, resolve=True, throw_on_missing=True))
    origins = {name: (branch.path, branch.train is None) for name, branch in cfg.branches.items()}
    assert origins == {
        "code": (None, False), "law": (str(models / "B"), True), "math": (None, False), "new": (str(models / "C"), True),
    }  # fmt: skip
    stages = declare(cfg, Store("nowhere")).store.stages
    assert stages["branch/law"].function.__name__ == "import_model" and "assemble/bam" in stages


def test_arguments_are_rewritten_as_hydra_wants_them():
    def brought(name, path):
        return [f"++branches.{name}.path={path}", f"++branches.{name}.train=null"]

    assert rewritten(["seed.path=A", "branches.a-b.path=/x/y.z", "+branches.c.path=B"]) == [
        "seed.path=A", *brought("a-b", "/x/y.z"), *brought("c", "B"),
    ]  # fmt: skip
    assert rewritten(["out=~/it's=é", "branches.c.path=a b"]) == ["out='~/it\\'s=é'", *brought("c", "'a b'")]
    assert rewritten(["seed.path=2024", "out=null", "seed.path='q=1'"]) == [
        "seed.path='2024'",
        "out=null",
        "seed.path='q=1'",
    ]
    assert rewritten(["branches.c.path=A,B"]) == brought("c", "'A,B'")  # one directory, but in a sweep two
    assert rewritten(["branches.c.path=A,B", "-m"]) == ["-m", *brought("c", "A,B")]
    own = ["branches.c.path=A", "branches.c.train=null"]
    assert rewritten(own) == ["++branches.c.path=A", "branches.c.train=null"]
    for same in ([], ["mix.lr=1", "~data", "+a=1"], ["branches.c.path=null"], ["+branches.c={path: A}"]):
        assert rewritten(same) == same
    mixed = ["a=b", "--config-dir", "x=y", "+c=d", "--config-name=e", "~f", "-m"]
    assert rewritten(mixed) == ["--config-dir", "x=y", "--config-name=e", "-m", "a=b", "+c=d", "~f"]


def with_domains(models, tmp_path, *more):
    domains = []
    for number, name in enumerate(("sums", "more")):
        rng = random.Random(number)
        lines = [{"text": " ".join(f"{rng.getrandbits(30)}" for _ in range(60))} for _ in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        domains += [f"+domains@domains.{name}=code", f"domains.{name}.source=json", f"domains.{name}.path={name}.jsonl"]
    lengths = ["eval.sequence_length=32", "eval.max_tokens=200", "eval.bootstrap_samples=100"]
    return [OWN, *given(models), *domains, *lengths, *more]


TRAINED = [
    "mix.tokens=256", "mix.sequence_length=32", "mix.batch_sequences=2", "mix.micro_batch_sequences=2",
    "mix.max_epochs=100", "+mix.proportions.sums=0.5", "+mix.proportions.more=0.5",
]  # fmt: skip


@pytest.mark.parametrize("trained", [False, True])
def test_domains_add_training_and_measurement(models, tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    overrides = rewritten(with_domains(models, tmp_path, *(TRAINED if trained else [])))
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        raw = compose("config", overrides=overrides)
    cfg = build(OmegaConf.to_container(raw, resolve=True, throw_on_missing=True))
    found = declare(cfg, Store("nowhere"))
    last = "mix/mixture" if trained else "assemble/mixture"
    assert list(found.store.stages) == [
        "seed", "documents/sums", "documents/more", "tokens/sums", "tokens/more", "branch/code", "branch/math",
        "assemble/mixture", *["mix/mixture"] * trained, "eval/seed", "eval/code", "eval/math", "eval/mixture", "report",
    ]  # fmt: skip
    assert found.mixtures == {"mixture": found.store.stages[last]}
    assert found.store.stages["eval/mixture"].inputs["model"] == found.store.stages[last]
    (row,) = [row for row in found.store.stages["report"].config["rows"] if row["name"] == "mixture"]
    assert row["learning_rate"] == (1e-4 if trained else None) and row["kind"] == "btx"
    assert row["active_parameters"] < row["parameters"]


@pytest.mark.slow
def test_a_brought_mixture_is_trained_and_measured(models, tmp_path, command):
    status, printed, error = command(*with_domains(models, tmp_path, *TRAINED), "out=moe", "soup=true")
    assert status == 0, error
    report = json.loads((tmp_path / "runs" / "bring_your_own" / "report.json").read_text())
    kinds = {name: model["kind"] for name, model in report["models"].items()}
    assert kinds == {"seed": "seed", "code": "branch", "math": "branch", "soup": "soup", "mixture": "btx"}
    assert printed.endswith("\nmixture: moe\n")
    (stored,) = (tmp_path / "artifacts").glob("mix-mixture-*/")
    found = explain(stored)
    (start,) = (tmp_path / "artifacts").glob("assemble-mixture-*/")
    assert found.notes[0] == f"trained after its assembly (stage mix/mixture); origins are those of {start}"
    assert [row.origin for row in found.tensors] == [row.origin for row in explain(start).tensors]
    before, after = Checkpoint(start), Checkpoint(tmp_path / "moe")
    assert before.names == after.names
    assert any(not torch.equal(before.get(name).float(), after.get(name).float()) for name in before.names)


ROUTER_KEYS = "kind, top_k, gate_order, gate_scale, router_gradient, trained, capacity_factor, bias_rate, pool, noise, init, losses"


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"method": "bamm"},
            f"method='bamm' is not known; expected one of {PRESETS}; did you mean bam?",
        ),
        (
            {"rooter": {}},
            "rooter: unknown key; did you mean router or prove? Valid here: router, attention, attention_router, kv, tie, placement, combine, merge, "
            "include_seed, dtype, max_shard_bytes, prove, rng_seed",
        ),
        ({"router": {"topk": 1}}, f"router.topk: unknown key; did you mean top_k? Valid here: {ROUTER_KEYS}"),
        ({"router": {"top_k": "two"}, "kv": 3}, "router.top_k: Input should be a valid integer (got 'two')\nkv: Input should "
         "be 'expert' or 'shared' (got 3)"),
        (
            {"kv": "shared"},
            "kv=shared has no effect with attention=merged, which has one attention and so one set of keys and values; write "
            "kv=expert, or attention=mixture for attention experts that share keys and values",
        ),
    ],
)  # fmt: skip
def test_the_functions_mistakes_are_named_like_the_commands(tmp_path, choices, message):
    with pytest.raises(ValueError) as error:
        upcycle.assemble(seed=tmp_path, branches={"code": tmp_path}, out=tmp_path / "moe", **choices)
    assert str(error.value) == message


def test_the_function_refuses_a_directory_in_use_and_takes_an_empty_one(models, tmp_path):
    branches = {"code": models / "B"}
    for name in ("empty", "used"):
        (tmp_path / name).mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ValueError) as error:
        upcycle.assemble(seed=models / "A", branches=branches, out=tmp_path / "used")
    assert str(error.value) == (
        f"out={tmp_path / 'used'} exists already and is not an empty directory; name one that is, or a new one"
    )
    path = upcycle.assemble(seed=models / "A", branches=branches, out=tmp_path / "empty", prove=False)
    assert path == tmp_path / "empty" and explain(path).experts == ["seed", "code"]
