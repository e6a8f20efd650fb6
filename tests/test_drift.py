"""How far training moved experts: of mixtures that were moved by a known amount, and against loops over their tensors."""

from __future__ import annotations

import copy

import pytest
import torch

from evals.drift import drift
from tests.tiny import dense_models, mixture_of


def saved(model, directory):
    model.save_pretrained(directory)
    return directory


CHOICES = {
    "btx": ("llama", {}),
    "bam": ("llama", {"attention": "mixture"}),
    "shared_kv": ("llama", {"attention": "mixture", "kv": "shared"}),
    "neox": ("gpt_neox", {"attention": "mixture"}),
    "norms": ("family/qwen3", {"attention": "mixture"}),
    "some_layers": ("llama", {"routed_layers": [1]}),
    "bias": ("llama", {"router_options": {"bias_rate": 0.1}, "num_experts_per_tok": 1}),
}


@pytest.mark.parametrize("name", CHOICES)
def test_an_expert_that_grew_by_a_tenth_has_moved_by_a_tenth_and_no_other_has(name, tmp_path):
    """The mixture of dense models of which one, its feed-forwards and attentions, is 1.1 times what it was."""
    kind, choices = CHOICES[name]
    models = dense_models(kind, 3, dtype=torch.float32)
    grown = copy.deepcopy(models[1])
    with torch.no_grad():
        for parameter, tensor in grown.named_parameters():
            if ".mlp." in parameter or "attn." in parameter or "attention." in parameter:
                tensor.mul_(1.1)
    before = mixture_of(models, **choices)
    after = mixture_of([models[0], grown, models[2]], **choices)
    rest = {
        parameter: tensor
        for parameter, tensor in before.state_dict().items()
        if not (tensor.shape == after.state_dict()[parameter].shape and moves(before, parameter))
    }
    after.load_state_dict(after.state_dict() | rest)
    found = drift(saved(before, tmp_path / "before"), saved(after, tmp_path / "after"))
    assert found["rest"] == 0 and set(found) == {"rest", *before.config.parts}
    for part in before.config.parts:
        assert found[part]["layers"] == before.config.routed and found[part]["experts"] == ["seed", "code", "law"]
        for distances, routers in zip(found[part]["distance"], found[part]["router"], strict=True):
            assert distances == [0, pytest.approx(0.1, rel=1e-5), 0]
            assert routers == [0, 0, 0]


def moves(mixture, parameter: str) -> bool:
    """Whether a tensor holds experts side by side, or is one's alone."""
    from upcycle.pieces import dense_names, plan_pieces

    pieces = {piece.target: piece.origin for piece in plan_pieces(mixture.config, dense_names(mixture.config))}
    return pieces.get(parameter) in ("stacked", "copied")


def test_distances_equal_loops_over_rows(tmp_path):
    """A Llama's layouts, written out: stacked feed-forwards; heads of experts side by side; rows of routers."""
    before = mixture_of(dense_models("llama", 3, dtype=torch.float32), attention="mixture")
    after, noise = copy.deepcopy(before), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=noise))
    found = drift(saved(before, tmp_path / "before"), saved(after, tmp_path / "after"))
    old, new = before.state_dict(), after.state_dict()

    def relative(parts) -> float:
        moved = sum(((new[name][at] - old[name][at]).double() ** 2).sum() for name, at in parts)
        return float((moved / sum((old[name][at].double() ** 2).sum() for name, at in parts)) ** 0.5)

    for layer in range(2):
        stem = f"model.decoder.layers.{layer}."
        for expert in range(3):
            experts = [(f"{stem}mlp.experts.{name}", expert) for name in ("gate_up_proj", "down_proj")]
            assert found["ffn"]["distance"][layer][expert] == pytest.approx(relative(experts))
            heads = []
            for name, size in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
                rows = slice(size * expert, size * (expert + 1))
                heads += [(f"{stem}self_attn.{name}.{kind}", rows) for kind in ("weight", "bias")]
            columns = slice(32 * expert, 32 * (expert + 1))
            heads += [
                (f"{stem}self_attn.o_proj.weight", (slice(None), columns)),
                (f"{stem}self_attn.o_proj.bias", expert),
            ]
            assert found["attention"]["distance"][layer][expert] == pytest.approx(relative(heads))
            for part, place in (("ffn", "mlp"), ("attention", "self_attn")):
                row = [(f"{stem}{place}.router.weight", expert)]
                assert found[part]["router"][layer][expert] == pytest.approx(relative(row))
    shared = [name for name in old if "norm" in name or "embed" in name or "lm_head" in name]
    assert found["rest"] == pytest.approx(relative([(name, slice(None)) for name in shared]))


def test_routers_that_began_at_zero_have_no_relative_distance(tmp_path):
    before = mixture_of(dense_models("llama", 3, dtype=torch.float32), [torch.zeros(3, 32)] * 2)
    after = mixture_of(dense_models("llama", 3, dtype=torch.float32))
    found = drift(saved(before, tmp_path / "before"), saved(after, tmp_path / "after"))
    assert found["ffn"]["router"] == [[None] * 3] * 2 and found["ffn"]["distance"] == [[0.0] * 3] * 2


def test_mixtures_of_other_shapes_are_not_compared(tmp_path):
    directories = [
        saved(mixture_of(dense_models("llama", count, dtype=torch.float32)), tmp_path / str(count)) for count in (2, 3)
    ]
    with pytest.raises(ValueError, match="the trained mixture has no .* of the other's shape"):
        drift(*directories)
