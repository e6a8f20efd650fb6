"""Perplexity and routing analysis: figures against slow loops and against models whose answer is known."""

import math

import numpy as np
import pytest
import torch

from evals.microscope import Vocabulary
from evals.perplexity import evaluate, whole_documents
from evals.routing import RoutingCounter, shuffled_information
from evals.windows import inputs_and_labels, window_starts
from tests.domains import two_domains
from tests.reference import windows
from tests.tiny import VOCAB, dense_config, dense_models, mixture_of
from upcycle.batches import TokenArray
from upcycle.config import EvalConfig
from upcycle.configuration import UpcycledConfig
from upcycle.health import mutual_information
from upcycle.modeling import UpcycledForCausalLM
from upcycle.router import RoutingTrace


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_domains(tmp_path_factory.mktemp("domains"))


def settings(**changes):
    return EvalConfig(**dict(sequence_length=16, batch_sequences=4, bootstrap_samples=10) | changes)


def ignore(done, total, doing):
    pass


@pytest.mark.parametrize("stride", [1, 5, 15, 16])
def test_windows_equal_a_loop_and_predict_every_token_but_the_first_exactly_once(stride):
    for length in (2, 5, 16, 17, 18, 22, 33, 40):
        tokens = np.arange(length)
        starts = window_starts(length - 1, 16, stride)
        inputs, labels = inputs_and_labels(tokens, starts, 16, stride)
        slow_inputs, slow_labels = zip(*windows(tokens, 16, stride), strict=True)
        np.testing.assert_array_equal(inputs, slow_inputs)
        np.testing.assert_array_equal(labels, slow_labels)
        assert labels[labels >= 0].tolist() == list(range(1, length))
        assert (labels == inputs + 1)[labels >= 0].all()


@pytest.mark.parametrize(("stride", "skip"), [(None, 0), (5, 0), (None, 6), (5, 13)])
def test_nats_per_document_equal_a_loop_over_tokens(data, stride, skip):
    """Every token from the 16 before it, or as many as its window has: with a stride of 5 at least 11. None of a window's first `skip`."""
    model = dense_models("llama", 1, dtype=torch.float32)[0]
    steps = []
    result, documents = evaluate(
        model, data, settings(stride=stride, skip_first=skip), lambda done, total, doing: steps.append((done, total))
    )
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1] and result["stride"] == (stride or 16)
    array = TokenArray(data["low"], "test")
    tokens, expected = array.tokens.astype(np.int64), np.zeros(len(array.bytes))
    counts = np.zeros(len(array.bytes))
    for position in range(1, len(tokens)):
        start = max(0, -(-(position - 16) // (stride or 16)) * (stride or 16))
        if position - 1 - start < skip:
            continue
        logits = model(torch.from_numpy(tokens[start:position])[None]).logits[0, -1]
        document = np.searchsorted(array.offsets, position, side="right") - 1
        expected[document] -= logits.log_softmax(-1)[tokens[position]].item()
        counts[document] += 1
    np.testing.assert_allclose(documents["low.nats"], expected, rtol=1e-4)
    np.testing.assert_array_equal(documents["low.tokens"], counts)
    assert counts.sum() == result["domains"]["low"]["tokens"] and (skip or counts.sum() == len(tokens) - 1)
    assert result["domains"]["low"]["nats"] == pytest.approx(expected.sum(), rel=1e-5)
    share = counts / np.diff(array.offsets) if skip else 1
    assert result["domains"]["low"]["bytes"] == np.round(array.bytes * share).sum()


def test_a_mixture_that_reads_ahead_is_measured_without_those_tokens(data):
    rule = {"per": "segment", "tokens": 4, "first": "own_mean"}
    config = UpcycledConfig(
        seed=dense_config("llama").to_dict(),
        router="soft",
        router_options=rule,
        combine={"of": "weights", "base": "seed"},
    )
    model = UpcycledForCausalLM._from_config(config)
    with pytest.raises(ValueError, match="these very tokens .*write eval.skip_first=4"):
        evaluate(model, data, settings(skip_first=3), ignore)
    result, _ = evaluate(model, data, settings(skip_first=4), ignore)
    assert result["skip_first"] == 4


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


def test_a_stride_that_leaves_tokens_out_is_refused():
    with pytest.raises(
        ValueError, match="stride=17 leaves tokens out between windows of sequence_length=16.*at most that"
    ):
        settings(stride=17)


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


@pytest.mark.parametrize("stride", [None, 5])
def test_windows_belong_to_the_document_of_their_first_prediction_and_domains_share_none(data, stride):
    model = mixture_of(dense_models("llama", 3, dtype=torch.float32))
    counter = RoutingCounter(model.config, Vocabulary(np.arange(VOCAB)), settings(stride=stride))
    seen: list[int] = []
    for domain in ("low", "high"):
        array, first = TokenArray(data[domain], "test"), []
        counter.start(domain, array.tokens, array.offsets)
        place = 0
        for _, labels in windows(array.tokens, 16, stride):
            first.append(max(number for number, start in enumerate(array.offsets[:-1]) if start <= place))
            place += int((labels >= 0).sum())
        offset = max(seen, default=-1) + 1
        seen += [number + offset for number in first]
    assert np.concatenate(counter.documents).tolist() == seen


@pytest.mark.parametrize("side", ["ffn", "both"])
def test_an_oracle_sends_every_domain_to_its_own_expert(data, side):
    """A domain with a branch to that expert, any other to the seed's: the figures of forced routing."""
    models = dense_models("llama", 3, dtype=torch.float32)
    choices = {"expert_sources": ["seed", "code", "high"], "attention": "mixture"}
    routers = {"router": "oracle"} | ({"attention_router": {"kind": "oracle"}} if side == "both" else {})
    oracle, _ = evaluate(mixture_of(models, **choices, **routers), data, settings(), ignore)
    shares = oracle["routing"]["ffn"]["share"]
    assert shares["low"] == [[1.0, 0.0, 0.0]] * 2 and shares["high"] == [[0.0, 0.0, 1.0]] * 2
    if side == "both":
        forced = mixture_of(models, attention="mixture")
        for domain, expert in (("low", 0), ("high", 2)):
            tokens = torch.from_numpy(TokenArray(data[domain], "test").tokens.astype(np.int64))
            nats = 0.0
            for inputs, labels in windows(tokens.numpy(), 16):
                ids, targets = inputs[None], labels
                logits = forced(ids, trace=RoutingTrace(forced=expert)).logits[0]
                nats += torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
            assert oracle["domains"][domain]["nats"] == pytest.approx(nats, rel=1e-5)


def test_an_oracle_without_an_expert_for_a_domain_is_refused(data):
    model = mixture_of(
        dense_models("llama", 3, dtype=torch.float32), router="oracle", expert_sources=["law", "code", "high"]
    )
    with pytest.raises(ValueError, match="an oracle router has no expert for domain 'low'.*include the seed"):
        evaluate(model, data, settings(), ignore)


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
