"""Figures that tell a continuation of the seed from a stranger, against loops over single weights."""

import json
import math
import shutil
from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import dense_models
from upcycle import relatedness
from upcycle.checkpoint import Checkpoint
from upcycle.relatedness import OUTSIDE, check_related


def moved(source, to, size, rng_seed=0, keep=0.0, only=""):
    """A copy whose weights went a random step of relative length `size`; a share `keep` of them stayed."""
    shutil.copytree(source, to)
    generator = torch.Generator().manual_seed(rng_seed)
    tensors = load_file(to / "model.safetensors")
    for name, tensor in tensors.items():
        step = torch.randn(tensor.shape, generator=generator) * tensor.square().mean().sqrt() * size
        mask = torch.rand(tensor.shape, generator=generator) >= keep
        tensors[name] = tensor + (step * mask).to(tensor.dtype) if only in name else tensor
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    seed, stranger = dense_models("llama", 2, dtype=torch.float32, num_hidden_layers=4)
    seed.save_pretrained(root / "seed")
    stranger.save_pretrained(root / "stranger")
    moved(root / "seed", root / "code", 0.3, 1, keep=0.5)
    moved(root / "code", root / "law", 0.4, 2)
    return root


def related(root, *names, **options):
    return check_related(Checkpoint(root / "seed"), {name: Checkpoint(root / name) for name in names}, **options)


def twin(root, names, layer):
    """One layer's figures, weight by weight."""
    models = {name: load_file(root / name / "model.safetensors") for name in ("seed", *names)}
    inside = [
        n
        for n, t in models["seed"].items()
        if t.ndim > 1 and (f".{layer}." in n if layer is not None else "layers" not in n)
    ]
    theta = {name: [float(x) for n in sorted(inside) for x in t[n].flatten()] for name, t in models.items()}
    tau = {name: [x - y for x, y in zip(theta[name], theta["seed"], strict=True)] for name in names}

    def norm(values):
        return math.sqrt(sum(x * x for x in values))

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / (norm(a) * norm(b))

    def agreement(a, b):
        both = [(x, y) for x, y in zip(a, b, strict=True) if x != 0 and y != 0]
        return sum((x > 0) == (y > 0) for x, y in both) / len(both)

    pairs = list(combinations(names, 2))
    return {
        "weights": len(theta["seed"]),
        "distance": {name: norm(tau[name]) / norm(theta["seed"]) for name in names},
        "seed_cosine": {name: cosine(theta[name], theta["seed"]) for name in names},
        "cosine": {f"{a}/{b}": cosine(tau[a], tau[b]) for a, b in pairs},
        "sign_agreement": {f"{a}/{b}": agreement(tau[a], tau[b]) for a, b in pairs},
    }


def test_figures_equal_loops_over_weights(models, monkeypatch):
    monkeypatch.setattr(relatedness, "CHUNK", 1000)  # several chunks a tensor, the last one not full
    names = ("code", "law", "stranger")
    found = related(models, *names)
    assert [one.layer for one in found.layers] == [OUTSIDE, "layer 0", "layer 1", "layer 2", "layer 3"]
    for one, layer in ((found.layers[0], None), (found.layers[3], 2)):
        slow = twin(models, names, layer)
        assert one.weights == slow.pop("weights")
        for part, values in slow.items():
            assert getattr(one, part) == pytest.approx(values, rel=1e-9, abs=1e-12), part
        assert not any(one.equal.values())


def test_a_stranger_is_warned_of_with_its_figures(models):
    found = related(models, "code", "law", "stranger")
    distance = sorted(one.distance["stranger"] for one in found.layers)[2]
    cosine = sorted(one.seed_cosine["stranger"] for one in found.layers)[2]
    assert distance == pytest.approx(math.sqrt(2), abs=0.05) and cosine == pytest.approx(0, abs=0.05)
    assert found.warnings == [
        f"branch 'stranger' ({models / 'stranger'}) does not look like a continuation of the seed ({models / 'seed'}): in 5 "
        f"of 5 layers read (outside the layers first) ‖τ‖/‖θ_seed‖ is {distance:.2f} and cos(θ, θ_seed) {cosine:.2f} "
        "(medians; an unrelated model of the same scale has 1.41 and 0.00). Averages with it will be poor; bring a branch "
        "that was trained from this seed"
    ]
    lines = found.figures()
    assert [line.split(":")[0] for line in lines] == [
        "code",
        "law",
        "stranger",
        "code/law",
        "code/stranger",
        "law/stranger",
    ]
    assert lines[2] == f"stranger: ‖τ‖/‖θ_seed‖ {distance:.3g}, cos(θ, θ_seed) {cosine:.3g}"
    signs = sorted(one.sign_agreement["code/law"] for one in found.layers)[2]
    assert lines[3].endswith(f"equal signs {signs:.3g}")


def test_strangers_to_the_seed_share_its_negative(tmp_path):
    """Both τ hold -θ_seed: cosine 1/2, signs agree in two weights of three, though the models have nothing in common."""
    for name, model in zip(("seed", "a", "b"), dense_models("llama", 3, dtype=torch.float32), strict=True):
        model.save_pretrained(tmp_path / name)
    for layer in related(tmp_path, "a", "b").layers:
        assert layer.cosine["a/b"] == pytest.approx(1 / 2, abs=0.05)
        assert layer.sign_agreement["a/b"] == pytest.approx(2 / 3, abs=0.03)


def test_one_strange_layer_is_enough(models, tmp_path):
    shutil.copytree(models / "seed", tmp_path / "seed")
    moved(models / "code", tmp_path / "patched", 30.0, 3, only="layers.2.")
    (warning,) = related(tmp_path, "patched").warnings
    assert "in 1 of 5 layers read (layer 2 first)" in warning


def test_weights_that_dwarf_the_seeds_are_warned_of(models, tmp_path):
    """In the seed's own direction: the cosine sees nothing."""
    shutil.copytree(models / "seed", tmp_path / "seed")
    shutil.copytree(models / "seed", tmp_path / "grown")
    tensors = load_file(tmp_path / "seed" / "model.safetensors")
    grown = {name: 3.5 * tensor for name, tensor in tensors.items()}
    save_file(grown, tmp_path / "grown" / "model.safetensors", metadata={"format": "pt"})
    (warning,) = related(tmp_path, "grown").warnings
    assert "‖τ‖/‖θ_seed‖ is 2.50 and cos(θ, θ_seed) 1.00" in warning


def test_long_continuations_are_no_strangers(models, tmp_path):
    """Further from the seed than an unrelated model of its scale, and still its own direction."""
    shutil.copytree(models / "seed", tmp_path / "seed")
    moved(models / "seed", tmp_path / "long", 1.45)
    found = related(tmp_path, "long")
    assert all(one.distance["long"] > 1.41 and 0.5 < one.seed_cosine["long"] < 0.65 for one in found.layers)
    assert found.warnings == []


def test_copies_are_warned_of(models, tmp_path):
    for name in ("seed", "code"):
        shutil.copytree(models / name, tmp_path / name)
    shutil.copytree(models / "seed", tmp_path / "same")
    shutil.copytree(models / "code", tmp_path / "again")
    found = related(tmp_path, "same", "code", "again")
    assert found.warnings == [
        f"branch 'same' ({tmp_path / 'same'}) has the weights of the seed ({tmp_path / 'seed'}); was another meant?",
        f"branches 'code' ({tmp_path / 'code'}) and 'again' ({tmp_path / 'again'}) have the same weights; was another meant?",
    ]
    layer = found.layers[1]
    assert (
        layer.distance["same"] == 0 and layer.cosine["same/code"] is None and layer.sign_agreement["same/code"] is None
    )
    assert layer.cosine["code/again"] == pytest.approx(1) and layer.sign_agreement["code/again"] == 1


def test_a_sample_reads_the_first_the_middle_and_the_last_layer(models, monkeypatch):
    whole = {one.layer: one for one in related(models, "code").layers}
    found = related(models, "code", sample=True)
    assert found.sampled and [one.layer for one in found.layers] == ["layer 0", "layer 2", "layer 3"]
    assert all(one == whole[one.layer] for one in found.layers)
    assert not related(models, "code").sampled
    monkeypatch.setattr(relatedness, "SAMPLE_ABOVE_BYTES", 1000)
    assert related(models, "code").sampled


def test_every_tensor_is_read_once(models, monkeypatch):
    read = []
    get = Checkpoint.get
    monkeypatch.setattr(Checkpoint, "get", lambda self, name: read.append((self.directory, name)) or get(self, name))
    related(models, "code", "law")
    matrices = [n for n, t in load_file(models / "seed" / "model.safetensors").items() if t.ndim > 1]
    assert sorted(read) == sorted((models / m, n) for m in ("seed", "code", "law") for n in matrices)


def test_figures_are_plain_data(models):
    from dataclasses import asdict

    found = related(models, "code", "law")
    assert json.loads(json.dumps(asdict(found)))["layers"][0]["layer"] == OUTSIDE
