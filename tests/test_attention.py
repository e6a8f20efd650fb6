"""Soft mixture of attention: one wide attention equals the explicit sum over the family's own attention modules."""

from __future__ import annotations

import copy

import pytest
import reference
import tiny
import torch
from transformers import DynamicCache

from upcycle.attention import stack_heads, unstack_heads
from upcycle.families import family_of, join_fused, split_fused

KV = ("expert", "shared")
IMPLEMENTATIONS = ("sdpa", "eager")
FAMILIES = ("llama", "gpt_neox")


def pair(kind: str, kv: str, implementation: str = "sdpa", **changes):
    """A BAM mixture of three dense models and its reference."""
    models = tiny.dense_models(kind, **changes)
    choices = {"router": "softmax_topk", "num_experts_per_tok": 1, "gate_scale": "straight_through"}
    mixture = tiny.mixture_of(models, implementation=implementation, attention="mixture", kv=kv, **choices)
    routers = [tiny.routers_of(mixture, part) for part in ("ffn", "attention")]
    twin = reference.ReferenceMixture(
        models, routers[0], "softmax_topk", 1, "straight_through", "mixture", kv, routers[1]
    )
    return mixture, twin


@pytest.mark.parametrize("kv_heads", [None, 1, 2, 4])
def test_unstacking_heads_gives_each_expert_back(kv_heads):
    experts = [torch.randn(8 * 3, 5) for _ in range(3)]
    wide = stack_heads(experts, kv_heads)
    for index, expert in enumerate(experts):
        torch.testing.assert_close(unstack_heads(wide, index, 3, kv_heads), expert, rtol=0, atol=0)


def test_heads_that_share_a_key_value_head_are_neighbours():
    """Rows labelled (expert, head): 4 query heads on 2 key/value heads, head size 1."""
    experts = [torch.tensor([[10 * e + h] for h in range(4)]) for e in range(3)]
    assert stack_heads(experts, 2).flatten().tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]
    assert stack_heads(experts, None).flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]


@pytest.mark.parametrize("shape", [(24, 5), (24,)])
def test_interleaved_projection_splits_into_query_key_and_value_rows(shape):
    config = tiny.dense_config("gpt_neox", hidden_size=8)  # 4 heads of size 2
    fused = torch.randn(shape)
    parts = split_fused(fused, family_of(config), config)
    torch.testing.assert_close(join_fused(parts, family_of(config), config), fused, rtol=0, atol=0)
    assert torch.equal(parts["query"][2:4], fused[6:8]) and torch.equal(parts["value"][2:4], fused[10:12])


@pytest.mark.parametrize("shape", [(16, 5), (16,)])
def test_block_projection_splits_into_query_key_and_value_rows(shape):
    config = tiny.dense_config("family/phi3", hidden_size=8)  # 4 query heads and 2 key/value heads of size 2
    fused = torch.randn(shape)
    parts = split_fused(fused, family_of(config), config)
    torch.testing.assert_close(join_fused(parts, family_of(config), config), fused, rtol=0, atol=0)
    assert torch.equal(parts["key"], fused[8:12]) and torch.equal(parts["value"], fused[12:16])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("kind", FAMILIES)
def test_one_wide_attention_equals_the_sum_over_experts(kind, kv, implementation):
    """Outputs, and gradients of the input, all projections and the router, with left padding."""
    mixture, twin = pair(kind, kv, implementation, num_hidden_layers=1)
    mask = tiny.left_padding(0, 3, sequence=6)
    hidden = torch.randn(2, 6, 32, dtype=torch.float64, requires_grad=True)
    decoder = mixture.model.decoder
    context = {
        "attention_mask": reference.causal_mask(mask.tolist()),
        "position_embeddings": decoder.rotary_emb(hidden, position_ids=torch.arange(6)[None]),
    }
    wide = getattr(decoder.layers[0], family_of(mixture.config.seed).attention)
    weight = torch.randn_like(hidden) * mask[..., None]
    out = wide(hidden, **context)[0]
    (out * weight).sum().backward()
    gradient, hidden.grad = hidden.grad, None
    expected = twin.attend(0, hidden, context)
    (expected * weight).sum().backward()
    valid = mask.bool()
    torch.testing.assert_close(out[valid].float(), expected[valid].float())
    torch.testing.assert_close(gradient.float(), hidden.grad.float())
    tiny.assert_same_tensors(tiny.gradients_of(mixture), tiny.reference_gradients(twin, mixture.config))
    assert wide.router.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kv", KV)
def test_the_sum_holds_for_every_grouping_of_query_heads(kv, kv_heads):
    mixture, twin = pair("llama", kv, num_hidden_layers=1, num_key_value_heads=kv_heads, attention_bias=False)
    ids = tiny.tokens(1, 5)
    torch.testing.assert_close(mixture(ids).logits.float(), twin.logits(ids).float())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("kind", FAMILIES)
def test_token_by_token_with_a_cache_equals_the_sum_over_experts(kind, kv, implementation):
    # fp32: in float64 Hugging Face's own eager softmax (fp32) turns a fully masked row's lowest number into −inf, NaN
    mixture, twin = pair(kind, kv, implementation, dtype=torch.float32)
    ids, mask = tiny.tokens(2, 7), tiny.left_padding(0, 3, sequence=7)
    expected = twin.logits(ids, mask)
    cache, steps = DynamicCache(config=mixture.config), []
    with torch.no_grad():
        for step in range(7):
            out = mixture(ids[:, step : step + 1], mask[:, : step + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits)
    valid = mask.bool()
    torch.testing.assert_close(torch.cat(steps, 1)[valid], expected[valid].float())


@pytest.mark.parametrize("kind", FAMILIES)
def test_shared_kv_cache_has_the_dense_size_and_expert_kv_e_times(kind):
    ids, shapes = tiny.tokens(2, 5), {}
    models = tiny.dense_models(kind)
    choices = {"dense": models[0], "merged": tiny.mixture_of(models)}
    choices |= {kv: tiny.mixture_of(models, attention="mixture", kv=kv) for kv in KV}
    for name, model in choices.items():
        layer = model(ids, use_cache=True).past_key_values.layers[0]
        assert layer.keys.shape == layer.values.shape
        shapes[name] = tuple(layer.keys.shape)
    batch, heads, length, size = shapes["dense"]
    assert shapes["shared"] == shapes["merged"] == shapes["dense"]
    assert shapes["expert"] == (batch, 3 * heads, length, size)


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("kind", FAMILIES)
def test_text_config_states_the_heads_of_the_cache(kind, kv):
    mixture, _ = pair(kind, kv)
    text = mixture.config.get_text_config(decoder=True)
    heads = mixture(tiny.tokens(1, 3), use_cache=True).past_key_values.layers[0].keys.shape[1]
    assert (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) == heads
    assert text.num_attention_heads == 3 * 4
    mixture.set_attn_implementation("eager")
    assert mixture.config.get_text_config()._attn_implementation == "eager"


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("kind", FAMILIES)
def test_set_attn_implementation_reaches_the_wide_attention(kind, kv):
    mixture, _ = pair(kind, kv, "sdpa")
    ids = tiny.tokens(2, 5)
    expected = mixture(ids).logits
    mixture.set_attn_implementation("eager")
    out = mixture(ids, output_attentions=True)
    torch.testing.assert_close(out.logits.float(), expected.float())
    assert [tuple(a.shape) for a in out.attentions] == [(2, 3 * 4, 5, 5)] * 2


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("kind", FAMILIES)
def test_no_gate_stays_on_a_module(kind, kv):
    mixture, _ = pair(kind, kv)
    mixture(tiny.tokens())
    assert all(module.gates is None for module in mixture.modules() if hasattr(module, "gates"))
    assert all(module.trace is None for module in mixture.modules() if hasattr(module, "trace"))
    twin = copy.deepcopy(mixture)
    torch.testing.assert_close(twin(tiny.tokens()).logits, mixture(tiny.tokens()).logits, rtol=0, atol=0)
