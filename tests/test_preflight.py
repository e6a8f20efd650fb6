"""Before any work: branches that are not the seed's model are refused, with both values and both directories."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny import FAMILY_CONFIGS, dense_models, tokens
from upcycle.assembly import write_mixture
from upcycle.checkpoint import Checkpoint, import_checkpoint
from upcycle.mixture_config import AssembleConfig
from upcycle.preflight import check_alike, model_config
from upcycle.router_config import RouterConfig
from upcycle.vocabulary import vocabularies

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
END = "Branches must be the seed's model with other weights: bring one that was trained from this seed"


def save(path, kind="llama", rng_seed=0, dtype=torch.float32, shard="5GB", **changes):
    (model,) = dense_models(kind, 1, rng_seed, dtype=dtype, **changes)
    model.save_pretrained(path, max_shard_size=shard)
    return path


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def alike(seed, **branches):
    return check_alike(Checkpoint(seed), {name: Checkpoint(path) for name, path in branches.items()})


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    return save(tmp_path_factory.mktemp("seed"), shard="30KB")


@pytest.fixture
def code(seed, tmp_path):
    return shutil.copytree(seed, tmp_path / "code")


def refusal(seed, branch):
    with pytest.raises(ValueError) as error:
        alike(seed, code=branch)
    return str(error.value)


# difference: (family, its settings in the seed, in the branch, what is said)
DIFFERENCES = {
    "vocabulary": (
        "llama", {}, {"vocab_size": 64},
        "3 differences: vocab_size is 64, expected the seed's 61; lm_head.weight has shape (64, 32), expected the seed's "
        "(61, 32); model.embed_tokens.weight has shape (64, 32), expected the seed's (61, 32).",
    ),
    "more layers": (
        "llama", {}, {"num_hidden_layers": 3},
        "14 differences: num_hidden_layers is 3, expected the seed's 2; model.layers.2.input_layernorm.weight is one too "
        "many, the seed has none; model.layers.2.mlp.down_proj.weight is one too many, the seed has none; "
        "model.layers.2.mlp.gate_proj.weight is one too many, the seed has none; model.layers.2.mlp.up_proj.weight is one "
        "too many, the seed has none; and 9 more.",
    ),
    "width": (
        "llama", {}, {"hidden_size": 64},
        "31 differences: hidden_size is 64, expected the seed's 32; head_dim is 16, expected the seed's 8; lm_head.weight "
        "has shape (61, 64), expected the seed's (61, 32); model.embed_tokens.weight has shape (61, 64), expected the "
        "seed's (61, 32); model.layers.0.input_layernorm.weight has shape (64,), expected the seed's (32,); and 26 more.",
    ),
    "feed-forward width": (
        "llama", {}, {"intermediate_size": 48},
        "7 differences: intermediate_size is 48, expected the seed's 40; model.layers.0.mlp.down_proj.weight has shape "
        "(32, 48), expected the seed's (32, 40); model.layers.0.mlp.gate_proj.weight has shape (48, 32), expected the "
        "seed's (40, 32); model.layers.0.mlp.up_proj.weight has shape (48, 32), expected the seed's (40, 32); "
        "model.layers.1.mlp.down_proj.weight has shape (32, 48), expected the seed's (32, 40); and 2 more.",
    ),
    "rope theta": (
        "llama", {}, {"rope_parameters": ROPE | {"rope_theta": 5e5}},
        "1 difference: rope_parameters is {'rope_theta': 500000.0, 'rope_type': 'default'}, expected the seed's "
        "{'rope_theta': 10000.0, 'rope_type': 'default'}.",
    ),
    "rope scaling": (
        "llama", {}, {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}},
        "1 difference: rope_parameters is {'factor': 2.0, 'rope_theta': 10000.0, 'rope_type': 'linear'}, expected the "
        "seed's {'rope_theta': 10000.0, 'rope_type': 'default'}.",
    ),
    "attention biases": (
        "llama", {}, {"attention_bias": False},
        "9 differences: attention_bias is False, expected the seed's True; model.layers.0.self_attn.k_proj.bias is missing, "
        "the seed has it; model.layers.0.self_attn.o_proj.bias is missing, the seed has it; "
        "model.layers.0.self_attn.q_proj.bias is missing, the seed has it; model.layers.0.self_attn.v_proj.bias is missing, "
        "the seed has it; and 4 more.",
    ),
    "tied embeddings": (
        "llama", {}, {"tie_word_embeddings": True},
        "2 differences: tie_word_embeddings is True, expected the seed's False; lm_head.weight is missing, the seed has it.",
    ),
    "window": (
        "family/mistral", {}, {"sliding_window": None},
        "1 difference: sliding_window is None, expected the seed's 4.",
    ),
    "layer types": (
        "family/olmo3", {}, {"layer_types": ["full_attention", "full_attention"]},
        "1 difference: layer_types[0] is 'full_attention', expected the seed's 'sliding_attention' (1 of 2 entries differ).",
    ),
}  # fmt: skip


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_difference_is_named_with_both_values_and_both_directories(difference, tmp_path):
    kind, ours, theirs, message = DIFFERENCES[difference]
    first, branch = save(tmp_path / "seed", kind, **ours), save(tmp_path / "code", kind, 1, **theirs)
    assert refusal(first, branch) == f"branch 'code' ({branch}) against the seed ({first}): {message} {END}"
    assert alike(first, code=save(tmp_path / "fine", kind, 2, **ours)) == []


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_two_models_of_any_family_are_alike(family, tmp_path):
    """Its own config asks for the tensors that save_pretrained writes, whatever is tied, fused or windowed."""
    first = save(tmp_path / "seed", f"family/{family}", shard="10KB")
    branch = save(tmp_path / "code", f"family/{family}", 1, dtype=torch.bfloat16)
    (note,) = alike(first, code=branch)
    assert note.endswith(
        "its weights are stored in bfloat16, the seed's in float32; without a dtype of its own the mixture gets float32"
    )


def test_another_architecture_is_the_one_difference_named(seed, tmp_path):
    other = save(tmp_path / "code", "family/mistral")
    message = "1 difference: model_type is 'mistral', expected the seed's 'llama'."
    assert refusal(seed, other) == f"branch 'code' ({other}) against the seed ({seed}): {message} {END}"


def test_old_spellings_of_a_config_are_no_difference(seed, code):
    path = code / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
    assert alike(seed, code=code) == []


def test_what_differs_and_is_allowed_is_noted(seed, tmp_path):
    other = save(tmp_path / "code", dtype=torch.bfloat16, attention_dropout=0.25)
    change_config(other, unsloth_version="1", eos_token_id=7, architectures=["Mine"], auto_map={"AutoConfig": "x.Y"})
    where = f"branch 'code' ({other}) against the seed ({seed})"
    assert alike(seed, code=other) == [
        f"{where}: attention_dropout is 0.25, the seed's is 0.0; the mixture gets the seed's",
        f"{where}: unsloth_version is '1', the seed's is None; the mixture gets the seed's",
        f"{where}: its weights are stored in bfloat16, the seed's in float32; without a dtype of its own the mixture gets float32",
    ]


# Tokenizers ---------------------------------------------------------------------------------------------------------

WORDS = {"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4}
MERGES = [["a", "b"], ["ab", "c"]]
EOS = {"id": 5, "content": "<eos>", "special": True}
EXTRA = {"id": 6, "content": "<pad>", "special": True}


def tokenizer(directory, vocab=WORDS, merges=MERGES, added=(EOS, EXTRA), **settings):
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    text = json.dumps({"version": "1.0", "added_tokens": list(added), "model": model} | settings)
    (directory / "tokenizer.json").write_text(text)


def same_words(first, second):
    return vocabularies(first)["words"].sha256 == vocabularies(second)["words"].sha256


def test_the_same_words_are_the_same_tokenizer_however_they_are_saved(seed, code, tmp_path):
    first = shutil.copytree(seed, tmp_path / "seed")
    tokenizer(first)
    shuffled = dict(reversed(WORDS.items()))
    tokenizer(code, shuffled, ["a b", "ab c"], (EXTRA, EOS), padding={"length": 4}, truncation={"max_length": 8})
    assert (first / "tokenizer.json").read_bytes() != (code / "tokenizer.json").read_bytes()
    assert same_words(first, code) and alike(first, code=code) == []
    (code / "tokenizer.json").unlink()
    (code / "vocab.json").write_text(json.dumps(shuffled))
    (code / "merges.txt").write_text("#version: 0.2\na b\nab c\n")
    (code / "added_tokens.json").write_text('{"<eos>": 5}')
    (code / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"6": {"content": "<pad>"}}}')
    assert same_words(first, code) and alike(first, code=code) == []


OTHER_WORDS = {
    "a token more": (
        {"added": (EOS, EXTRA, {"id": 7, "content": "<im>"})},
        "1 difference: tokenizer.json has 1 other token ('<im>' is 7, expected the seed's absent).",
    ),
    "swapped": (
        {"vocab": WORDS | {"a": 1, "b": 0}},
        "1 difference: tokenizer.json has 2 other tokens ('a' is 1, expected the seed's 0, 'b' is 0, expected the seed's 1).",
    ),
    "merged in another order": (
        {"merges": MERGES[::-1]},
        "1 difference: tokenizer.json has other merges from number 0 on ('ab c', expected the seed's 'a b').",
    ),
    "fewer merges": (
        {"merges": MERGES[:1]},
        "1 difference: tokenizer.json has other merges from number 1 on ('none', expected the seed's 'ab c').",
    ),
    "other scores": (
        {"vocab": [["a", -1.0], ["b", -2.5]], "added": ()},
        "2 differences: tokenizer.json has 7 other tokens ('<eos>' is absent, expected the seed's 5, '<pad>' is absent, "
        "expected the seed's 6, 'a' is [0, -1.0], expected the seed's 0); tokenizer.json has other merges from number 0 on "
        "('none', expected the seed's 'a b').",
    ),
}  # fmt: skip


@pytest.mark.parametrize("difference", OTHER_WORDS)
def test_another_vocabulary_or_other_merges_are_named(seed, code, tmp_path, difference):
    changes, message = OTHER_WORDS[difference]
    first = shutil.copytree(seed, tmp_path / "seed")
    tokenizer(first)
    if difference == "other scores":
        changes = changes | {"merges": []}
    tokenizer(code, **changes)
    assert refusal(first, code) == f"branch 'code' ({code}) against the seed ({first}): {message} {END}"


def test_sentencepiece_files_are_compared_by_their_bytes(seed, code, tmp_path):
    first = shutil.copytree(seed, tmp_path / "seed")
    (first / "tokenizer.model").write_bytes(b"pieces")
    (code / "tokenizer.model").write_bytes(b"pieces")
    assert alike(first, code=code) == []
    tokenizer(first)  # the branch has the older file only: compared by what both have
    assert alike(first, code=code) == []
    (code / "tokenizer.model").write_bytes(b"others")
    message = "1 difference: tokenizer.model differs; experts must read the same tokens."
    assert refusal(first, code) == f"branch 'code' ({code}) against the seed ({first}): {message} {END}"


def test_tokenizers_that_cannot_be_compared_or_normalise_otherwise_are_noted(seed, code, tmp_path):
    first = shutil.copytree(seed, tmp_path / "seed")
    tokenizer(first, pre_tokenizer={"type": "ByteLevel"})
    where = f"branch 'code' ({code}) against the seed ({first})"
    assert alike(first, code=code) == [f"{where}: no tokenizer in {code}, so that the tokenizers were not compared"]
    tokenizer(code, pre_tokenizer={"type": "Digits"}, normalizer=None)
    note = "pre_tokenizer of tokenizer.json differ; the mixture gets the seed's tokenizer"
    assert alike(first, code=code) == [f"{where}: {note}"]


# Weights ------------------------------------------------------------------------------------------------------------


def shards(directory):
    return sorted(directory.glob("model-*.safetensors"))


def test_missing_and_truncated_shards_are_named(seed, code):
    first, second, *_ = shards(code)
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError) as error:
        alike(seed, code=code)
    assert str(error.value) == (
        f"{second}: not a whole safetensors file (Error while deserializing header: incomplete metadata, file not fully "
        "covered); copy it again"
    )
    second.unlink()
    first.unlink()
    with pytest.raises(ValueError) as error:
        alike(seed, code=code)
    assert str(error.value) == (
        f"{first}: the index names this shard but it is missing (and 1 more); copy the whole directory again"
    )


def test_shards_and_index_must_be_of_one_model(seed, code):
    index = code / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    file = shards(code)[0]
    held = sorted(name for name, where in whole["weight_map"].items() if where == file.name)
    end = "the shard and the index are of different models, copy the whole directory again"
    index.write_text(json.dumps({"weight_map": whole["weight_map"] | {"model.extra": file.name}}))
    with pytest.raises(ValueError) as error:
        alike(seed, code=code)
    assert str(error.value) == (
        f"{file}: model.extra (1 in all) are not in it although model.safetensors.index.json says so; {end}"
    )
    index.write_text(json.dumps({"weight_map": {n: f for n, f in whole["weight_map"].items() if n != held[0]}}))
    with pytest.raises(ValueError) as error:
        alike(seed, code=code)
    assert str(error.value) == f"{file}: {held[0]} (1 in all) are in it and not in model.safetensors.index.json; {end}"
    index.write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(ValueError) as error:
        Checkpoint(code)
    assert str(error.value) == (
        f"{index}: not an index of tensors (weight_map: tensor -> a file of this directory); copy it again"
    )
    index.unlink()
    names = ", ".join(path.name for path in shards(code)[:5])
    with pytest.raises(ValueError) as error:
        Checkpoint(code)
    assert str(error.value) == (
        f"{code}: {names} ({len(shards(code))} in all) stand in no model.safetensors.index.json; copy the index too, or "
        "remove what is left of another model"
    )


def test_two_models_in_one_directory_are_refused(code):
    save_file({"a": torch.zeros(1)}, code / "model.safetensors")
    with pytest.raises(ValueError) as error:
        Checkpoint(code)
    assert str(error.value) == (
        f"{code}: has both model.safetensors and model.safetensors.index.json, and transformers reads only the first; "
        "remove the older one"
    )


def test_files_of_other_names_are_left_alone_and_may_be_all_there_is(tmp_path):
    one = save(tmp_path / "one")
    names = Checkpoint(one).names
    save_file({"other": torch.zeros(1)}, one / "consolidated.safetensors")
    assert Checkpoint(one).names == names
    (one / "model.safetensors").rename(one / "mine.safetensors")
    (one / "consolidated.safetensors").unlink()
    assert Checkpoint(one).names == names
    shutil.copy(one / "mine.safetensors", one / "again.safetensors")
    with pytest.raises(ValueError) as error:
        Checkpoint(one)
    assert str(error.value) == (
        f"{one}: lm_head.weight is in again.safetensors and in mine.safetensors; remove one of them"
    )


@pytest.mark.parametrize(("dtype", "said"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_weights_that_are_no_plain_floats_are_refused(seed, tmp_path, dtype, said):
    other = save(tmp_path / "code")
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        alike(seed, code=other)
    assert str(error.value) == (
        f"{other}: {name} is {said} (1 in all), expected F64, F32, BF16, F16: quantised or integer weights cannot be "
        "averaged or trained; load the model, call model.dequantize() and save_pretrained it elsewhere"
    )


def test_a_config_that_says_quantised_is_refused(code):
    change_config(code, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError) as error:
        Checkpoint(code)
    assert str(error.value) == (
        f"{code}: quantization_config in config.json says that the weights are quantised (gptq), expected plain float32, "
        "bfloat16 or float16; load it, call model.dequantize(), delete model.config.quantization_config and "
        "save_pretrained it elsewhere"
    )
    change_config(code, quantization_config=None)
    Checkpoint(code)


def test_tensors_must_be_those_of_their_own_config(seed, tmp_path):
    wrong = change_config(save(tmp_path / "wrong"), num_hidden_layers=3, intermediate_size=44)
    with pytest.raises(ValueError) as error:
        alike(wrong, code=seed)
    layer = "model.layers.2."
    absent = ("input_layernorm.weight", "mlp.down_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight")
    listed = "; ".join(f"{layer}{name} is absent" for name in (*absent, "post_attention_layernorm.weight"))
    assert str(error.value) == (
        f"{wrong}: the tensors are not those of its config.json: {listed} (19 in all); copy config and weights from one "
        "model"
    )


def test_a_stored_head_beside_tied_embeddings_is_refused(seed, code):
    change_config(code, tie_word_embeddings=True)
    with pytest.raises(ValueError) as error:
        alike(seed, code=code)
    assert str(error.value) == (
        f"{code}: lm_head.weight is stored, but tie_word_embeddings=True says that the head is the embedding; load the "
        "model and save_pretrained it again, with tie_word_embeddings=False if the two differ"
    )


def test_a_stored_head_that_is_the_tied_embedding_is_no_second_tensor(tmp_path):
    tied = save(tmp_path / "tied", tie_word_embeddings=True)
    both = shutil.copytree(tied, tmp_path / "both")
    tensors = load_file(both / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, both / "model.safetensors", metadata={"format": "pt"})
    assert alike(tied, code=both) == []


def test_a_value_that_the_mixtures_dtype_cannot_hold_is_named(seed, code, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    shard = code / Checkpoint(code).files[name]
    tensors = load_file(shard)
    tensors[name][0, 0] = 1e6
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        write_mixture(seed, {"code": code}, tmp_path, AssembleConfig(dtype="float16"))
    assert str(error.value) == (
        f"{code}: {name} holds 1e+06, more than float16 can; choose assemble.dtype=bfloat16 or float32"
    )


def test_most_tensors_decide_the_dtype(tmp_path):
    half = save(tmp_path / "half", dtype=torch.bfloat16)
    tensors = load_file(half / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint(half).dtype() == torch.bfloat16


@pytest.mark.parametrize("shard", ["5GB", "30KB"])
def test_weights_under_other_names_load_after_their_import(tmp_path, shard):
    source, out = save(tmp_path / "source", shard=shard), tmp_path / "out"
    for number, path in enumerate(sorted(source.glob("*.safetensors"))):
        path.rename(source / f"mine-{number}.safetensors")
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    out.mkdir()
    import_checkpoint(source, out)
    again = AutoModelForCausalLM.from_pretrained(out)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, Checkpoint(source).get(name)), name


def test_gpt2_as_openai_saved_it_has_todays_names(tmp_path):
    """Saved without the head's class, and with its causal masks."""
    today = save(tmp_path / "today", "family/gpt2", tie_word_embeddings=True)
    old = shutil.copytree(today, tmp_path / "old")
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(old / "model.safetensors").items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(2)}
    save_file(tensors | masks, old / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint(old).names == Checkpoint(today).names and alike(today, code=old) == alike(old, code=today) == []
    assert torch.equal(Checkpoint(old).get("transformer.wte.weight"), Checkpoint(today).get("transformer.wte.weight"))


# Classes ------------------------------------------------------------------------------------------------------------

VERSION = transformers.__version__
CONFIGS = {
    "own code": (
        {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}},
        f"model_type='mine' is not in transformers {VERSION}, expected one that is: the checkpoint brings its own code "
        "(auto_map in config.json), which runs only with trust_remote_code, and trust_remote_code is off; give a "
        "checkpoint whose class is part of transformers",
    ),
    "unknown": (
        {"model_type": "lama"},
        f"model_type='lama' is not in transformers {VERSION}, expected one that is; update transformers, or mend "
        "model_type in config.json",
    ),
    "no decoder": (
        {"model_type": "vit"},
        "model_type='vit' has no causal language model in transformers, expected a decoder; give another checkpoint",
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_class_that_transformers_lacks_is_refused_and_its_code_never_runs(code, kind, monkeypatch):
    config, message = CONFIGS[kind]
    (code / "config.json").write_text(json.dumps(config))
    (code / "mine.py").write_text(f"open({str(code / 'ran')!r}, 'w')\nclass Config: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks where it may
    with pytest.raises(ValueError) as error:
        model_config(Checkpoint(code))
    assert str(error.value) == f"{code}: {message}" and not (code / "ran").exists()


def test_a_config_that_its_class_refuses_is_named(code):
    change_config(code, hidden_size="wide")
    with pytest.raises(ValueError) as error:
        model_config(Checkpoint(code))
    assert str(error.value) == (
        f"{code / 'config.json'}: refused by transformers' llama class (Validation error for field 'hidden_size': TypeError: "
        "Field 'hidden_size' expected int, got str (value: 'wide')); mend it"
    )


# What mergekit-moe does and we do not -----------------------------------------------------------------------------------
# Its other surprises (prompts for random gates, gates that average over padding, shared experts that are read from
# nowhere) are of options that do not exist here.


def mixture(tmp_path, first, branch, **choices):
    (tmp_path / "moe").mkdir()
    write_mixture(first, {"code": branch}, tmp_path / "moe", AssembleConfig(**choices))
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("attention", ["merged", "mixture"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("family/qwen3", {"attention_bias": True}),
        ("family/mistral", {"sliding_window": 4}),
    ],
)
def test_biases_and_windows_are_kept(tmp_path, kind, changes, attention):
    """A mixture of two copies is the model itself, on sequences longer than the window too."""
    first = save(tmp_path / "seed", kind, **changes)
    dense = AutoModelForCausalLM.from_pretrained(first).eval()
    ours = mixture(tmp_path, first, first, attention=attention)
    torch.testing.assert_close(ours(tokens()).logits, dense(tokens()).logits)


def test_everything_but_the_experts_is_averaged(tmp_path):
    first, branch = save(tmp_path / "seed"), save(tmp_path / "code", rng_seed=1)
    ours = mixture(tmp_path, first, branch).model.decoder.state_dict()
    a, b = (load_file(path / "model.safetensors") for path in (first, branch))
    rest = [name for name in a if name.startswith("model.") and ".mlp." not in name]
    assert any("q_proj.bias" in name for name in rest) and any("norm" in name for name in rest)
    for name in rest:
        torch.testing.assert_close(ours[name.removeprefix("model.")], (a[name] + b[name]) / 2)


def test_fresh_routers_are_small(tmp_path):
    first = save(tmp_path / "seed")
    ours = mixture(tmp_path, first, first, attention="mixture", router=RouterConfig()).state_dict()
    drawn = torch.cat([tensor.flatten() for name, tensor in ours.items() if name.endswith("router.weight")])
    assert len(drawn) == 2 * 2 * 2 * 32 and 0.017 < drawn.std() < 0.023
