"""Perplexity and routing analysis: figures against slow loops and against models whose answer is known."""

import math

import numpy as np
import pytest
import torch

from evals.perplexity import evaluate, whole_documents, windows
from evals.routing import mutual_information, shuffled_information
from tests.domains import two_domains
from tests.tiny import VOCAB, dense_models, mixture_of
from upcycle.batches import TokenArray
from upcycle.config import EvalConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_domains(tmp_path_factory.mktemp("domains"))


def settings(**changes):
    return EvalConfig(**dict(sequence_length=16, batch_sequences=4, bootstrap_samples=10) | changes)


def ignore(done, total):
    pass


def test_windows_predict_every_token_but_the_first_exactly_once():
    for length in (2, 16, 17, 18, 33, 40):
        tokens = np.arange(length)
        pairs = list(windows(tokens, 16))
        targets = np.concatenate([labels[labels >= 0] for _, labels in pairs])
        assert targets.tolist() == list(range(1, length))
        for inputs, labels in pairs:
            assert all(label == token + 1 for token, label in zip(inputs, labels, strict=True) if label >= 0)


def test_nats_per_document_equal_a_loop_over_tokens(data):
    model = dense_models("llama", 1, dtype=torch.float32)[0]
    result, documents = evaluate(model, data, settings(), ignore)
    array = TokenArray(data["low"], "test")
    tokens, expected = array.tokens.astype(np.int64), np.zeros(len(array.bytes))
    for position in range(1, len(tokens)):
        start = (position - 1) // 16 * 16
        logits = model(torch.from_numpy(tokens[start:position])[None]).logits[0, -1]
        document = np.searchsorted(array.offsets, position, side="right") - 1
        expected[document] -= logits.log_softmax(-1)[tokens[position]].item()
    np.testing.assert_allclose(documents["low.nats"], expected, rtol=1e-4)
    assert documents["low.tokens"].sum() == result["domains"]["low"]["tokens"] == len(tokens) - 1
    assert result["domains"]["low"]["nats"] == pytest.approx(expected.sum(), rel=1e-5)
    assert result["domains"]["low"]["bytes"] == array.bytes.sum()


def test_a_uniform_model_has_the_vocabulary_as_perplexity(data):
    model = dense_models("llama", 1, dtype=torch.float32)[0]
    torch.nn.init.zeros_(model.lm_head.weight)
    result, _ = evaluate(model, data, settings(), ignore)
    for domain in result["domains"].values():
        assert math.exp(domain["nats"] / domain["tokens"]) == pytest.approx(VOCAB, rel=1e-5)


@pytest.mark.parametrize("attention", ["merged", "mixture"])
def test_batch_size_changes_nothing_and_auxiliary_losses_never_count(data, attention):
    models = dense_models("llama", 3, dtype=torch.float32)
    plain = mixture_of(models, attention=attention)
    loaded = mixture_of(models, attention=attention, balance="btx", balance_coefficient=9.0, z_coefficient=9.0)
    reference, _ = evaluate(plain, data, settings(batch_sequences=1), ignore)
    for model, size in ((plain, 7), (loaded, 4)):
        found, _ = evaluate(model, data, settings(batch_sequences=size), ignore)
        for name, domain in found["domains"].items():
            assert domain["nats"] == pytest.approx(reference["domains"][name]["nats"], rel=1e-5)


def test_max_tokens_takes_whole_documents_from_the_start(data):
    array = TokenArray(data["low"], "test")
    assert whole_documents(array, None) == len(array.bytes)
    assert whole_documents(array, 1) == 1
    count = whole_documents(array, 200)
    assert array.offsets[count] <= 200 < array.offsets[count + 1]
    result, _ = evaluate(dense_models("llama", 1, dtype=torch.float32)[0], data, settings(max_tokens=200), ignore)
    assert result["domains"]["low"]["documents"] == count


def by_domain_router(model):
    """Routers that send the low half of the vocabulary to expert 0 and the high half to expert 1, in every layer.

    The embedding carries the half in its first coordinate, which nothing else writes to, and norms keep its sign.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                parameter.zero_()
            if "norm" in name:
                parameter.fill_(1.0)
            if name.endswith("router.weight"):
                parameter.zero_()
                parameter[0, 0], parameter[1, 0], parameter[2, 0] = 50.0, -50.0, 0.0
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = -5.0
        embedding[: VOCAB // 2, 0] = 5.0
    return model


def test_routing_of_a_constructed_model_is_seen(data):
    """EOS (token 2) is in both domains and in the low half: it alone goes to expert 0 everywhere."""
    model = by_domain_router(
        mixture_of(dense_models("llama", 3, dtype=torch.float32), num_experts_per_tok=1, router="softmax_topk")
    )
    result, _ = evaluate(model, data, settings(), ignore)
    found = result["routing"]["ffn"]
    assert result["routing"]["experts"] == ["seed", "code", "law"] and result["routing"]["attention"] is None
    for layer in range(2):
        assert found["share"]["low"][layer] == [1.0, 0.0, 0.0]
        inputs = TokenArray(data["high"], "test").tokens[:-1]
        assert found["share"]["high"][layer][0] == pytest.approx((inputs == 2).mean(), abs=1e-6)
        assert found["share"]["high"][layer][1] == pytest.approx((inputs != 2).mean(), abs=1e-6)
        assert found["entropy"]["high"][layer] < 1e-3
        assert found["mutual_information"][layer] > 3 * max(found["shuffled"][layer])


def test_indifferent_routers_have_entropy_log_e_and_no_information(data):
    model = mixture_of(dense_models("llama", 3, dtype=torch.float32), attention="mixture", router="soft")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.weight"):
                parameter.zero_()
    result, _ = evaluate(model, data, settings(), ignore)
    for part in ("ffn", "attention"):
        for domain in ("low", "high"):
            assert result["routing"][part]["entropy"][domain] == pytest.approx([math.log(3)] * 2, abs=1e-5)
            np.testing.assert_allclose(result["routing"][part]["share"][domain], 1 / 3, atol=1e-6)
        assert result["routing"][part]["mutual_information"] == pytest.approx([0, 0], abs=1e-6)


def test_mutual_information_of_known_tables():
    assert mutual_information(np.eye(4)) == pytest.approx(math.log(4))
    assert mutual_information(np.ones((4, 3))) == pytest.approx(0)
    assert mutual_information(np.array([[1.0, 0.0], [100.0, 100.0]])) == pytest.approx(0.2157615543)


def test_shuffled_labels_keep_only_chance():
    rng = np.random.default_rng(0)
    domains = np.repeat([0, 1], 200)
    documents = np.arange(400) // 5
    informative = np.where(domains[:, None] == np.arange(2), 9.0, 1.0) + rng.random((400, 2))
    measured = mutual_information(np.stack([informative[domains == d].sum(0) for d in (0, 1)]))
    controls = shuffled_information(informative, domains, documents, draws=20, rng_seed=0)
    assert len(set(controls)) == 20 and max(controls) < measured / 5
    assert controls == shuffled_information(informative, domains, documents, draws=20, rng_seed=0)


def test_documents_that_differ_are_not_taken_for_domains_that_differ():
    """Every document has its own favourite expert, whatever its domain: above the control as often as chance says."""
    above, trials = 0, 60
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        domains, documents = np.repeat(np.arange(4), 300), np.arange(1200) // 50
        windows = rng.dirichlet(np.ones(4), 24)[documents] + 0.05 * rng.random((1200, 4))
        table = np.stack([windows[domains == d].sum(0) for d in range(4)])
        controls = shuffled_information(windows, domains, documents, draws=19, rng_seed=trial)
        above += mutual_information(table) > max(controls)
    assert above <= 10  # 1 in 20 expected, 3 of 60; window-wise shuffling gives 60 of 60
