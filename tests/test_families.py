"""Every supported family, as BTX, BAM and BAM with shared keys and values: what a user may do with a mixture works.

The last test compares the table in docs/families.md with what ran; UPCYCLE_WRITE_TABLES=1 writes it.
"""

from __future__ import annotations

import pytest
import reference
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import upcycle
from tests.tables import DOCS, assert_table
from upcycle.adoption import with_family
from upcycle.assembly import write_mixture
from upcycle.families import FAMILIES, REFUSED, family_of
from upcycle.mixture_config import AssembleConfig
from upcycle.proof import prove

MIXTURES = {
    "BTX": {"attention": "merged"},
    "BAM": {"attention": "mixture", "kv": "expert"},
    "BAM shared KV": {"attention": "mixture", "kv": "shared"},
}
EAGER_ONLY = {"gemma2"}  # transformers refuses sdpa for it
RELU2 = {"nemotron"}  # squares activations, and rounding errors with them: compared in float64
passed: dict[tuple[str, str], list[str]] = {}


def parts(model) -> list[tuple]:
    """Each layer's attention and MLP, of a dense causal LM or of a mixture's decoder."""
    mixture = hasattr(model, "decoder") and hasattr(model.config, "seed")
    family = family_of(model.config.seed if mixture else model.config)
    layers = getattr(model.decoder if mixture else getattr(model, family.decoder), family.layers)
    return [(getattr(layer, family.attention), getattr(layer, family.mlp)) for layer in layers]


def mixture_of(kind: str, mixture: str, dtype=None):
    dtype = dtype or (torch.float64 if kind in RELU2 else torch.float32)
    models = tiny.dense_models(f"family/{kind}", dtype=dtype)
    implementation = "eager" if kind in EAGER_ONLY else "sdpa"
    return models, tiny.mixture_of(models, implementation=implementation, **MIXTURES[mixture])


def forward_and_gradients(kind, mixture, tmp_path):
    """Logits and all gradients equal those of explicit sums over the family's own modules."""
    models, ours = mixture_of(kind, mixture, torch.float64)
    ids, attention_routers = tiny.tokens(2, 7), tiny.routers_of(ours, "attention")
    twin = reference.FamilyMixture(
        models, parts, tiny.routers_of(ours, "ffn"), attention_routers, k=2, kv=ours.config.kv
    )
    logits, expected = ours(ids).logits, twin.logits(ids)
    torch.testing.assert_close(logits.float(), expected.float())
    weight = torch.randn_like(expected) / expected.numel()
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    tiny.assert_same_tensors(tiny.gradients_of(ours), tiny.reference_gradients(twin, ours.config))


@torch.no_grad()
def copies_are_the_seed(kind, mixture, tmp_path):
    """Gates sum to 1, so a mixture of copies is the model that was copied."""
    seed = tiny.dense_models(f"family/{kind}", count=1)[0]
    implementation = "eager" if kind in EAGER_ONLY else "sdpa"
    copies = tiny.mixture_of([seed] * 3, implementation=implementation, **MIXTURES[mixture])
    torch.testing.assert_close(copies(tiny.tokens()).logits.float(), seed(tiny.tokens()).logits.float())


@torch.no_grad()
def dynamic_cache(kind, mixture, tmp_path):
    """A prompt and then token by token equals all at once, past the sliding window too."""
    _, ours = mixture_of(kind, mixture)
    ids, cache = tiny.tokens(2, 9), DynamicCache(config=ours.config)
    steps = [ours(ids[:, :5], past_key_values=cache, use_cache=True).logits]
    steps += [ours(ids[:, step : step + 1], past_key_values=cache, use_cache=True).logits for step in range(5, 9)]
    tiny.assert_same_logits(torch.cat(steps, 1), ours(ids).logits)


@torch.no_grad()
def static_cache(kind, mixture, tmp_path):
    """Greedy generation with a static cache picks what forwards without a cache pick."""
    _, ours = mixture_of(kind, mixture)
    ids = tiny.tokens(2, 6)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    generated = ours.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **options)
    for _ in range(5):
        ids = torch.cat([ids, ours(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, ids)


@torch.no_grad()
def left_padding(kind, mixture, tmp_path):
    """Real tokens get the logits that they get without padding."""
    _, ours = mixture_of(kind, mixture)
    ids, mask = tiny.tokens(2, 8), tiny.left_padding(0, 3, sequence=8)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = ours(ids, mask, position_ids=positions).logits
    tiny.assert_same_logits(padded[0], ours(ids[:1]).logits[0])
    tiny.assert_same_logits(padded[1, 3:], ours(ids[1:, 3:]).logits[0])


def gradient_checkpointing(kind, mixture, tmp_path):
    """The same gradients, to the bit, and every layer really runs twice."""
    _, ours = mixture_of(kind, mixture)
    ours.train()
    calls = []
    for _, mlp in parts(ours.model):
        mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ids, found = tiny.tokens(2, 6), []
    for checkpointing in (False, True):
        if checkpointing:
            ours.activation_checkpointing_enable()
        ours.zero_grad()
        ours(ids, labels=ids).loss.backward()
        found.append(tiny.gradients_of(ours))
    tiny.assert_same_tensors(*found, rtol=0, atol=0)
    assert len(calls) == 3 * ours.config.seed.num_hidden_layers


@torch.no_grad()
def save_and_load(kind, mixture, tmp_path):
    """The same tensors and the same logits, to the bit."""
    _, ours = mixture_of(kind, mixture, torch.float32)
    ours.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    tiny.assert_same_tensors(ours.state_dict(), again.state_dict(), rtol=0, atol=0)
    again.set_experts_implementation(ours.config._experts_implementation)
    assert torch.equal(tiny.aligned(again)(tiny.tokens()).logits, tiny.aligned(ours)(tiny.tokens()).logits)


def assembled_and_proved(kind, mixture, tmp_path):
    """From directories that plain transformers wrote; the proof (proof.py) holds."""
    sources = {}
    for name, model in zip(tiny.NAMES, tiny.dense_models(f"family/{kind}", dtype=torch.float32), strict=False):
        sources[name] = tmp_path / name
        model.save_pretrained(sources[name])
    (tmp_path / "moe").mkdir()
    branches = {name: path for name, path in sources.items() if name != "seed"}
    write_mixture(sources["seed"], branches, tmp_path / "moe", AssembleConfig(**MIXTURES[mixture]))
    assert max(prove(tmp_path / "moe", sources)["one_hot_errors"].values()) < 1e-5


CAPABILITIES = {
    "forward and gradients": forward_and_gradients,
    "copies are the seed": copies_are_the_seed,
    "dynamic cache": dynamic_cache,
    "static cache": static_cache,
    "left padding": left_padding,
    "gradient checkpointing": gradient_checkpointing,
    "save and load": save_and_load,
    "assembled and proved": assembled_and_proved,
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_family(kind, mixture, capability, tmp_path):
    CAPABILITIES[capability](kind, mixture, tmp_path)
    passed.setdefault((kind, capability), []).append(mixture)


@pytest.mark.parametrize("kind", [name for name, family in FAMILIES.items() if family.mlp_dropout])
def test_dropout_at_the_end_of_an_mlp_survives(kind):
    """One random state drops the same outputs of the family's MLP and of a mixture of copies of it."""
    seed = tiny.dense_models(f"family/{kind}", 1, dtype=torch.float32, **{FAMILIES[kind].mlp_dropout: 0.5})[0]
    ours = tiny.mixture_of([seed] * 2).train()
    ((_, theirs), *_), ((_, mlp), *_) = parts(seed.train()), parts(ours.model)
    hidden, outputs = torch.randn(2, 5, 32), []
    for one in (theirs, mlp):
        torch.manual_seed(3)
        outputs.append(one(hidden))
    torch.testing.assert_close(outputs[1], outputs[0])
    assert 0.2 < (outputs[1] == 0).float().mean() < 0.8


def test_every_family_has_a_tiny_config():
    assert set(tiny.FAMILY_CONFIGS) == set(FAMILIES)
    assert not set(FAMILIES) & set(REFUSED)


def test_the_table_in_the_docs_is_what_ran():
    if sum(map(len, passed.values())) < len(FAMILIES) * len(MIXTURES) * len(CAPABILITIES):
        pytest.skip("not all tests of families ran and passed in this process")
    rows = []
    for kind in FAMILIES:
        cells = [passed.get((kind, capability), []) for capability in CAPABILITIES]
        shown = ["all three" if len(cell) == len(MIXTURES) else ", ".join(cell) or "no" for cell in cells]
        rows.append([kind, *shown])
    assert_table("families.md", "table", ["family", *CAPABILITIES], rows)
    for kind, reason in REFUSED.items():
        assert f"`{kind}`: {reason}" in (DOCS / "families.md").read_text()


# ----------------------------------------------------------------------------------------- families that are not listed


@pytest.mark.parametrize(("kind", "like"), [("arcee", "nemotron"), ("exaone4", "gemma3_text")])
def test_an_unlisted_family_with_known_parts_is_adopted(kind, like):
    """Exaone-4 has the names of Llama's parts too, but norms its heads elsewhere: the check on a small model tells."""
    config = AutoConfig.for_model(kind, **tiny.COMMON | tiny.GROUPED)
    with pytest.raises(ValueError, match=f"model_type='{kind}' is not in the table of families"):
        family_of(config)
    assert with_family(config).parts_of == like and family_of(config) is FAMILIES[like]


def test_a_family_whose_small_mixture_differs_is_refused(monkeypatch):
    monkeypatch.setattr("upcycle.adoption.TOLERANCE", 0.0)
    with pytest.raises(
        ValueError, match=r"small mixture of it does not compute what its dense model does \(as nemotron:"
    ):
        with_family(AutoConfig.for_model("arcee", **tiny.COMMON | tiny.GROUPED))


def test_a_mixture_of_an_unlisted_family_is_always_proved(tmp_path):
    seed = AutoModelForCausalLM.from_config(AutoConfig.for_model("arcee", **tiny.COMMON | tiny.GROUPED))
    seed.save_pretrained(tmp_path / "seed")
    for parameter in seed.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    seed.save_pretrained(tmp_path / "code")
    branches, out = {"code": tmp_path / "code"}, tmp_path / "moe"
    with pytest.warns(UserWarning, match="arcee is not in the table of families; it has the parts of nemotron"):
        upcycle.assemble(seed=tmp_path / "seed", branches=branches, out=out, method="bam", prove=False)
    assert (out / "proof.json").is_file()
    assert AutoModelForCausalLM.from_pretrained(out).config.seed.parts_of == "nemotron"


@pytest.mark.parametrize("kind", REFUSED)
def test_a_family_that_upstream_keeps_out_is_refused_with_the_reason(kind):
    with pytest.raises(ValueError) as error:
        family_of(AutoConfig.for_model(kind))
    assert str(error.value).startswith(f"model_type={kind!r} is not supported: {REFUSED[kind]}; expected one of cohere")


def test_a_family_with_unknown_parts_is_refused():
    with pytest.raises(ValueError, match="model_type='mixtral' is not supported: its layers have other parts"):
        with_family(AutoConfig.for_model("mixtral", **tiny.COMMON | tiny.GROUPED))
    with pytest.raises(ValueError, match="model_type='gpt_bigcode' is not supported: its layers have other parts"):
        with_family(AutoConfig.for_model("gpt_bigcode", n_embd=32, n_head=4, n_layer=2))  # GPT-2's names, other weights
    with pytest.raises(ValueError, match="model_type='vit' is no causal language model of transformers"):
        with_family(AutoConfig.for_model("vit"))
