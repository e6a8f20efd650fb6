"""lm-eval on a model in memory: any of its tasks, and the continuations of a run's own domains.

lm-eval is given our model object and our tokenizer; it loads nothing, and needs the network for its own tasks' data only.
Each task is evaluated alone and seeded anew, so that its figures depend neither on the other tasks nor on which rank had it.

Quirks of lm-eval 0.4.13 that this file works around or lives with:
- `simple_evaluate` returns nothing where LOCAL_RANK is not 0, so ranks call `evaluate`, and fill in the rest of it here.
- Splitting a task's questions over ranks would give each rank other few-shot examples (one generator for all questions);
  whole tasks are split instead.
- Batches are padded on the right without a mask. Routers are causal in evaluation, so nothing that counts sees it; those that are not
  (pool.first=own_mean) are refused.
- A task whose file says `num_fewshot: 0` keeps it: its prompt has no place for examples.
- A standard error of a mean takes questions for independent; for continuations, which come several from one document, ours
  does not. Of equal choices argmax takes the first.
- `acc_norm` divides by characters, not bytes or tokens. Progress bars can only be silenced with standard error.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evals.perplexity import check_positions, expert_of_domain
from evals.suites import Planned
from evals.suites.continuations import clustered_error
from upcycle.config import TasksConfig, nearest
from upcycle.durable import write_json
from upcycle.modeling import UpcycledForCausalLM
from upcycle.router import RoutingTrace
from upcycle.store import ignore
from upcycle.team import ALONE, Team

NORMAL_95 = 1.959964  # standard errors from a mean to the ends of its 95% interval
BOOTSTRAP_SAMPLES = 1000  # of metrics without a formula; lm-eval's own default is 100,000
DIGITS = 12  # of a figure
# Of continuations; the report shows the first. Models as small as the demo's choose the passage that is likeliest anywhere,
# and acc stays at chance; acc_mutual_info asks what the context adds: log p(choice | context) − log p(choice).
ACCURACIES = ("acc_mutual_info", "acc", "acc_norm")


@lru_cache(maxsize=1)
def index() -> TaskManager:
    """All of lm-eval's tasks by name: it reads some ten thousand files, which takes seconds."""
    with quiet():
        return TaskManager()


def check_names(names: Sequence[str], suites: Sequence[str], execute_code: bool) -> None:
    """Raises ValueError: a name that lm-eval does not know; a task that runs what models write, without leave."""
    known = index()
    for name in names:
        if name not in known.task_index:
            raise ValueError(
                f"names has {name!r}, which is neither a suite ({', '.join(suites)}) nor among the "
                f"{len(known.all_tasks)} tasks, groups and tags of lm-eval "
                f"{importlib.metadata.version('lm_eval')}{nearest(name, [*suites, *known.all_tasks])}"
            )
    running = [name for name in names if (known.task_index[name].cfg or {}).get("unsafe_code")]
    if running and not execute_code:
        raise ValueError(
            f"execute_code=false, but {', '.join(running)} run the programs that models write, on this machine; set "
            "execute_code=true (and HF_ALLOW_CODE_EVAL=1) where that is safe, or leave them out of names"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's progress bars and remarks; errors are raised as ever."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def in_memory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TasksConfig) -> HFLM:
    """The model as lm-eval calls it, where it is. Logits become probabilities in fp32.

    Raises ValueError: inputs longer than the model's positions; a router that looks ahead.
    """
    if getattr(model.config, "leaks", 0):
        raise ValueError(
            "this mixture routes its first tokens by later ones (pool.first=own_mean), the answers of tasks among them; no task is a test of it"
        )
    own = check_positions(model, config.sequence_length, "tasks.sequence_length")
    with quiet():
        return HFLM(
            pretrained=model,  # pyright: ignore[reportArgumentType]
            tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
            backend="causal",  # else it looks for the class in transformers' tables, where mixtures may be missing
            batch_size=config.batch_sequences,
            max_length=config.sequence_length or own,
            mixed_precision_dtype=torch.bfloat16 if config.precision == "bf16" else None,
            softmax_dtype=torch.float32,
        )


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Planned],
    questions: Mapping[str, Path],
    config: TasksConfig,
    kept: Path,
    advance: Callable = ignore,
    team: Team = ALONE,
) -> dict[str, Any]:
    """`tasks.json` of one model, on every rank of `team`; every rank holds the whole model and takes whole tasks in turn.

    questions: by domain, directories with questions.jsonl. kept: a directory for each finished task's figures, from which
    a later attempt goes on.
    """
    model = model.eval().to(team.device)
    lm = in_memory(model, tokenizer, config)
    finished = team.share({one.name: found for one in tasks if (found := _read(kept, one)) is not None})
    left = [one for one in tasks if one.name not in finished]
    mine = {}
    for done, one in enumerate(left[team.rank :: team.size]):
        advance(len(finished) + done * team.size, len(tasks), doing=f"tasks, now {one.name}")
        with routed_to(model, one.domain):
            mine[one.name] = run_one(lm, one, questions, config)
        kept.mkdir(parents=True, exist_ok=True)
        write_json(_file(kept, one), mine[one.name], sort_keys=False)
    advance(len(tasks), len(tasks), doing="tasks")
    for part in team.gather(mine):
        finished |= part
    results: dict[str, Any] = {}
    for one in tasks:
        results |= finished[one.name]
    return {"lm_eval": importlib.metadata.version("lm_eval"), "tasks": results}


def _file(kept: Path, one: Planned) -> Path:
    return kept / f"{one.name.replace('/', '-')}.json"


def _read(kept: Path, one: Planned) -> dict[str, Any] | None:
    return json.loads(_file(kept, one).read_text()) if _file(kept, one).is_file() else None


@contextmanager
def routed_to(model: PreTrainedModel, domain: str | None) -> Iterator[None]:
    """Oracle routers are told the domain's expert, which lm-eval has no word for, before every forward.

    Raises ValueError: an oracle without an expert for the domain. (Without a domain its own forward complains.)
    """
    mixture = isinstance(model, UpcycledForCausalLM)
    expert = expert_of_domain(model.config, domain) if mixture and domain is not None else None
    if expert is None:
        yield
        return

    def tell(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        ids = args[0] if args else kwargs["input_ids"]
        expert_B = torch.full((len(ids),), expert, device=ids.device)
        return args, kwargs | {"trace": RoutingTrace(expert_B=expert_B)}

    hook = model.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def run_one(lm: HFLM, one: Planned, questions: Mapping[str, Path], config: TasksConfig) -> dict[str, Any]:
    """Figures of one task, of a group and its members, or of a tag's members, by name.

    Raises ValueError: the task's data cannot be loaded.
    """
    local = one.domain is not None
    with quiet():
        loaded: Any = (
            {"tasks": {one.name: continuation_task(one.name, questions[one.domain] / "questions.jsonl")}}
            if one.domain is not None
            else _of_lm_eval(one.name)
        )
        for task in loaded["tasks"].values():
            _set_examples(task, one.num_fewshot, config.rng_seed)
        random.seed(config.rng_seed)  # as simple_evaluate does: tasks may draw from any of the three
        np.random.seed(config.rng_seed)
        torch.manual_seed(config.rng_seed)
        found: Any = evaluate(
            lm,
            loaded,
            limit=config.limit,
            bootstrap_iters=BOOTSTRAP_SAMPLES,
            log_samples=local,
            confirm_run_unsafe_code=config.execute_code,
        )
    groups = loaded.get("group_map", {})
    member_of = {member: group for group, members in groups.items() for member in members}
    results = {}
    for name, row in found["results"].items():
        task = loaded["tasks"].get(name)
        samples = found["samples"][name] if local else None
        if metrics := _metrics(row, samples):
            results[name] = {
                "metrics": metrics,
                "chance": None if task is None else _chance(task),
                "questions": row.get("sample_len"),
                "sources": len({sample["doc"]["source"] for sample in samples}) if samples else None,
                "num_fewshot": None if task is None else task.config.num_fewshot,
                "version": found["versions"].get(name),
                "group": member_of.get(name),
            }
    return results


def continuation_task(name: str, file: Path) -> ConfigurableTask:
    """The questions of one domain as a task of lm-eval's kind multiple_choice. Its fields are columns, not templates:
    Jinja would read the braces of a text."""
    rows = Dataset.from_list([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": rows},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",  # the choices bring their own white space
            "num_fewshot": 0,
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ACCURACIES],
        }
    )


def _of_lm_eval(name: str) -> Any:
    try:
        return index().load([name])
    except (
        OSError,
        ImportError,
        ValueError,
        RuntimeError,
    ) as error:  # no network, no such file, a library of the task's
        raise ValueError(
            f"tasks.names: lm-eval cannot load {name}: {type(error).__name__}: {error}. Its data comes from the Hugging "
            "Face Hub or its cache; download it where there is a network, install what is missing, or leave the task out"
        ) from error


def _set_examples(task: Any, num_fewshot: int | None, rng_seed: int) -> None:
    """As `simple_evaluate` does."""
    own = task.get_config("num_fewshot")
    if own != 0:
        task.set_config("num_fewshot", (own or 0) if num_fewshot is None else num_fewshot)
    task.set_fewshot_seed(rng_seed)


def _metrics(row: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """{metric: its value, standard error and 95% interval}; "metric,filter" where an answer was filtered."""
    metrics = {}
    for key, value in (
        row.items() if samples is None else [(f"{name},none", row[f"{name},none"]) for name in ACCURACIES]
    ):
        metric, comma, answer_filter = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = row.get(f"{metric}_stderr,{answer_filter}")
        if samples is not None:
            source_N = np.array([sample["doc"]["source"] for sample in samples])
            error = clustered_error(np.array([float(sample[metric]) for sample in samples]), source_N)
        error = round(float(error), DIGITS) if isinstance(error, int | float) else None  # lm-eval's "N/A"
        value = round(float(value), DIGITS)
        interval = None if error is None else [value - NORMAL_95 * error, value + NORMAL_95 * error]
        name = metric if answer_filter == "none" else f"{metric},{answer_filter}"
        metrics[name] = {"value": value, "stderr": error, "interval": interval}
    return metrics


def _chance(task: Any) -> float | None:
    """The accuracy of guessing: the mean of 1 / choices; None where nothing is chosen, or several choices are right."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_target:
        return None
    choices = {instance.doc_id: len(task.doc_to_choice(instance.doc)) for instance in task.instances}
    return round(sum(1 / count for count in choices.values()) / len(choices), DIGITS)
