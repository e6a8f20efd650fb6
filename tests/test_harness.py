"""lm-eval on models in memory: our perplexity is its, models with known answers get them, and what a run declares."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean_stderr
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.tasks import TaskManager

import evals.suites as suites
from evals import harness
from evals.perplexity import evaluate
from evals.stages import run_tasks, write_questions
from evals.suites import Planned, check_tasks, planned
from evals.suites.continuations import clustered_error, make_questions
from evals.suites.papers import BAM, BTX, PAPERS
from evals.task_table import add_tasks, format_tasks, task_rows
from tests.tasks import SMALL, Reciter, byte_tokenizer, dense, mixture, texts
from tests.test_ranks import environment
from upcycle.config import ContinuationsConfig, EvalConfig, TasksConfig
from upcycle.store import Run, ignore

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 32
MODELS = {
    "dense": dense,
    "btx": lambda: mixture(num_experts_per_tok=2, router="topk_softmax"),
    "bam": lambda: mixture(attention="mixture", kv="shared"),
}
TEXT = "Né stone, river; apple wooden 12 tall quick under never blue seven candle paper glass"  # é: two bytes


def of(length: int) -> str:
    """A text of so many bytes."""
    whole = (TEXT.encode() * 3)[:length]
    return whole.decode()


# --------------------------------------------------------------------------------------------------------- perplexity


def ours(model, text: str, root: Path, closed: bool = False) -> dict:
    """Our evaluation of a stream that begins with an EOS, as lm-eval's does, and does not end with one unless `closed`."""
    tokens = byte_tokenizer()(text, add_special_tokens=False)["input_ids"] + [0] * closed
    root.mkdir()
    np.save(root / "test.tokens.npy", np.array([0, *tokens], dtype=np.uint16))
    np.save(root / "test.offsets.npy", np.array([0, 1, 1 + len(tokens)]))
    np.save(root / "test.bytes.npy", np.array([0, len(text.encode())]))
    settings = EvalConfig(sequence_length=WINDOW, batch_sequences=3)
    return evaluate(model, {"one": root}, settings, ignore)[0]["domains"]["one"]


def theirs(model, text: str) -> dict:
    """lm-eval's loglikelihood_rolling of one document."""
    task = ConfigurableTask(
        config={
            "task": "rolling", "custom_dataset": lambda **_: {"test": Dataset.from_list([{"text": text}])},
            "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
        }
    )  # fmt: skip
    task.set_fewshot_seed(0)
    lm = harness.in_memory(model, byte_tokenizer(), TasksConfig(names=("x",), sequence_length=WINDOW))
    return lm_evaluate(lm, {"tasks": {"rolling": task}}, bootstrap_iters=0)["results"]["rolling"]


@torch.no_grad()
def nats(model, tokens: list[int], windows: list[tuple[int, int, int]]) -> float:
    """Cross-entropy by a loop: (first token of the context, first predicted, first not predicted) of each window."""
    total = 0.0
    for begin, first, stop in windows:
        logits = model(torch.tensor([tokens[begin : stop - 1]])).logits[0].double().log_softmax(-1)
        total -= sum(logits[position - 1 - begin, tokens[position]].item() for position in range(first, stop))
    return total


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("length", [7, WINDOW, 2 * WINDOW], ids=["shorter", "one_window", "two_windows"])
def test_our_perplexity_is_lm_evals_byte_perplexity(kind, length, tmp_path):
    """Where the text fits the window, or fills windows, and the stream's EOS is lm-eval's prefix token."""
    model, text = MODELS[kind](), of(length)
    found, expected = ours(model, text, tmp_path / "one"), theirs(model, text)
    assert found["bytes"] == length and found["tokens"] == length
    assert math.exp(found["nats"] / found["bytes"]) == pytest.approx(expected["byte_perplexity,none"], rel=1e-5)
    assert found["nats"] / found["bytes"] / math.log(2) == pytest.approx(expected["bits_per_byte,none"], rel=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_the_last_window_is_where_conventions_differ(kind, tmp_path):
    """Ours begins where the one before ended; lm-eval's reaches back until it is full, so its last tokens see more."""
    model, length = MODELS[kind](), 2 * WINDOW + 9
    text = of(length)
    tokens = [0, *byte_tokenizer()(text, add_special_tokens=False)["input_ids"]]
    whole = [(0, 1, WINDOW + 1), (WINDOW, WINDOW + 1, 2 * WINDOW + 1)]
    fresh = nats(model, tokens, [*whole, (2 * WINDOW, 2 * WINDOW + 1, length + 1)])
    full = nats(model, tokens, [*whole, (length - WINDOW, 2 * WINDOW + 1, length + 1)])
    assert ours(model, text, tmp_path / "one")["nats"] == pytest.approx(fresh, rel=1e-5)
    assert length * math.log(theirs(model, text)["byte_perplexity,none"]) == pytest.approx(full, rel=1e-5)
    assert abs(fresh - full) > 0.1


def test_a_documents_closing_eos_is_ours_alone(tmp_path):
    model, text = dense(), of(20)
    tokens = [0, *byte_tokenizer()(text, add_special_tokens=False)["input_ids"], 0]
    closing = nats(model, tokens, [(0, 21, 22)])
    closed = ours(model, text, tmp_path / "one", closed=True)["nats"]
    assert closed - closing == pytest.approx(20 * math.log(theirs(model, text)["byte_perplexity,none"]), rel=1e-5)


# ---------------------------------------------------------------------------------------------- models of known answers


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> dict[str, Path]:
    """Two domains' questions, as files."""
    root = tmp_path_factory.mktemp("questions")
    for seed, domain in enumerate(("law", "code")):
        (root / domain).mkdir()
        rows = make_questions(texts(rng_seed=seed), domain, SMALL, 0.7)
        (root / domain / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {domain: root / domain for domain in ("law", "code")}


def rows_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "questions.jsonl").read_text().splitlines()]


def measured(model, questions, tmp_path, **changes) -> dict:
    config = TasksConfig(**{"names": ("continuations",)} | changes)
    tasks = planned(config, list(questions))
    return harness.measure(model, byte_tokenizer(), tasks, questions, config, tmp_path / "kept")["tasks"]


def encoded(text: str) -> list[int]:
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("certainty", "accuracy"), [(20.0, 1.0), (-20.0, 0.0)], ids=["knows", "denies"])
def test_who_knows_the_documents_is_always_right(questions, certainty, accuracy, tmp_path):
    right = [row["context"] + row["choices"][row["answer"]] for part in questions.values() for row in rows_of(part)]
    found = measured(Reciter([encoded(text) for text in right], certainty), questions, tmp_path)
    for task in ("continuations_law", "continuations_code"):
        figures = found[task]["metrics"]
        assert list(figures) == list(harness.ACCURACIES)
        assert {name: figure["value"] for name, figure in figures.items()} == dict.fromkeys(figures, accuracy)
        assert figures["acc"]["stderr"] == 0 and found[task]["chance"] == 0.25 and found[task]["questions"] == 16


def test_who_knows_nothing_has_chance_exactly(questions, tmp_path):
    """All choices are as long, so to a uniform model all are equal, the first is taken, and places are balanced."""
    model = dense()
    torch.nn.init.zeros_(model.lm_head.weight)
    for row in measured(model, questions, tmp_path).values():
        assert {figure["value"] for figure in row["metrics"].values()} == {row["chance"]} == {0.25}


def test_accuracy_equals_a_loop_over_questions(questions, tmp_path):
    model = MODELS["bam"]()
    found = measured(model, questions, tmp_path, batch_sequences=3, names=("continuations_law",))
    for domain, directory in [("law", questions["law"])]:
        right, gain = [], []
        for row in rows_of(directory):
            context = encoded(row["context"])
            scores, alone = [], []
            for choice in row["choices"]:
                tokens = context + encoded(choice)
                scores.append(-nats(model, tokens, [(0, len(context), len(tokens))]))
                alone.append(-nats(model, [0, *encoded(choice)], [(0, 1, len(encoded(choice)) + 1)]))
            right.append(int(np.argmax(scores)) == row["answer"])
            gain.append(int(np.argmax(np.array(scores) - alone)) == row["answer"])
        figures = found[f"continuations_{domain}"]["metrics"]
        assert figures["acc"]["value"] == figures["acc_norm"]["value"] == pytest.approx(np.mean(right))
        assert figures["acc_mutual_info"]["value"] == pytest.approx(np.mean(gain))
        sources = np.array([row["source"] for row in rows_of(directory)])
        assert figures["acc"]["stderr"] == pytest.approx(clustered_error(np.array(right, float), sources), abs=1e-9)
        low, high = figures["acc"]["interval"]
        assert high - low == pytest.approx(2 * 1.96 * figures["acc"]["stderr"], rel=1e-3)


ROUTERS = [
    {"router": "topk_softmax", "num_experts_per_tok": 2}, {"router": "softmax_topk", "num_experts_per_tok": 1},
    {"router": "soft"}, {"router": "switch"}, {"router": "sample_top1"}, {"router": "hash"}, {"router": "uniform"},
    {"router": "expert_choice", "num_experts_per_tok": 2},
    {"router": "topk_softmax", "num_experts_per_tok": 2, "router_options": {"per": "segment", "tokens": 4}},
    {"router": "topk_softmax", "num_experts_per_tok": 2, "router_options": {"per": "prefix", "tokens": 4}},
    {"attention": "mixture"}, {"router": "oracle", "expert_sources": ["seed", "code", "law"]},
]  # fmt: skip


@pytest.mark.parametrize("choices", ROUTERS, ids=lambda choices: "-".join(map(str, choices.values()))[:40])
def test_no_router_sees_the_padding_that_lm_eval_hides(choices):
    """It pads batches on the right and passes no mask: no likelihood may depend on who else is in the batch."""
    model = mixture(**choices)
    pairs = [
        ("stone", " river"),
        ("apple wooden tall", " quick"),
        ("never", " blue seven candle paper glass"),
        ("a", "b"),
    ]
    found = []
    for size in (1, 4):
        lm = harness.in_memory(model, byte_tokenizer(), TasksConfig(names=("x",), batch_sequences=size))
        requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
        with harness.routed_to(model, "law"):
            found.append([nat for nat, _ in lm.loglikelihood(requests, disable_tqdm=True)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_an_oracle_is_told_the_domain_of_a_task(questions, tmp_path):
    """With its own domain's expert alone, the mixture's likelihoods are that dense model's."""
    from tests.tasks import SIZES
    from tests.tiny import dense_models, mixture_of

    parts = dense_models("llama", 3, dtype=torch.float32, **SIZES)
    with torch.no_grad():
        for part in parts[1:]:  # all but the experts are the seed's
            own = {n: p.clone() for n, p in part.named_parameters() if ".mlp." in n}
            part.load_state_dict(parts[0].state_dict())
            part.load_state_dict(own, strict=False)
    model = mixture_of(parts, router="oracle", expert_sources=["seed", "code", "law"])
    found = measured(model, questions, tmp_path)
    for n, domain in ((1, "code"), (2, "law")):
        alone = measured(parts[n], {domain: questions[domain]}, tmp_path / domain)
        assert found[f"continuations_{domain}"] == alone[f"continuations_{domain}"]
    with pytest.raises(ValueError, match="an oracle router needs each sequence's expert"):
        harness.in_memory(model, byte_tokenizer(), TasksConfig(names=("x",)))._model_call(torch.ones(1, 3).long())


# ------------------------------------------------------------------------------------------------------------ questions


def test_questions_are_what_they_say():
    documents = texts(20)
    rows = make_questions(documents, "law", SMALL, 0.7)
    assert len(rows) == 16 and [row["answer"] for row in rows].count(2) == 4
    for row in rows:
        right = row["choices"][row["answer"]]
        (home,) = [text for text in documents if row["context"] + right in text]
        assert len(row["context"]) <= SMALL.context_characters and not row["context"][-1].isspace()
        assert {len(choice) for choice in row["choices"]} == {20} and len(set(row["choices"])) == 4
        assert all(choice[0].isspace() for choice in row["choices"])
        for choice in row["choices"]:
            assert (choice == right) or any(choice in text for text in documents if text != home)
    assert rows == make_questions(documents, "law", SMALL, 0.7) != make_questions(documents, "code", SMALL, 0.7)


def test_wrong_choices_never_come_from_near_duplicates_or_copies():
    base, others = texts(1, words=400)[0], texts(4, words=100, rng_seed=5)
    near = base.replace("candle", "lantern", 1)
    rows = make_questions([base, near, *others], "law", ContinuationsConfig(questions=30, context_characters=40), 0.7)
    assert any(row["source"] == rows[0]["source"] for row in rows[1:])
    for row in rows:
        if row["context"] in base:
            wrong = [choice for n, choice in enumerate(row["choices"]) if n != row["answer"]]
            assert not any(choice in base or choice in near for choice in wrong)


def test_lm_eval_scores_all_of_a_choice_and_nothing_else(tmp_path):
    """It encodes context and choice together and drops as many tokens as the context alone has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from upcycle.config import TokenizerConfig
    from upcycle.data import fit_tokenizer

    documents = [f"def f(x):\n    return x + {n}\n\n{text}.\n" for n, text in enumerate(texts(20))]
    pq.write_table(pa.table({"text": documents}), tmp_path / "train.parquet")
    fit_tokenizer(TokenizerConfig(vocab_size=330, proportions={"a": 1.0}), {"a": tmp_path}, tmp_path / "tokenizer")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    lm = harness.in_memory(dense(vocab_size=330), tokenizer, TasksConfig(names=("x",)))
    lengths = set()
    for row in make_questions(documents, "code", SMALL, 0.9):
        for choice in row["choices"]:
            _, scored = lm._encode_pair(row["context"], choice)
            assert tokenizer.decode(scored) == choice
            lengths.add(len(scored))
    assert len(lengths) > 1  # as many characters, not as many tokens


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (texts(1, 400), "domain law: its 1 held-out documents hold .* from 1 that are not near duplicates"),
        (["short text"] * 9, "hold 0 passages of 60 characters"),
    ],
)
def test_too_little_text_is_named(documents, message):
    with pytest.raises(ValueError, match=message):
        make_questions(documents, "law", SMALL, 0.7)


def test_the_error_over_documents_equals_loops():
    rng = np.random.default_rng(3)
    source_N = rng.integers(0, 7, 60)
    correct_N = (rng.random(60) < 0.2 + 0.1 * source_N).astype(float)
    total = 0.0
    for source in set(source_N):
        total += sum(correct_N[n] - correct_N.mean() for n in range(60) if source_N[n] == source) ** 2
    assert clustered_error(correct_N, source_N) == pytest.approx(math.sqrt(7 / 6 * total) / 60)
    # One question a document: lm-eval's own. Every question n times over: the same, and not √n smaller.
    alone = clustered_error(correct_N, np.arange(60))
    assert alone == pytest.approx(mean_stderr(correct_N.tolist()))
    assert clustered_error(correct_N.repeat(4), np.arange(60).repeat(4)) == pytest.approx(alone)
    assert clustered_error(correct_N, np.zeros(60)) is None


# --------------------------------------------------------------------------------------------------- lm-eval's own tasks


@pytest.fixture
def own_tasks(tmp_path, monkeypatch) -> None:
    """Three tasks in lm-eval's files, in place of its own: choices, generation, and a group of the first."""
    lines = [{"q": f"{a} plus {b} is", "sum": str(a + b), "other": str(a + b + 1)} for a in range(4) for b in range(3)]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {
        "dataset_path": "json", "test_split": "train", "training_split": "train", "fewshot_split": "train",
        "dataset_kwargs": {"data_files": str(data), "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "{{q}}",
    }  # fmt: skip
    mean = {"aggregation": "mean", "higher_is_better": True}
    chosen = common | {
        "task": "sums_chosen", "output_type": "multiple_choice", "doc_to_choice": "{{[sum, other]}}", "doc_to_target": "{{0}}",
        "metric_list": [{"metric": "acc"} | mean],
    }  # fmt: skip
    written = common | {
        "task": "sums_written", "output_type": "generate_until", "doc_to_target": "{{sum}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3}, "metric_list": [{"metric": "exact_match"} | mean],
        "num_fewshot": 0,
    }  # fmt: skip
    group = {
        "group": "sums",
        "task": ["sums_chosen"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    unsafe = written | {"task": "sums_run", "unsafe_code": True}
    (tmp_path / "tasks").mkdir()
    for number, task in enumerate((chosen, written, group, unsafe)):
        (tmp_path / "tasks" / f"{number}.yaml").write_text(yaml.safe_dump(task))
    found = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    monkeypatch.setattr(harness, "index", lambda: found)


def test_tasks_groups_and_generation_of_lm_eval_run(own_tasks, tmp_path):
    found = measured(MODELS["btx"](), {}, tmp_path, names=("sums", "sums_written"), num_fewshot=2, limit=6)
    assert found["sums"]["group"] is None and found["sums_chosen"]["group"] == "sums"
    assert found["sums_chosen"]["num_fewshot"] == 2 and found["sums_written"]["num_fewshot"] == 0  # the file says 0
    assert found["sums_chosen"]["chance"] == 0.5 and found["sums_written"]["chance"] is None
    assert found["sums"]["metrics"]["acc"]["value"] == found["sums_chosen"]["metrics"]["acc"]["value"]
    assert found["sums_written"]["questions"] == 6 and found["sums_written"]["metrics"]["exact_match"]["value"] == 0


def test_figures_do_not_depend_on_other_tasks(own_tasks, tmp_path):
    """Examples are drawn at random: anew for each task."""
    model = MODELS["btx"]()
    alone = measured(model, {}, tmp_path / "a", names=("sums_chosen",), num_fewshot=3)
    after = measured(model, {}, tmp_path / "b", names=("sums_written", "sums_chosen"), num_fewshot=3)
    assert alone["sums_chosen"] == after["sums_chosen"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["sums_choosen"], r"names has 'sums_choosen', which is neither a suite \(continuations, btx, bam\) nor among the 4 "
         r"tasks.*did you mean sums_chosen"),
        (["continuation"], r"did you mean continuations\?"),
        (["continuations_lw"], r"'continuations_lw', which needs a domain's documents; this run has continuations of law, code; "
         r"did you mean continuations_law"),
        (["sums_run"], "execute_code=false, but sums_run run the programs that models write"),
    ],
)  # fmt: skip
def test_wrong_names_stop_with_the_nearest(own_tasks, names, message):
    with pytest.raises(ValueError, match=message):
        check_tasks(TasksConfig(names=tuple(names)), ["law", "code"])


def test_leave_to_run_programs_is_enough(own_tasks):
    assert check_tasks(TasksConfig(names=("sums_run",), execute_code=True), []) == [Planned("sums_run")]


def test_without_lm_eval_the_command_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(suites, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(ValueError, match=r"needs lm-eval, which is not installed; pip install -e '\.\[eval\]'"):
        check_tasks(TasksConfig(names=("continuations",)), ["law"])


def test_suites_are_planned_once_each_with_the_papers_examples():
    found = planned(TasksConfig(names=("btx", "continuations_law", "bam", "mmlu")), ["law", "code"])
    assert [one.name for one in found] == [*BTX, "continuations_law", "legalbench"]
    assert {one.name: one.num_fewshot for one in found} == BAM | {"continuations_law": 0}
    assert {one.num_fewshot for one in planned(TasksConfig(names=("btx",), num_fewshot=1), [])} == {1}


@pytest.mark.slow
def test_every_name_of_the_papers_is_a_task_of_this_lm_eval_and_needs_the_hub():
    names = [name for suite in PAPERS.values() for name in suite]
    known = harness.index()
    assert len(known.all_tasks) > 5000 and not [name for name in names if name not in known.task_index]
    harness.check_names(names, [], execute_code=True)
    with pytest.raises(ValueError, match="humaneval, mbpp, humaneval, mbpp run the programs"):
        harness.check_names(names, [], execute_code=False)
    with pytest.raises(ValueError, match="which is neither a suite .* did you mean piqa"):
        harness.check_names(["piqua"], [], execute_code=False)
    with pytest.raises(ValueError, match="lm-eval cannot load arc_easy: .*Its data comes from the Hugging Face Hub"):
        harness.run_one(None, Planned("arc_easy"), {}, TasksConfig(names=("arc_easy",)))


# --------------------------------------------------------------------------------------------------------------- stages


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("model")
    MODELS["btx"]().save_pretrained(root)
    byte_tokenizer().save_pretrained(root)
    return root


def test_the_stages_read_held_out_text_only_and_go_on_after_a_crash(saved, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    documents = tmp_path / "documents"
    documents.mkdir()
    pq.write_table(pa.table({"text": ["TRAINING TEXT " * 50] * 9}), documents / "train.parquet")
    pq.write_table(pa.table({"text": texts(30)}), documents / "test.parquet")
    questions = {}
    for domain in ("law", "code"):
        settings = {"domain": domain, "split": "test", "continuations": SMALL, "near_duplicate_similarity": 0.7}
        (tmp_path / domain).mkdir()
        write_questions(settings, out=tmp_path / domain, run=Run(), documents=documents)
        assert "TRAINING" not in (tmp_path / domain / "questions.jsonl").read_text()
        questions[domain] = tmp_path / domain
    out, config = tmp_path / "out", TasksConfig(names=("continuations",))
    out.mkdir()

    def crash(done, total, doing):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks(config, out=out, run=Run(advance=crash), model=saved, questions=questions)
    ran = []
    run_one = harness.run_one
    monkeypatch.setattr(harness, "run_one", lambda lm, one, *rest: ran.append(one.name) or run_one(lm, one, *rest))
    run_tasks(config, out=out, run=Run(), model=saved, questions=questions)
    assert ran == ["continuations_code"]
    whole = tmp_path / "whole"
    whole.mkdir()
    run_tasks(config, out=whole, run=Run(), model=saved, questions=questions)
    assert (out / "tasks.json").read_text() == (whole / "tasks.json").read_text()


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(saved, questions, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        path.mkdir()
    run_tasks(TasksConfig(names=("continuations",)), out=one, run=Run(), model=saved, questions=questions)
    job = {"out": str(two), "model": str(saved), "questions": {name: str(path) for name, path in questions.items()}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    words = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch/accelerate/ddp.yaml"),
        "--num_processes", "2", str(ROOT / "tests" / "tasks.py"), str(tmp_path / "job.json"),
    ]  # fmt: skip
    done = subprocess.run(words, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (two / "ranks-0-of-2").exists() and (two / "ranks-1-of-2").exists()
    assert (one / "tasks.json").read_text() == (two / "tasks.json").read_text()


# --------------------------------------------------------------------------------------------------------------- report


def test_the_report_shows_chance_and_every_models_figure(tmp_path):
    def task(value, error, group=None):
        metrics = {
            "acc": {"value": value, "stderr": error, "interval": None},
            "acc_norm": {"value": 1.0, "stderr": None},
        }
        return {"metrics": metrics, "chance": 0.25, "questions": 8, "sources": None, "group": group}

    report = {"models": {"seed": {}, "btx": {}, "oracle": {}}}
    for name, value in (("seed", 0.5), ("btx", 0.625)):
        (tmp_path / name).mkdir()
        tasks = {"law": task(value, 0.1), "part": task(0.1, None, "mmlu"), "run": task(0.2, None)}
        (tmp_path / name / "tasks.json").write_text(json.dumps({"lm_eval": "1", "tasks": tasks}))
    add_tasks(report, {name: tmp_path / name for name in ("seed", "btx")})
    assert report["models"]["btx"]["tasks"]["law"]["metrics"]["acc"]["value"] == 0.625
    assert "tasks" not in report["models"]["oracle"]
    assert task_rows(report) == [
        ["model", "law acc", "run acc"], ["chance", "0.250", "0.250"], ["seed", "0.500 ± 0.100", "0.200"],
        ["btx", "0.625 ± 0.100", "0.200"],
    ]  # fmt: skip
    assert "btx     0.625 ± 0.100  0.200" in format_tasks(report)
    assert format_tasks({"models": {}}) == task_rows({"models": {}}) == []
