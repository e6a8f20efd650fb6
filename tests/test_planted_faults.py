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
        "return Routing(logits_TE, logits_TE.gather(1, experts_TK).softmax(-1), experts_TK)",
        "return Routing(logits_TE, logits_TE.softmax(-1).gather(1, experts_TK), experts_TK)",
        "tests/test_routing.py::test_router_equals_loop_over_tokens",
    ),
    "expert order": (
        "upcycle/assembly.py",
        "return piece.stack(list(made.values())), row",
        "return piece.stack(list(made.values())[::-1]), row",
        "tests/test_assembly.py::test_proof_holds_and_is_written",
    ),
    "a missing 1/E": (
        "upcycle/merging.py",
        "alpha=member.weight / total_weight)",
        "alpha=member.weight)",
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
        "{name: Stored(checkpoints[name], source) for name in models}",
        "{name: Stored(checkpoints[models[-1] if source.split('.')[-2] in ('k_proj', 'v_proj') else name], source) for name in models}",
        "tests/test_assembly.py::test_mixture_on_disk_equals_the_reference_mixture",
    ),
    "optimizer state dropped on resume": (
        "upcycle/engine.py",
        "self.optimizer.state[parameter] = state",
        "pass",
        "tests/test_train.py::test_resume_equals_straight_run",
    ),
    "router in bf16": (
        "upcycle/router.py",
        "hidden_BSD = hidden_BSD.float()",
        "hidden_BSD = hidden_BSD.bfloat16().float()",
        "tests/test_routing.py::test_router_computes_in_fp32",
    ),
    "seed's expert lost": (
        "upcycle/experts.py",
        '["seed"] * choice.include_seed + list(branches)',
        "list(branches)",
        "tests/test_assembly.py::test_one_call_makes_and_proves_a_mixture",
    ),
    "a segment decides about itself": (
        "upcycle/router.py",
        "sum_BGE[:, :-1] / size], 1)",
        "sum_BGE[:, 1:] / size], 1)",
        "tests/test_routers.py::test_router[segments, top-k-ffn-causal]",
    ),
    "experts choose among later tokens": (
        "upcycle/routing.py",
        "device=logits_TE.device).tril()",
        "device=logits_TE.device)",
        "tests/test_routers.py::test_router[expert choice-ffn-causal]",
    ),
    "a bias in the gates": (
        "upcycle/routing.py",
        "gates_TK = logits_TE.softmax(-1).gather(1, experts_TK)",
        "gates_TK = (logits_TE.softmax(-1) + (0 if seen.bias_E is None else seen.bias_E)).gather(1, experts_TK)",
        "tests/test_routers.py::test_router[balanced by a bias-ffn-equals its slow twin]",
    ),
    "padding fills a capacity": (
        "upcycle/routing.py",
        "logits_TE.shape[-1]) * valid_BS.unsqueeze(-1)",
        "logits_TE.shape[-1])",
        "tests/test_routers.py::test_router[switch-ffn-any batch and padding]",
    ),
    "what a cache remembers is lost": (
        "upcycle/modeling.py",
        "trace.earlier = remembered(past)",
        "trace.earlier = {}",
        "tests/test_routers.py::test_router[segments, top-k-ffn-generates]",
    ),
    "shards taken from the end": (
        "upcycle/shards.py",
        "chunk(one.of, axis)[one.number]",
        "chunk(one.of, axis)[-1 - one.number]",
        "tests/test_placement.py::test_a_mixture_equals_explicit_sums_over_hidden_units[llama-split]",
    ),
    "the whole bias in every shard": (
        "upcycle/shards.py",
        "bias_of[one.source].double() / one.of",
        "bias_of[one.source].double()",
        "tests/test_placement.py::test_a_mixture_equals_explicit_sums_over_hidden_units[gpt_neox-split]",
    ),
    "other units drawn anew in every matrix": (
        "upcycle/pieces.py",
        'f"{key}{layer}"',
        'f"{key}{target}"',
        "tests/test_placement.py::test_dropping_draws_the_same_share_of_units_anew_in_every_matrix[0.5-llama]",
    ),
    "shards of a group start apart": (
        "upcycle/experts.py",
        "row = copy if grouped else len(experts)",
        "row = len(experts)",
        "tests/test_placement.py::test_scaled_virtual_groups_of_the_seed_are_the_seed",
    ),
    "an ensemble that has seen the token": (
        "evals/ensemble.py",
        "before_NBS = torch.cat([torch.zeros_like(nats_NBS[..., :1]), nats_NBS[..., :-1].cumsum(-1)], -1)",
        "before_NBS = nats_NBS.cumsum(-1)",
        "tests/test_ensemble.py::test_known_posteriors",
    ),
    "a soup chosen on the test split": (
        "launch/recipes.py",
        'chosen = replace(cfg.eval, split="valid", bootstrap_samples=0)',
        "chosen = replace(cfg.eval, bootstrap_samples=0)",
        "tests/test_soups.py::test_the_recipe_chooses_on_the_validation_split_and_measures_on_the_other",
    ),
    "a soup that takes in what harms it": (
        "evals/soups.py",
        "        if found < best:",
        "        if found > best:",
        "tests/test_soups.py::test_candidates_are_tried_in_the_order_of_their_own_nats",
    ),
    "a match that forgets the branches": (
        "launch/matching.py",
        "reference.flops - start.flops",
        "reference.flops",
        "tests/test_matching.py::test_a_compute_matched_dense_run_has_the_flops_of_branches_and_mixture",
    ),
    "a label from all tokens together": (
        "evals/matched.py",
        "return all(abs(one - other) <= CLOSE * other for one, other in pairs)",
        "return abs(sum(ours.values()) - sum(theirs.values())) <= CLOSE * sum(theirs.values())",
        "tests/test_matching.py::test_a_label_is_computed_from_tokens_by_domain_and_flops",
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


def outcome(where: Path, *tests: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "UPCYCLE_NO_SKIP"}
    environment |= {"PYTHONPATH": str(where), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "0", *tests]
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
    done = outcome(copy, *sorted({test for *_, test in FAULTS.values()}))
    assert done.returncode == 0, done.stdout[-2000:]
