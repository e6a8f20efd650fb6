"""The stages: glue between settings, input directories and the library. Each is a pure function of both.

Heavy imports are inside the functions: planning a run imports this file and must not wait for torch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from upcycle.config import SeedConfig, TokenizerConfig
from upcycle.durable import write_json
from upcycle.merge_config import MergeConfig
from upcycle.mixture_config import AssembleConfig
from upcycle.store import Run, versioned

OVERLAP_NGRAM = 13  # tokens; long enough that a match is copied text, as in GPT-3's report (arXiv:2005.14165)


@versioned(1)
def collect_documents(config: dict[str, Any], *, out: Path, run: Run, num_proc: int | None = None) -> None:
    """A domain's documents, split by the hash of their near-duplicate cluster. config: `domain`, `data`."""
    from dataclasses import replace

    from upcycle.data import collect_domain

    found = collect_domain(replace(config["domain"], num_proc=num_proc), config["data"], out, run.advance)
    sizes = ", ".join(f"{split} {n['documents']} ({n['bytes'] / 1e6:.1f} MB)" for split, n in found["splits"].items())
    near = sum(n["near_duplicates"] for n in found["splits"].values())
    run.say(f"documents: {sizes}; {near} near duplicates kept in their cluster's split")


@versioned(1)
def train_tokenizer(config: TokenizerConfig, *, out: Path, run: Run, documents: dict[str, Path]) -> None:
    from upcycle.data import fit_tokenizer

    fit_tokenizer(config, documents, out, run.advance)


@versioned(1)
def tokenize_documents(
    config: None, *, out: Path, run: Run, documents: Path, tokenizer: Path, num_proc: int | None = None
) -> None:
    """Token arrays of every split, and how much of the test split's n-grams the training split has too."""
    from upcycle.data import ngram_overlap, tokenize_domain

    tokenize_domain(documents, tokenizer, out, num_proc, run.advance)
    overlap = ngram_overlap(out, out, OVERLAP_NGRAM, run.advance)
    write_json(out / "overlap.json", {"ngram": OVERLAP_NGRAM, "test_in_train": overlap})
    run.say(f"{OVERLAP_NGRAM}-gram overlap of test with train: {overlap:.2%}")


@versioned(1, together=True)
def prepare_seed(config: SeedConfig, *, out: Path, run: Run, tokenizer: Path, data: dict[str, Path]) -> None:
    """A seed of `config.architecture` and `config.sizes`, initialised and pretrained here."""
    import torch
    from accelerate.utils import set_seed
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    assert config.architecture is not None and config.train is not None
    words = AutoTokenizer.from_pretrained(tokenizer)
    ids = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = AutoConfig.for_model(config.architecture, **{**config.sizes, **ids, "vocab_size": len(words)})
    set_seed(config.train.rng_seed)
    model = AutoModelForCausalLM.from_config(sizes, dtype=torch.float32)
    _train_and_save(model, config.train, None, data, tokenizer, out, run)


@versioned(1)
def import_model(config: None, *, out: Path, run: Run, path: str) -> None:
    """A checkpoint of the user's, copied into the store; its content is its key."""
    from upcycle.checkpoint import import_checkpoint

    import_checkpoint(Path(path), out, run.advance)


@versioned(1, together=True)
def train_model(config: dict[str, Any], *, out: Path, run: Run, model: Path, data: dict[str, Path]) -> None:
    """Continue training a dense model or a mixture. config: `train`, `skip_tokens` (already used by earlier stages)."""
    import torch
    from transformers import AutoModelForCausalLM

    import upcycle.modeling  # noqa: F401  (registers the mixture's classes)
    from upcycle.zero import partitioned_loading

    with partitioned_loading(run.team):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    _train_and_save(loaded, config["train"], config["skip_tokens"], data, model, out, run)


def _train_and_save(model, train_config, skip_tokens, data, tokenizer: Path, out: Path, run: Run) -> None:
    from upcycle.cost import Shape
    from upcycle.directories import copy_companions
    from upcycle.train import train, write_trained

    shape = Shape.of_config(model.config.to_dict())
    flops = shape.step_flops_per_token(train_config.sequence_length, train_config.micro_batch_sequences)
    engine = train(model, train_config, data, out, run, flops, skip_tokens)
    write_trained(engine, out)
    engine.close()
    if not run.team.leads:
        return
    copy_companions(tokenizer, out)
    if (tokenizer / "assembly.json").is_file():  # what a mixture's tensors came from stays true of it
        shutil.copyfile(tokenizer / "assembly.json", out / "assembly.json")


@versioned(1, together=True)
def measure_curvature(config: dict[str, Any], *, out: Path, run: Run, model: Path, data: dict[str, Path]) -> None:
    """curvature.safetensors of a dense model, and curvature.json: what was measured, on what. config: `curvature`
    (CurvatureConfig), `proportions` of the domains whose training text it is measured on."""
    from tempfile import TemporaryDirectory

    import torch
    from transformers import AutoModelForCausalLM

    from upcycle.batches import Batches, consumed_tokens
    from upcycle.curvature import measure, write_statistics

    wanted, proportions = config["curvature"], config["proportions"]
    batches = Batches(data, proportions, wanted.sequence_length, 1, wanted.rng_seed)
    for warning in batches.check(wanted.sequences):
        run.say(f"warning: {warning}")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = consumed_tokens(proportions, wanted.rng_seed, wanted.sequence_length, wanted.sequences)
    with TemporaryDirectory(dir=out) as scratch:
        found = measure(loaded, batches, wanted, Path(scratch), run.advance, run.team)
        if run.team.leads:
            write_statistics(found, wanted, tokens, out)
        run.team.wait()


@versioned(1)
def compare_curvature(config: None, *, out: Path, run: Run, model: Path, fisher: Path, hessian: Path) -> None:
    """curvature_report.json: the Fisher's diagonal of a model against Hutchinson's estimate of the Hessian's."""
    from transformers import AutoConfig

    from upcycle.curvature_report import compare_diagonals, in_words
    from upcycle.merger import Statistics
    from upcycle.roles import tensor_facts

    found = compare_diagonals(Statistics(fisher), Statistics(hessian), tensor_facts(AutoConfig.from_pretrained(model)))
    write_json(out / "curvature_report.json", found)
    run.advance(1, 1)
    for line in in_words(found):
        run.say(line)


@versioned(1)
def compare_task_arithmetic(
    config: dict[str, Any],
    *,
    out: Path,
    run: Run,
    seed: Path,
    branches: dict[str, Path],
    target: Path,
    fisher: Path,
    at_target: dict[str, Path],
    at_branch: dict[str, Path],
) -> None:
    """error.json: how far task arithmetic of the branches is from `target`, measured and predicted. config: `scale`. fisher: the
    seed's. at_target, at_branch: the gradient of each branch's loss there."""
    from transformers import AutoConfig

    from upcycle.checkpoint import Checkpoint
    from upcycle.curvature_report import compare_error, error_in_words
    from upcycle.merger import Statistics
    from upcycle.roles import tensor_facts

    models = {name: Checkpoint(path) for name, path in ({"seed": seed} | branches).items()}
    gradients = {name: (Statistics(at_target[name]), Statistics(at_branch[name])) for name in branches}
    facts = tensor_facts(AutoConfig.from_pretrained(seed))
    found = compare_error(models, Checkpoint(target), Statistics(fisher), gradients, config["scale"], facts)
    write_json(out / "error.json", found)
    run.advance(1, 1)
    for line in error_in_words(found):
        run.say(line)


@versioned(2)
def learn_camex(
    config: dict[str, Any], *, out: Path, run: Run, seed: Path, branches: dict[str, Path], data: dict[str, Path]
) -> None:
    """The curvature and the scores of a CAMEx merge, in a directory for each model, as statistics that the merge reads.

    config: `merge`, and its `options` of camex; `weights` of the models that have a share; `texts`, the shares of domains of each; `sequence_length`;
    `rng_seed`; `assemble`, of the mixture whose non-experts are merged, or None, for a dense model.
    """
    from upcycle.camex_learning import learn_from, write_learned

    found, losses = learn_from(config, {"seed": seed} | branches, data, run.advance)
    write_learned(found, losses, config, out)
    scores = ", ".join(f"{name} {score:.3f}" for name, score in zip(found.names, found.scores, strict=True))
    run.say(f"loss {losses[0]:.3f} to {losses[-1]:.3f} on training text; scores: {scores}")


@versioned(3)
def merge_models(
    config: MergeConfig,
    *,
    out: Path,
    run: Run,
    seed: Path,
    branches: dict[str, Path],
    **curvature: dict[str, Path],
) -> None:
    """One dense model from seed and branches. curvature: the statistics that methods read, each of models by name."""
    from upcycle.dense_merge import write_merged

    made = write_merged(seed, branches, out, config, statistics=_by_model(curvature), advance=run.advance)
    _say_exceptions(made, run)


def _say_exceptions(made: dict[str, Any], run: Run) -> None:
    for method, count in made.get("averaged", {}).items():
        run.say(
            f"{method}: {count} tensors have no such curvature (no linears' weights, or too large) and are averaged"
        )


def _by_model(curvature: dict[str, dict[str, Path]]) -> dict[str, list[Path]]:
    """Every model's directories of statistics; what was learned of all together has one for each inside."""
    found: dict[str, list[Path]] = {}
    for kind, models in curvature.items():
        for name, path in models.items():
            found.setdefault(name, []).append(path / name if kind == "camex" else path)
    return found


@versioned(3)
def assemble_moe(
    config: AssembleConfig,
    *,
    out: Path,
    run: Run,
    seed: Path,
    branches: dict[str, Path],
    data: dict[str, Path] | None = None,
    **curvature: dict[str, Path],
) -> None:
    """Seed and branches as one mixture, proved against them. data: of the domains that routers start from, if some do.
    curvature: as in `merge_models`."""
    from upcycle.assembly import write_mixture
    from upcycle.families import is_listed

    statistics = _by_model(curvature)
    written = write_mixture(seed, branches, out, config, advance=run.advance, data=data, statistics=statistics)
    _say_exceptions(json.loads((out / "assembly.json").read_text()), run)
    if config.prove or not is_listed(written.seed):
        from upcycle.proof import prove

        proof = prove(out, {"seed": seed} | branches, run.advance)
        said = [f"proved: {proof['expert_tensors_hashed']} expert tensors are their branch's"]
        if errors := proof["one_hot_errors"].values():
            said.append(f"each expert alone equals its dense model within {max(errors):.1e}")
        if "base_error" in proof:
            said.append(f"so does the base, within {proof['base_error']:.1e}")
        if "mean_gate_sum" in proof:
            said.append(f"gates sum to {proof['mean_gate_sum']:.3f} on average")
        run.say("; ".join(said))


@versioned(1)
def draw_moe(config: dict[str, Any], *, out: Path, run: Run, seed: Path) -> None:
    """A mixture of the shape that assembling would give, every weight drawn at random. config: `assemble`, `branches`.

    One dense model is drawn for each source, as a seed is before its training, and they are assembled: so experts differ,
    and whatever is no expert is one model's draw, since an average of N draws would be √N too small. seed: its config and
    tokenizer are read, no weights.
    """
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    choice = replace(config["assemble"], merge=MergeConfig(method="seed"))
    with TemporaryDirectory(dir=out) as folder:
        first, *others = [
            _draw_dense(seed, Path(folder) / name, choice.rng_seed) for name in ("seed", *config["branches"])
        ]
        assemble_moe(choice, out=out, run=run, seed=first, branches={path.name: path for path in others})
    made = json.loads((out / "assembly.json").read_text())
    write_json(out / "assembly.json", made | {"drawn": True})


def _draw_dense(like: Path, out: Path, rng_seed: int) -> Path:
    """A dense model of the config and tokenizer of `like`, its weights drawn by the directory's name."""
    import torch
    from accelerate.utils import set_seed
    from transformers import AutoConfig, AutoModelForCausalLM

    from upcycle.batches import run_key
    from upcycle.directories import copy_companions

    set_seed(run_key("scratch", rng_seed, out.name) % 2**32)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(like), dtype=torch.float32).save_pretrained(out)
    copy_companions(like, out)
    return out
