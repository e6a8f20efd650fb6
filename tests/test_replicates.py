"""Claims over replicates, on constructed reports where each claim is known to hold or not."""

import copy
import math

import pytest

from evals.replicates import CLAIMS, markdown, paired, summarise


def model(kind, own, average, routing=None):
    perplexity = {"code": own, "law": 50.0}
    return {"kind": kind, "perplexity": perplexity, "average": {"trained": {"perplexity": average}}, "routing": routing}


def routing(information):
    return {"ffn": {"mutual_information": information, "shuffled": [[0.1, 0.2]] * len(information)}}


def report(rng_seed=1, **changes):
    models = {
        "seed": model("seed", 100.0, 60.0),
        "code": model("branch", 80.0, 70.0),
        "soup": model("soup", 90.0, 55.0),
        "dense": model("dense", 60.0, 30.0),
        "btx": model("btx", 70.0, 29.0, routing([0.3, 0.3, 0.1, 0.1])),
        "btx_random": model("btx", 70.0, 32.0, routing([0.3, 0.3, 0.3, 0.3])),
    }
    for name, change in changes.items():
        models[name] = models[name] | change
    return {
        "experiment": "demo",
        "models": models,
        "domain_groups": {"trained": ["code", "law"]},
        "provenance": {"rng_seed": rng_seed},
        "seconds": 60.0 * rng_seed,
    }


def held(**changes):
    return [check(report(**changes)) for check in CLAIMS.values()]


def test_every_claim_can_hold_and_can_fail():
    assert held() == [True] * 5
    average = {"average": {"trained": {"perplexity": 58.0}}}
    assert held(code={"perplexity": {"code": 91.0}})[0] is False
    assert held(btx_random=average)[1] is False  # above the soup
    assert held(btx={"routing": routing([0.3, 0.1, 0.1, 0.1])})[2] is False
    assert held(dense={"average": {"trained": {"perplexity": 28.0}}})[3] is False
    assert held(btx_random={"average": {"trained": {"perplexity": 28.5}}})[4] is False


def test_summary_counts_and_spreads():
    worse = report(2, code={"perplexity": {"code": 95.0}})
    found = summarise([report(1), worse])
    assert found["rng_seeds"] == [1, 2] and found["trained_perplexity"]["btx"] == [29.0, 29.0]
    assert next(iter(found["claims"].values())) == [True, False]
    text = markdown(found)
    assert "| btx | 2 | 29.00 | 29.00 | 29.00 |" in text
    assert "| every branch beats the seed on its own domain by at least 10 % | 1 of 2 |" in text
    assert text.endswith("*rng_seed 1, 2; minutes of all stages together: 1.0, 2.0.*")


def test_runs_that_are_no_replicates_are_refused():
    with pytest.raises(ValueError, match="need different rng_seeds"):
        summarise([report(1), report(1)])
    other = copy.deepcopy(report(2))
    other["domain_groups"]["trained"] = ["code"]
    with pytest.raises(ValueError, match="must be over the same domains"):
        summarise([report(1), other])


def test_a_run_without_a_model_is_left_out_of_what_needs_it():
    other = copy.deepcopy(report(2))
    del other["models"]["dense"]
    found = summarise([report(1), other])
    assert found["trained_perplexity"]["dense"] == [30.0]
    assert found["claims"]["the best mixture beats dense continuation on the same tokens"] == [True]


def test_differences_are_paired_by_run_with_students_interval():
    averages = {1: (20.0, 25.0), 2: (22.0, 27.0), 3: (30.0, 38.0)}
    runs = [
        report(
            seed,
            btx={"average": {"trained": {"perplexity": ours}}},
            dense={"average": {"trained": {"perplexity": theirs}}},
        )
        for seed, (ours, theirs) in averages.items()
    ]
    found = summarise(runs)
    differences = [math.log(ours / theirs) for ours, theirs in averages.values()]
    mean = sum(differences) / 3
    half = 4.302653 * math.sqrt(
        sum((one - mean) ** 2 for one in differences) / 2 / 3
    )  # t of 2 degrees of freedom, 97.5 %
    assert paired(found, "btx", "dense") == pytest.approx((mean, mean - half, mean + half), rel=1e-6)
    assert f"| btx | 3 | 24.00 | 20.00 | 30.00 | {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}] |" in markdown(
        found, ["dense"]
    )
    assert (
        paired(summarise(runs[:2]) | {"trained_perplexity": {"btx": [20.0], "dense": [25.0]}}, "btx", "dense") is None
    )
    with pytest.raises(
        ValueError, match="against=dens: no run has such a model; expected one of .* did you mean dense"
    ):
        markdown(found, ["dens"])
