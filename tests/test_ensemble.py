"""Branch-Train-Merge's ensemble against loops over tokens, and against ensembles whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from evals.ensemble import Ensemble, ensemble_nats
from evals.perplexity import evaluate, measure, scorer_of
from launch.config import build
from tests import reference
from tests.domains import two_domains
from tests.test_config import settings as of_tiny
from tests.test_evals import ignore, settings
from tests.test_recipes import declared, keys
from tests.tiny import VOCAB, dense_models
from upcycle.batches import TokenArray
from upcycle.config import EvalConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_domains(tmp_path_factory.mktemp("domains"))


def ensemble(models, top_k=None):
    return Ensemble([scorer_of(model, "fp32") for model in models], top_k)


def half_models():
    """One model for each half of the vocabulary: uniform there, e⁻³⁰ elsewhere. EOS (2) is in the low half."""
    models = dense_models("llama", 2, dtype=torch.float32, tie_word_embeddings=False)
    with torch.no_grad():
        for model, half in zip(models, (range(VOCAB // 2), range(VOCAB // 2, VOCAB)), strict=True):
            model.lm_head = torch.nn.Linear(model.config.hidden_size, VOCAB)
            model.lm_head.weight.zero_()
            model.lm_head.bias.fill_(-30.0)
            model.lm_head.bias[list(half)] = 0.0
    return models


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_nats_equal_a_loop_over_tokens(data, top_k):
    models = dense_models("llama", 3, dtype=torch.float32)
    array = TokenArray(data["high"], "test")
    result, documents = measure(ensemble(models, top_k), data, settings(max_tokens=150), ignore)
    count = int(documents["high.tokens"].sum()) + 1
    tokens = array.tokens[:count].astype(int).tolist()
    expected = np.zeros(len(documents["high.nats"]))
    for start in range(0, count - 1, 16):
        nats = reference.branch_train_merge(models, tokens[start : start + 17], top_k)
        for position, one in enumerate(nats, start + 1):
            expected[np.searchsorted(array.offsets, position, side="right") - 1] += one
    np.testing.assert_allclose(documents["high.nats"], expected, rtol=1e-5)
    assert result["domains"]["high"]["nats"] == pytest.approx(expected.sum(), rel=1e-5) and result["routing"] is None


def test_a_window_costs_what_the_mean_of_its_probabilities_costs():
    """Without top_k the predictions multiply up to (1/N) Σ_e Π_t p_e: the posterior cancels step by step."""
    nats_NBS = torch.rand(4, 3, 50, dtype=torch.float64) * 5
    whole = -((-nats_NBS.sum(-1)).logsumexp(0) - math.log(4))
    torch.testing.assert_close(ensemble_nats(nats_NBS).sum(-1), whole)
    assert (ensemble_nats(nats_NBS).sum(-1) <= nats_NBS.sum(-1).amin(0) + math.log(4)).all()


def test_known_posteriors():
    """Two models, 1/2 and 1/8 a token: weights 1/2, 4/5, 16/17 of the better one."""
    nats = torch.tensor([[[2.0, 2.0, 2.0]], [[8.0, 8.0, 8.0]]]).log()
    chances = [1 / 2 * 1 / 2 + 1 / 2 * 1 / 8, 4 / 5 * 1 / 2 + 1 / 5 * 1 / 8, 16 / 17 * 1 / 2 + 1 / 17 * 1 / 8]
    torch.testing.assert_close(
        ensemble_nats(nats), -torch.tensor([chances], dtype=torch.float64).log(), check_dtype=False
    )
    best = ensemble_nats(nats, top_k=1)
    torch.testing.assert_close(best, nats[0].double())  # the first of equals, then the better one
    torch.testing.assert_close(ensemble_nats(nats.flip(0), top_k=1)[0, 0], nats[1, 0, 0].double())
    torch.testing.assert_close(ensemble_nats(nats, top_k=2), ensemble_nats(nats))


def test_copies_of_one_model_are_that_model(data):
    model = dense_models("llama", 1, dtype=torch.float32)[0]
    alone, _ = evaluate(model, data, settings(), ignore)
    for top_k in (None, 2):
        found, _ = measure(ensemble([model] * 3, top_k), data, settings(), ignore)
        for name, domain in found["domains"].items():
            assert domain == pytest.approx(alone["domains"][name], rel=1e-6)


def test_a_window_of_one_models_text_costs_that_model_and_log_2(data):
    """Text of the low half: the low model is believed after the first label, whose probability is halved."""
    models = half_models()
    own, _ = evaluate(models[0], data, settings(), ignore)
    found, _ = measure(ensemble(models), data, settings(), ignore)
    windows = math.ceil((len(TokenArray(data["low"], "test").tokens) - 1) / 16)
    assert found["domains"]["low"]["nats"] == pytest.approx(
        own["domains"]["low"]["nats"] + windows * math.log(2), rel=1e-5
    )


def test_batch_size_and_padding_change_nothing(data):
    models = dense_models("llama", 3, dtype=torch.float32)
    first, _ = measure(ensemble(models), data, settings(batch_sequences=1), ignore)
    other, _ = measure(ensemble(models), data, settings(batch_sequences=7), ignore)
    for name, domain in first["domains"].items():
        assert other["domains"][name] == pytest.approx(domain, rel=1e-6)
    padded = torch.rand(3, 2, 9, dtype=torch.float64)
    padded[..., 5:] = 0
    torch.testing.assert_close(ensemble_nats(padded)[..., 5:], torch.zeros(2, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": {}, "mixtures": {}, "dense": None, "btm": {}}, r"btm has no branch to be made of"),
        ({"btm": {"top_k": 0}}, r"btm\.top_k: Input should be greater than or equal to 1"),
        ({"btm": {"topk": 1}}, r"btm\.topk: unknown key; did you mean top_k\?"),
    ],
)
def test_an_ensemble_that_cannot_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(of_tiny(changes))


def test_the_recipe_measures_seed_and_branches_together_and_counts_all_of_them():
    base, found = keys("experiment=demo"), declared("experiment=demo", "btm={}")
    stages, lineages = found.store.stages, found.lineages
    assert {name for name in stages if stages[name].key != base.get(name)} == {"eval/btm", "report"}
    stage = stages["eval/btm"]
    assert list(stage.inputs["models"]) == ["seed", "code", "law", "math"]
    assert stage.config["top_k"] is None and isinstance(stage.config["eval"], EvalConfig)
    row = next(row for row in stages["report"].config["rows"] if row["name"] == "btm")
    assert row["parameters"] == row["active_parameters"] == 4 * lineages["seed"].parameters
    assert row["train_tokens"] == lineages["soup"].tokens and row["kind"] == "ensemble"
    with pytest.raises(ValueError, match=r"btm\.top_k=5 exceeds the 4 models \(seed and 3 branches\)"):
        declared("experiment=demo", "btm={top_k: 5}")
