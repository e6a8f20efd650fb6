"""What others do with a mixture, unmodified: transformers alone, pipelines, PEFT, lm-eval, Trainer, torch.compile, vLLM.

PEFT: `target_modules` takes the projections that are plain linear layers, by their names in the family ("q_proj",
"k_proj", "v_proj", and "o_proj" of BTX); `target_parameters` takes what is not one, by its path's end: routers
("mlp.router.weight", BAM's "self_attn.router.weight") and BAM's output projection ("self_attn.o_proj.weight"). PEFT can
merge both kinds back.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

import upcycle
from tests import reference
from tests.tiny import NAMES, VOCAB, dense_models, mixture_of, tokens
from upcycle.modeling import UpcycledForCausalLM

MIXTURES = {"btx": {}, "bam": {"attention": "mixture"}}
AUXILIARY = {"balance": "switch", "balance_coefficient": 0.5, "z_coefficient": 0.3}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def mixture(kind: str, **choices) -> UpcycledForCausalLM:
    return mixture_of(dense_models("llama", 3, dtype=torch.float32), **MIXTURES[kind], **choices)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words "w3" ... "w60", separated by spaces, are the tokens 3 to 60."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{"btx": the bundle that export wrote, "bam": a mixture as training saves it}, each with a tokenizer."""
    root = tmp_path_factory.mktemp("saved")
    mixture("bam").save_pretrained(root / "once")
    AutoModelForCausalLM.from_pretrained(root / "once").save_pretrained(root / "bam")  # as train_model loads and saves
    mixture("btx").save_pretrained(root / "plain")
    word_tokenizer().save_pretrained(root / "plain")
    word_tokenizer().save_pretrained(root / "bam")
    assert upcycle.export(root / "plain", root / "btx").format == "remote_code"
    return {kind: root / kind for kind in MIXTURES}


# -------------------------------------------------------------------------------------------- torch and transformers only


def link_requirements(site: Path, *roots: str) -> set[str]:
    """Fill `site` with links to what the named distributions and all they require consist of; their names."""
    site.mkdir()
    waiting, seen = list(roots), set()
    while waiting:
        found = distribution(waiting.pop())
        name = found.metadata["Name"].lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        for top in {file.parts[0] for file in found.files or () if ".." not in file.parts}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
        for requirement in found.requires or ():
            wanted = re.match(r"[\w.-]+", requirement)
            if wanted and "extra ==" not in requirement and _installed(wanted[0]):
                waiting.append(wanted[0])
    return seen


def _installed(name: str) -> bool:
    try:
        return bool(distribution(name))
    except ModuleNotFoundError:
        return False


ELSEWHERE = """
    import importlib.util, json, sys
    sys.path.insert(0, sys.argv[1])
    import torch
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    torch.set_num_threads(1)
    ran = []

    def spy(name, inner):
        def run(self, *args, **kwargs):
            ran.append(name)
            return inner(self, *args, **kwargs)
        return run

    for name in ("batched_mm", "grouped_mm"):
        ALL_EXPERTS_FUNCTIONS.register(name, spy(name, ALL_EXPERTS_FUNCTIONS[name]))
    out = {"importable": [name for name in sys.argv[4].split() if importlib.util.find_spec(name)]}
    ids = torch.tensor(json.loads(sys.argv[3]))
    for kind, directory in json.loads(sys.argv[2]).items():
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        module = sys.modules[type(model).__module__]
        loop = module._loop_over_experts
        module._loop_over_experts = spy("eager", loop)
        for asked in (None, "eager", "batched_mm", "grouped_mm"):
            model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, experts_implementation=asked)
            assert type(model).__module__ == module.__name__
            ran.clear()
            with torch.no_grad():
                logits = model(ids).logits
            out[f"{kind} {asked}"] = {"ran": list(ran), "logits": logits.tolist(), "class": module.__name__}
        base = AutoModel.from_pretrained(directory, trust_remote_code=True)
        out[f"{kind} base"] = model.lm_head(base(ids).last_hidden_state).tolist()
        out[f"{kind} text"] = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).tolist()
    print(json.dumps(out))
"""
OURS = ("upcycle", "launch", "evals", "accelerate", "datasets", "hydra", "omegaconf", "peft", "numpy")


@pytest.fixture(scope="module")
def elsewhere(saved, tmp_path_factory):
    """What a process found that sees the standard library, torch, transformers and what these two require."""
    root = tmp_path_factory.mktemp("elsewhere")
    names = link_requirements(root / "site", "torch", "transformers")
    assert {"torch", "transformers", "safetensors"} <= names and not {"upcycle", "accelerate", "datasets"} & names
    environment = {"PATH": os.environ["PATH"], "HF_MODULES_CACHE": str(root / "modules"), "HF_HOME": str(root / "home")}
    directories = json.dumps({kind: str(path) for kind, path in saved.items()})
    arguments = [str(root / "site"), directories, json.dumps(tokens().tolist()), " ".join(OURS)]
    command = [sys.executable, "-I", "-S", "-c", textwrap.dedent(ELSEWHERE), *arguments]
    done = subprocess.run(command, cwd=root, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", MIXTURES)
def test_it_loads_where_there_is_only_torch_and_transformers(elsewhere, saved, kind):
    assert elsewhere["importable"] == ["numpy"]  # that nothing else is hidden by a failure to look
    ours = UpcycledForCausalLM.from_pretrained(saved[kind])
    found = elsewhere[f"{kind} None"]
    assert found["class"].startswith(f"transformers_modules.{kind}.")  # its own code, not an earlier directory's
    torch.testing.assert_close(torch.tensor(found["logits"]), ours(tokens()).logits)
    torch.testing.assert_close(torch.tensor(elsewhere[f"{kind} base"]), ours(tokens()).logits)
    text = ours.generate(tokens(), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert elsewhere[f"{kind} text"] == text.tolist()


@pytest.mark.parametrize("asked", (None, *IMPLEMENTATIONS))
@pytest.mark.parametrize("kind", MIXTURES)
def test_the_experts_implementation_asked_for_runs_there(elsewhere, saved, kind, asked):
    found = elsewhere[f"{kind} {asked}"]
    assert found["ran"] == [asked or "grouped_mm"] * 2  # once a layer; grouped_mm is transformers' choice
    ours = UpcycledForCausalLM.from_pretrained(saved[kind])
    torch.testing.assert_close(torch.tensor(found["logits"]), ours(tokens()).logits)


# ------------------------------------------------------------------------------------------------------- tools, unmodified


@pytest.mark.parametrize("kind", MIXTURES)
def test_text_generation_pipeline(saved, kind):
    generate = pipeline("text-generation", model=str(saved[kind]))
    assert isinstance(generate.model, UpcycledForCausalLM)
    text = generate("w5 w9 w30", max_new_tokens=5, do_sample=False, eos_token_id=None, return_full_text=False)
    ids = [5, 9, 30]
    for _ in range(5):
        ids.append(generate.model(torch.tensor([ids])).logits[0, -1].argmax().item())
    assert text[0]["generated_text"].split() == word_tokenizer().decode(ids[3:]).split()


@pytest.mark.parametrize("kind", MIXTURES)
def test_peft_lora_on_attention_and_router(kind):
    """One step changes the low-rank weights and nothing else; merging them gives the adapted model's logits."""
    from peft import LoraConfig, get_peft_model

    modules = ["q_proj", "k_proj", "v_proj"] + (["o_proj"] if kind == "btx" else [])
    parameters = ["mlp.router.weight"]
    if kind == "bam":
        parameters += ["self_attn.router.weight", "self_attn.o_proj.weight"]
    config = LoraConfig(r=2, target_modules=modules, target_parameters=parameters, task_type="CAUSAL_LM")
    model = get_peft_model(mixture(kind, **AUXILIARY), config).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 2 * (len(modules) + len(parameters)) and all("lora_" in name for name in trainable)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in trainable if "lora_B" in name}  # A has no gradient while B is zero
    model.eval()
    adapted = model(tokens()).logits.detach()
    assert not torch.allclose(adapted, mixture(kind)(tokens()).logits)
    torch.testing.assert_close(model.merge_and_unload()(tokens()).logits, adapted)


@pytest.mark.parametrize("kind", MIXTURES)
def test_lm_eval_loglikelihood(kind):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = mixture(kind)
    harness = HFLM(pretrained=model, tokenizer=word_tokenizer(), batch_size=2, max_length=32, device="cpu")
    requests = [
        Instance("loglikelihood", {}, (" ".join(f"w{i}" for i in context), " " + " ".join(f"w{i}" for i in rest)), 0)
        for context, rest in (([5, 9, 30, 7], [11, 12]), ([40], [41, 42, 43]))
    ]
    for (found, _), ids in zip(harness.loglikelihood(requests), ([5, 9, 30, 7, 11, 12], [40, 41, 42, 43]), strict=True):
        logits = model(torch.tensor([ids])).logits[0]
        start = 4 if len(ids) == 6 else 1
        wanted = sum(logits[place - 1].log_softmax(-1)[ids[place]].item() for place in range(start, len(ids)))
        assert found == pytest.approx(wanted, abs=1e-4)


def plain_loss(model: UpcycledForCausalLM, rows: torch.Tensor, labels: torch.Tensor) -> float:
    """Σ cross-entropy + coefficients · Σ auxiliary losses over tokens, divided by the number of targets."""
    out = model(rows, output_router_logits=True)
    total, count = reference.next_token_cross_entropy(out.logits, labels)
    decisions = [(logits, [reference.topk_softmax(row.double(), 2) for row in logits]) for logits in out.router_logits]
    valid = [[True] * rows.shape[1]] * rows.shape[0]
    balance = reference.balance_loss(decisions, valid, "switch", "sequence")
    z = reference.z_loss(list(out.router_logits), valid)
    return ((total + rows.numel() * (0.5 * balance + 0.3 * z)) / count).item()


@pytest.mark.parametrize("kind", MIXTURES)
def test_trainer_step_has_the_right_loss(kind, tmp_path):
    """Also in two accumulation steps: transformers' own mixtures weigh their balance loss by their number."""
    rows, weights = tokens(batch=4), []
    labels = rows.clone()
    labels[0, 3:7] = labels[2, 5:] = -100  # micro-batches with different numbers of targets
    data = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    for accumulation in (1, 2):
        model = mixture(kind, **AUXILIARY)
        wanted = plain_loss(model, rows, labels)
        settings = TrainingArguments(
            tmp_path / str(accumulation), max_steps=1, per_device_train_batch_size=4 // accumulation, learning_rate=0.1,
            gradient_accumulation_steps=accumulation, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0,
            use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        loss = Trainer(model=model, args=settings, train_dataset=data).train().training_loss
        assert loss == pytest.approx(wanted, rel=1e-5)
        weights.append(model.state_dict())
    before = mixture(kind).state_dict()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], msg=lambda text, name=name: f"{name}: {text}")
        assert not torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("kind", "implementation"), [("btx", "eager"), ("btx", "grouped_mm"), ("bam", "grouped_mm")])
def test_compiled_forward_in_one_graph(kind, implementation):
    model = mixture(kind)
    model.set_experts_implementation(implementation)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("kind", MIXTURES)
def test_attributes_that_vllm_asks_for(saved, kind):
    """vLLM's Transformers backend: fusible experts, its own attention, AutoModel by remote code, keywords passed down."""
    model = UpcycledForCausalLM.from_pretrained(saved[kind])
    assert type(model.model)._supports_attention_backend and type(model.model.decoder)._supports_attention_backend
    assert json.loads((saved[kind] / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling.UpcycledModel"
    for layer in model.model.decoder.layers:
        shapes = {name: tuple(p.shape) for name, p in layer.mlp.experts.named_parameters()}
        assert shapes == {"gate_up_proj": (3, 80, 32), "down_proj": (3, 32, 40)}
    seen, calls = [], []

    def attend(module, query, key, value, attention_mask, attention_instances=None, **kwargs):
        seen.append((module.layer_idx, query.shape[1], key.shape[1], attention_instances))
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        heads = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return heads.transpose(1, 2), None

    class Fused(nn.Module):
        """Stands where vLLM puts its own experts: (hidden_states, topk_ids, topk_weights) by position."""

        def __init__(self, experts):
            super().__init__()
            self.inner = experts

        def forward(self, hidden_states, topk_ids, topk_weights):
            calls.append((topk_ids.shape, topk_weights.shape))
            return self.inner(hidden_states, topk_ids, topk_weights)

    wanted = model(tokens()).logits
    AttentionInterface.register("spy", attend)
    model.set_attn_implementation("spy")
    for layer in model.model.decoder.layers:
        layer.mlp.experts = Fused(layer.mlp.experts)
    hidden = model.model(tokens(), attention_instances={0: "a"}, use_cache=False).last_hidden_state
    wide = len(NAMES[:3]) if kind == "bam" else 1
    assert seen == [(layer, 4 * wide, 2 * wide, {0: "a"}) for layer in (0, 1)]
    text = model.config.get_text_config()
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (4 * wide, 2 * wide, 8)
    assert calls == [((18, 2), (18, 2))] * 2
    torch.testing.assert_close(model.lm_head(hidden), wanted)
