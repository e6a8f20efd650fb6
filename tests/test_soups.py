"""The greedy soup against a slow search, and against models whose soup is known."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from evals.perplexity import evaluate
from evals.soups import greedy, mean_nats
from evals.stages import greedy_soup
from tests import reference
from tests.domains import two_domains
from tests.reference import windows
from tests.test_evals import ignore, settings
from tests.test_recipes import declared, keys
from tests.tiny import VOCAB, dense_models
from upcycle.batches import TokenArray
from upcycle.store import Run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_domains(tmp_path_factory.mktemp("domains"))


def made(models, data, root):
    """The stage's directory and its record, of models by name."""
    for name, model in models.items():
        model.save_pretrained(root / name)
    (out := root / "out").mkdir()
    branches = {name: root / name for name in models if name != "seed"}
    greedy_soup(
        settings(split="valid"), out=out, run=Run(say=ignore_text), seed=root / "seed", branches=branches, data=data
    )
    return out, json.loads((out / "soup.json").read_text())


def ignore_text(text):
    pass


def slow_nats(model, data) -> float:
    """Mean over domains of nats per token on the validation split, window by window in float64."""
    means = []
    for path in data.values():
        nats, count = 0.0, 0
        for inputs, labels in windows(TokenArray(path, "valid").tokens, 16):
            found, targets = inputs[None], labels
            logits = model.double()(found).logits[0]
            nats += torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
            count += int((targets >= 0).sum())
        means.append(nats / count)
    return sum(means) / len(means)


@torch.no_grad()
def test_the_soup_is_that_of_a_slow_search(data, tmp_path):
    near = dense_models("llama", 1, dtype=torch.float32)[0]
    models = {}
    for number, (name, scale) in enumerate({"seed": 0.02, "code": 0.03, "law": 0.02, "math": 0.4}.items()):
        models[name] = copy.deepcopy(near)
        generator = torch.Generator().manual_seed(number)
        for weight in models[name].parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=generator))
    out, record = made(models, data, tmp_path)
    order = sorted(models, key=lambda name: slow_nats(copy.deepcopy(models[name]), data))
    kept, best, refused = [order[0]], slow_nats(copy.deepcopy(models[order[0]]), data), []
    for name in order[1:]:
        nats = slow_nats(reference.average([models[one] for one in [*kept, name]]), data)
        kept, best, refused = ([*kept, name], nats, refused) if nats < best else (kept, best, [*refused, name])
    assert record["ingredients"] == kept and refused  # both ways are taken
    assert record["nats_per_token"] == pytest.approx(best, rel=1e-5)
    assert [one["candidate"] for one in record["tried"]] == order[1:]
    soup, expected = AutoModelForCausalLM.from_pretrained(out), reference.average([models[one] for one in kept])
    for name, weight in expected.named_parameters():
        torch.testing.assert_close(soup.get_parameter(name), weight.float())
    assert not (out / "trial").exists()


@torch.no_grad()
def test_two_opposites_and_a_stranger(data, tmp_path):
    """Heads W and −W average to the uniform model, the best there is for random text; 3·W pulls away from it."""
    stranger = dense_models("llama", 1, dtype=torch.float32)[0]
    models = {"seed": stranger, "plus": copy.deepcopy(stranger), "minus": copy.deepcopy(stranger)}
    for name, times in {"seed": 3.0, "plus": 1.0, "minus": -1.0}.items():
        models[name].lm_head.weight.mul_(times)
    out, record = made(models, data, tmp_path)
    assert set(record["ingredients"]) == {"plus", "minus"}
    assert [one["kept"] for one in record["tried"]] == [True, False]
    assert record["nats_per_token"] == pytest.approx(math.log(VOCAB)) and record["split"] == "valid"
    measured, _ = evaluate(AutoModelForCausalLM.from_pretrained(out), data, settings(), ignore)
    assert mean_nats(measured["domains"]) == pytest.approx(math.log(VOCAB))


def test_candidates_are_tried_in_the_order_of_their_own_nats():
    table = {("a",): 3.0, ("b",): 2.0, ("c",): 2.5, ("b", "c"): 2.0, ("b", "a"): 1.5}
    asked = []

    def nats(names):
        asked.append(names)
        return table[names]

    found = greedy(["a", "b", "c"], nats)
    assert asked == [("a",), ("b",), ("c",), ("b", "c"), ("b", "a")]  # c changed nothing and stays out
    assert found["ingredients"] == ["b", "a"] and found["nats_per_token"] == 1.5


def test_domains_count_once_whatever_their_size():
    assert mean_nats({"a": {"nats": 10.0, "tokens": 10}, "b": {"nats": 3000.0, "tokens": 1000}}) == 2.0


def test_the_recipe_chooses_on_the_validation_split_and_measures_on_the_other():
    base, found = keys("experiment=demo"), declared("experiment=demo", "greedy_soup=true")
    stages = found.store.stages
    assert {name for name in stages if stages[name].key != base.get(name)} == {
        "greedy_soup",
        "eval/greedy_soup",
        "report",
    }
    assert stages["greedy_soup"].config.split == "valid" and stages["eval/greedy_soup"].config.split == "test"
    assert list(stages["greedy_soup"].inputs["data"]) == ["code", "law", "math", "general"]  # none that is held out
    assert found.lineages["greedy_soup"].tokens == found.lineages["soup"].tokens
    with pytest.raises(ValueError, match=r"greedy_soup is chosen on the validation split, and eval\.split=valid would"):
        declared("experiment=demo", "greedy_soup=true", "eval.split=valid")
    with pytest.raises(ValueError, match=r"domains\.law\.valid_fraction is 0, but greedy_soup is chosen on"):
        declared("experiment=demo", "greedy_soup=true", "domains.law.valid_fraction=0")
