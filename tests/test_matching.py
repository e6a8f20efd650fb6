"""Fair baselines: what a matched run gets, counted by hand, and what the report calls matched."""

from __future__ import annotations

import json

import pytest
import torch

from evals.matched import relative_cost
from evals.tables import table_cells
from launch.plan import train_of
from tests.reports import make_inputs
from tests.test_recipes import configured, declared, keys
from tests.tiny import dense_models
from upcycle.batches import consumed_tokens

SPARSE = "+assemble@mixtures.copies.assemble=sparse_upcycling"
DROP = "+assemble@mixtures.drop.assemble=drop_upcycling"
SCRATCH = ["+assemble@mixtures.fresh.assemble=btx", "+mixtures.fresh.scratch=true"]


def drawn(train) -> dict[str, int]:
    """Tokens of each domain that a run takes, one sequence after the other."""
    total = consumed_tokens(
        train.proportions, train.rng_seed, train.sequence_length, train.steps * train.batch_sequences
    )
    return {domain: count for domain, count in total.items() if count}


def summed(*runs) -> dict[str, int]:
    total: dict[str, int] = {}
    for run in runs:
        for domain, count in drawn(run).items():
            total[domain] = total.get(domain, 0) + count
    return total


def training_flops(hidden, width, layers, heads, vocab, length, experts=1, router=0, tokens=1) -> int:
    """Of a Llama with `experts` feed-forwards a token and tied embeddings: three times 2 a weight, and causal attention."""
    a_layer = 4 * hidden * hidden + experts * 3 * hidden * width + router * hidden + 2 * hidden
    weights = layers * a_layer + vocab * hidden + hidden
    return tokens * 3 * (2 * weights + layers * 2 * length * hidden)


DEMO = {"hidden": 192, "width": 512, "layers": 4, "heads": 3, "vocab": 2048, "length": 128}


def test_copies_of_the_seed_get_the_tokens_of_branches_and_mixture_domain_by_domain():
    cfg = configured("experiment=demo", SPARSE, "+mixtures.copies.match=data")
    experiment = declared("experiment=demo", SPARSE, "+mixtures.copies.match=data")
    stage = experiment.store.stages["mix/copies"]
    expected = summed(*(branch.train for branch in cfg.branches.values()), cfg.mixtures["btx"].train)
    train = train_of(stage)
    assert train.tokens == sum(expected.values())
    for domain, count in drawn(train).items():
        assert count == pytest.approx(expected[domain], abs=2 * train.sequence_length)
    # it reads what the dense continuation reads, from where the seed stopped
    assert stage.config["skip_tokens"] == experiment.store.stages["dense"].config["skip_tokens"]


def test_a_mixture_of_the_branches_gets_what_the_reference_got_after_them():
    plain = declared("experiment=demo").store.stages["mix/bam"]
    stage = declared("experiment=demo", "+mixtures.bam.match=data").store.stages["mix/bam"]
    assert drawn(train_of(stage)) == drawn(train_of(plain))
    assert stage.config["skip_tokens"] == plain.config["skip_tokens"]


def test_a_compute_matched_dense_run_has_the_flops_of_branches_and_mixture():
    cfg = configured("experiment=demo", "dense_compute={lr: 4e-3}")
    experiment = declared("experiment=demo", "dense_compute={lr: 4e-3}")
    branches = sum(run.train.steps * run.train.batch_tokens for run in cfg.branches.values())
    mix = cfg.mixtures["btx"].train
    spent = training_flops(**DEMO, tokens=branches)
    spent += training_flops(**DEMO, experts=2, router=4, tokens=mix.steps * mix.batch_tokens)
    train = train_of(experiment.store.stages["dense_compute"])
    assert train.tokens % train.batch_tokens == 0
    assert abs(training_flops(**DEMO, tokens=train.tokens) - spent) <= training_flops(**DEMO, tokens=train.batch_tokens)
    assert train.tokens > experiment.store.stages["dense"].config["train"].tokens  # a mixture's token costs more
    lineages = experiment.lineages
    assert lineages["btx"].flops - lineages["seed"].flops == pytest.approx(spent)


def test_a_compute_matched_mixture_leaves_its_branches_out_of_what_it_may_spend():
    """BAM costs more a token than BTX, so it gets fewer of the mixture's tokens; the branches are the same."""
    experiment = declared("experiment=demo", "+mixtures.bam.match=compute")
    found, lineages = train_of(experiment.store.stages["mix/bam"]), experiment.lineages
    mix = train_of(experiment.store.stages["mix/btx"])
    costs = [lineages[name].shape.train_flops_per_token(128) for name in ("btx", "bam")]
    assert found.tokens == round(mix.steps * costs[0] / costs[1]) * found.batch_tokens
    assert found.proportions == pytest.approx(mix.proportions, abs=0.01)


def test_a_mixture_from_scratch_gets_the_seeds_tokens_too_and_none_of_its_weights():
    overrides = ["experiment=demo", *SCRATCH, "+mixtures.fresh.match=data"]
    cfg, experiment = configured(*overrides), declared(*overrides)
    runs = [cfg.seed.train, *(branch.train for branch in cfg.branches.values()), cfg.mixtures["btx"].train]
    stage = experiment.store.stages["mix/fresh"]
    assert train_of(stage).tokens == sum(summed(*runs).values())
    assert not any(stage.config["skip_tokens"].values())
    fresh, btx = experiment.lineages["fresh"], experiment.lineages["btx"]
    assert fresh.stages == [["assemble/fresh"], ["mix/fresh"]] and fresh.shape == btx.shape
    assert fresh.tokens == pytest.approx(btx.tokens, rel=0.01) and fresh.flops > btx.flops


def test_matching_is_to_the_first_trained_mixture_or_the_one_that_is_named():
    longer = ["experiment=demo", "+mixtures.bam.train.tokens=600000", SPARSE, "+mixtures.copies.match=data"]
    first, named = declared(*longer), declared(*longer, "match_to=bam")
    tokens = [train_of(found.store.stages["mix/copies"]).tokens for found in (first, named)]
    assert tokens[1] - tokens[0] == pytest.approx(300_000, abs=4096)
    assert [found.store.stages["report"].config["reference"] for found in (first, named)] == ["btx", "bam"]


def test_a_match_that_changes_nothing_changes_no_key():
    base = keys("experiment=demo")
    assert keys("experiment=demo", "+mixtures.bam.match=none", "+mixtures.bam.scratch=false") == base
    changed = keys("experiment=demo", "+mixtures.bam.match=compute")
    assert {name for name in base if base[name] != changed[name]} == {"mix/bam", "eval/bam", "report"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["match_to=bim"], r"match_to=bim: expected a mixture that is trained, .*\(btx, .*; did you mean bam\?"),
        (["match_to=bam", "+mixtures.bam.match=data"], r"match_to=bam: expected a mixture that is trained, from branches"),
        (["+mixtures.bam.match=data", "+mixtures.bam.train.tokens=5"],
         r"mixtures\.bam\.train\.tokens=5: match=data says how many tokens .* leave tokens out"),
        (["dense_compute={lr: 1e-3, tokens: 5}"], r"dense_compute\.tokens=5: it gets as many tokens as have the reference"),
        (["mix.tokens=0", "dense_compute={lr: 1e-3}"], r"dense_compute: there is no mixture to match"),
        (["mix.tokens=0", "+mixtures.bam.match=data"], r"match=data says how long to train, and train\.tokens=0 says not to"),
        (["+mixtures.bam.scratch=true", "mix.tokens=0"], r"scratch=true draws every weight at random, and train\.tokens=0"),
        ([SPARSE, "+mixtures.copies.scratch=true"], r"scratch=true draws one feed-forward for each source, and "
         r"assemble\.placement\.experts=seed copies some of them"),
        (["+mixtures.btx.scratch=true", "mixtures.btx.assemble.router.init.kind=domain_centroid"],
         r"scratch=true draws every weight at random, and assemble\.router\.init\.kind=domain_centroid reads texts"),
    ],
)  # fmt: skip
def test_what_cannot_be_matched_is_named_before_anything_runs(overrides, message):
    with pytest.raises(ValueError, match=message):
        declared("experiment=demo", *overrides)


def test_a_branch_of_unknown_cost_matches_nothing(tmp_path):
    dense_models("llama", 1, dtype=torch.float32)[0].save_pretrained(tmp_path)
    branch = [f"++branches.code.path={tmp_path}", "++branches.code.train=null"]
    with pytest.raises(ValueError, match=r"mixtures\.bam\.train: match=compute needs the tokens of every branch"):
        declared("experiment=demo", *branch, "dense=null", "+mixtures.bam.match=compute")


def test_phases_are_laid_over_the_matched_tokens():
    steps = train_of(
        declared("experiment=demo", SPARSE, "+mixtures.copies.match=data").store.stages["mix/copies"]
    ).steps
    phases = "+mixtures.copies.train.phases=[{steps: %d}, {}]"
    declared("experiment=demo", SPARSE, "+mixtures.copies.match=data", phases % (steps - 1))
    with pytest.raises(
        ValueError, match=rf"mixtures\.copies\.train\.phases\[0\] takes {steps + 1} steps, but {steps} of"
    ):
        declared("experiment=demo", SPARSE, "+mixtures.copies.match=data", phases % (steps + 1))


SEED = {"train_domains": {"a": 100, "b": 100}, "train_flops": 1e6}
REFERENCE = {"train_domains": {"a": 1100, "b": 1100}, "train_flops": 3e6}


@pytest.mark.parametrize(
    ("domains", "flops", "tokens", "share", "label"),
    [
        ({"a": 1100, "b": 1100}, 3e6, 1.0, 1.0, "data- and compute-matched"),
        ({"a": 1110, "b": 1110}, 5e6, 1.01, 2.0, "data-matched"),
        ({"a": 1111, "b": 1100}, 3.018e6, 1.0055, 1.009, "compute-matched"),  # all together are close, one domain is not
        ({"a": 1000, "b": 1200}, 1e6, 1.0, 0.0, ""),  # as many tokens, of other domains
        ({"a": 100, "b": 100}, 1e6, 0.0, 0.0, ""),
        ({"a": 2200}, 3.03e6, 1.0, 1.015, ""),
        (None, None, None, None, ""),
    ],
)  # fmt: skip
def test_a_label_is_computed_from_tokens_by_domain_and_flops(domains, flops, tokens, share, label):
    found = relative_cost({"train_domains": domains, "train_flops": flops}, SEED, REFERENCE)
    assert found["label"] == label
    assert found["tokens"] == pytest.approx(tokens) and found["flops"] == pytest.approx(share)


def test_the_report_labels_every_row(tmp_path):
    from evals.page import cost_table
    from evals.report import ModelRow, build_report

    inputs = make_inputs(tmp_path)
    rows = {row.name: vars(row) | {"train_domains": {"code": row.train_tokens}} for row in inputs["rows"]}
    inputs["rows"] = [ModelRow(**row) for row in rows.values()]
    report = build_report(**inputs | {"samples": 10}, reference="btx")
    relative = {name: model["relative"] for name, model in report["models"].items()}
    assert relative["seed"] == {"tokens": 0.0, "flops": 0.0, "label": ""} and relative["oracle"] is None
    assert relative["btx"]["label"] == relative["btx_random"]["label"] == "data- and compute-matched"
    assert relative["dense"]["label"] == "data-matched" and relative["code"]["tokens"] == pytest.approx(0.25)
    header, *cells = table_cells(report, "{}")
    assert header[-1] == "tokens, FLOPs after the seed ÷ btx"
    shown = {row[0]: row[-1] for row in cells}
    seed, btx, dense = (rows[name]["train_flops"] for name in ("seed", "btx", "dense"))
    assert shown["dense"] == f"1.00, {(dense - seed) / (btx - seed):.2f} data-matched" and shown["oracle"] == "–"
    assert "data- and compute-matched" in cost_table(report) and json.dumps(report, allow_nan=False)
    with pytest.raises(ValueError, match="reference='bmt' is not among the models"):
        build_report(**inputs | {"samples": 10}, reference="bmt")


def test_a_mixture_from_scratch_has_no_weight_of_the_seed_and_no_two_experts_alike(tmp_path):
    from upcycle.explain import explain
    from upcycle.mixture_config import AssembleConfig
    from upcycle.modeling import UpcycledForCausalLM
    from upcycle.stages import draw_moe
    from upcycle.store import Run

    seed = dense_models("llama", 1, dtype=torch.float32, attention_bias=False, initializer_range=0.05)[0]
    seed.save_pretrained(tmp_path / "seed")
    drawn_twice = []
    for number in range(2):
        (out := tmp_path / f"out{number}").mkdir()
        settings = {"assemble": AssembleConfig(), "branches": ["code", "law"]}
        draw_moe(settings, out=out, run=Run(say=lambda text: None), seed=tmp_path / "seed")
        drawn_twice.append(UpcycledForCausalLM.from_pretrained(out))
    first, again = (dict(model.named_parameters()) for model in drawn_twice)
    assert all(torch.equal(first[name], again[name]) for name in first)
    theirs = [value for value in seed.state_dict().values() if value.dim() == 2]
    for name, weight in first.items():
        if ".experts." in name:
            assert not any(torch.equal(weight[a], weight[b]) for a in range(3) for b in range(a))
        if weight.dim() > 1 and "router" not in name:  # one draw's spread: an average of three would have 0.029
            assert weight.std().item() == pytest.approx(0.05, rel=0.1)
            assert not any(weight.shape == value.shape and torch.equal(weight, value) for value in theirs)
    assert {path.name for path in (tmp_path / "out0").iterdir() if path.is_dir()} == set()
    assert any(note.startswith("from scratch: every weight was drawn") for note in explain(tmp_path / "out0").notes)
