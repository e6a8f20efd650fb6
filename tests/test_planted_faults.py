"""Faults, planted one at a time in a copy of the sources; each must make the test that guards it fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# fault: (file, the line as it is, the line with the fault, the test that must fail)
FAULTS = {
    "gate and up swapped": (
        "upcycle/pieces.py",
        'sources = tuple(f"{source}.{part}.{kind}" for part in parts)',
        'sources = tuple(f"{source}.{part}.{kind}" for part in parts[::-1])',
        "tests/test_assembly.py::test_mixture_on_disk_equals_the_reference_mixture",
    ),
    "softmax order": (
        "upcycle/routing.py",
        "return Routing(logits_TE, top.softmax(-1), experts)",
        "return Routing(logits_TE, logits_TE.softmax(-1).gather(1, experts), experts)",
        "tests/test_routing.py::test_router_equals_loop_over_tokens",
    ),
    "expert order": (
        "upcycle/assembly.py",
        "return piece.stack(list(cuts.values())), row",
        "return piece.stack(list(cuts.values())[::-1]), row",
        "tests/test_assembly.py::test_proof_holds_and_is_written",
    ),
    "a missing 1/E": (
        "upcycle/merge.py",
        "weights = [1 / len(tensors)] * len(tensors) if weights is None",
        "weights = [1.0] * len(tensors) if weights is None",
        "tests/test_assembly.py::test_soup_is_the_average",
    ),
    "pads counted": (
        "upcycle/losses.py",
        "valid_BS1 = valid_BS.unsqueeze(-1).to(probs_BSE.dtype)",
        "valid_BS1 = torch.ones_like(valid_BS).unsqueeze(-1).to(probs_BSE.dtype)",
        "tests/test_losses.py::test_padding_never_counts",
    ),
    "K and V averaged from the wrong branch": (
        "upcycle/assembly.py",
        "return piece.cut(METHODS[choice.merge]([tensors[0] for tensors in sources.values()])).to(dtype), row",
        "wrong = [list(sources.values())[-1 if piece.target.split('.')[-2] in ('k_proj', 'v_proj') else i][0] for i in "
        "range(len(sources))]; return piece.cut(METHODS[choice.merge](wrong)).to(dtype), row",
        "tests/test_assembly.py::test_mixture_on_disk_equals_the_reference_mixture",
    ),
    "optimizer state dropped on resume": (
        "upcycle/engine.py",
        "self.optimizer.state[parameter] = state",
        "pass",
        "tests/test_train.py::test_resume_equals_straight_run",
    ),
    "router in bf16": (
        "upcycle/routing.py",
        "logits_TE = F.linear(hidden_TD.float(), self.weight.float())",
        "logits_TE = F.linear(hidden_TD.bfloat16(), self.weight.bfloat16()).float()",
        "tests/test_routing.py::test_router_computes_in_fp32",
    ),
    "seed's expert lost": (
        "upcycle/assembly.py",
        'experts = ({"seed": seed} if choice.include_seed else {}) | branches\n    seed_config',
        "experts = dict(branches)\n    seed_config",
        "tests/test_assembly.py::test_one_call_makes_and_proves_a_mixture",
    ),
    "shuffled test split": (
        "upcycle/data.py",
        "hashlib.sha256(min(hashes[n] for n in docs)).digest()",
        "hashlib.sha256(str(docs).encode()).digest()",
        "tests/test_data.py::test_near_duplicates_share_a_split_whatever_the_order",
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    where = tmp_path_factory.mktemp("faulty")
    for name in ("upcycle", "evals", "launch", "conf", "tests"):
        shutil.copytree(ROOT / name, where / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copyfile(ROOT / name, where / name)
    return where


def outcome(where: Path, test: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "UPCYCLE_NO_SKIP"}
    environment |= {"PYTHONPATH": str(where), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(copy, fault):
    file, whole, faulty, test = FAULTS[fault]
    path = copy / file
    original = path.read_text()
    assert original.count(whole) == 1, f"{file} no longer has the line that this fault replaces: {whole}"
    path.write_text(original.replace(whole, faulty))
    try:
        done = outcome(copy, test)
    finally:
        path.write_text(original)
    assert done.returncode == 1 and "1 failed" in done.stdout, f"{test} did not catch: {fault}\n{done.stdout[-2000:]}"


@pytest.mark.slow
def test_the_same_tests_pass_without_faults(copy):
    for test in sorted({test for *_, test in FAULTS.values()}):
        done = outcome(copy, test)
        assert done.returncode == 0, done.stdout[-2000:]
