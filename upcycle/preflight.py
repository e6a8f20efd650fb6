"""Before any work: is every checkpoint whole, and is every branch the seed's model with other weights?"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from upcycle.checkpoint import Checkpoint
from upcycle.vocabulary import differences, other_settings, vocabularies

# Fields of a config that may differ between a seed and its branches without making them other models.
FREE_FIELDS = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "id2label", "initializer_range", "label2id", "output_attentions", "output_hidden_states", "pad_token_id",
    "pretraining_tp", "problem_type", "return_dict", "transformers_version", "use_cache",
}  # fmt: skip
DROPOUTS = ("dropout", "pdrop", "dropout_prob", "dropout_rate")  # they end so; they change training only
# What a reader wants to know first; the other fields follow by name.
FIRST_FIELDS = (
    "model_type", "vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rope_parameters", "sliding_window", "layer_types", "attention_bias", "mlp_bias",
    "tie_word_embeddings",
)  # fmt: skip
SHOWN = 5  # differences of one branch that are written out
SHOWN_CHARACTERS = 200  # of one value


def check_alike(seed: Checkpoint, branches: dict[str, Checkpoint]) -> list[str]:
    """Branches must be the seed's model with other weights: config, tokenizer, tensor names and shapes.

    Returns notes, one line each, on what differs and is allowed: stored dtypes, dropouts, fields that no class reads,
    settings of the tokenizer. Memory: headers only.
    Raises ValueError: a checkpoint that is not whole, or of a class that transformers does not have; a branch that
    differs, naming both directories and, of the first five differences, both values.
    """
    if "seed" in branches:
        raise ValueError("a branch is called 'seed'; that name belongs to the seed's own expert, rename the branch")
    configs = {name: model_config(one) for name, one in ({"seed": seed} | branches).items()}
    for name, checkpoint in ({"seed": seed} | branches).items():
        checkpoint.check()
        _check_tied_head(checkpoint, configs[name])
    check_own_config(seed, configs["seed"])
    notes: list[str] = []
    for name, branch in branches.items():
        where = f"branch {name!r} ({branch.directory}) against the seed ({seed.directory})"
        found, allowed = compare_configs(configs[name], configs["seed"])
        words, settings = compare_tokenizers(branch, seed)
        found += words
        if configs[name].model_type == configs["seed"].model_type:  # else every tensor would be another
            found += compare_tensors(branch, seed)
        if found:
            raise ValueError(_unfit(where, found))
        notes += [f"{where}: {note}" for note in allowed + settings + _other_dtype(branch, seed)]
    return notes


def check_joins(name: str, branch: Checkpoint, mixture: Checkpoint, seed: Any) -> list[str]:
    """A branch that is to join a mixture must be its seed's model with other weights; the seed itself need not be there.

    seed: its config (pieces.dense_config). Returns notes on what differs and is allowed.
    Raises ValueError: see `check_alike`.
    """
    branch.check()
    theirs = model_config(branch)
    _check_tied_head(branch, theirs)
    where = f"branch {name!r} ({branch.directory}) against the seed of {mixture.directory}"
    found, allowed = compare_configs(theirs, seed)
    words, settings = compare_tokenizers(branch, mixture)
    if found := found + words:
        raise ValueError(_unfit(where, found))
    check_own_config(branch, theirs)  # of the same config, so the same names and shapes
    if extra := sorted(set(branch.names) - set(_wanted(theirs)[0])):
        raise ValueError(_unfit(where, [f"{tensor} is one too many, the seed has none" for tensor in extra]))
    return [f"{where}: {note}" for note in allowed + settings]


def _unfit(where: str, found: list[str]) -> str:
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return (
        f"{where}: {len(found)} difference{'s' * (len(found) > 1)}: {'; '.join(found[:SHOWN])}{more}. Branches must "
        "be the seed's model with other weights: bring one that was trained from this seed"
    )


def model_config(checkpoint: Checkpoint) -> Any:
    """The config of a checkpoint as its transformers class reads it: old spellings and defaults are settled.

    Raises ValueError: no class of transformers for it, or none with a language-model head; a config that its class
    refuses. Code that a checkpoint brings along is never run.
    """
    kind, where = checkpoint.config["model_type"], checkpoint.directory
    if kind not in CONFIG_MAPPING:
        if "auto_map" in checkpoint.config:
            raise ValueError(
                f"{where}: model_type={kind!r} is not in transformers {transformers.__version__}, expected one that is: the "
                "checkpoint brings its own code (auto_map in config.json), which runs only with trust_remote_code, and "
                "trust_remote_code is off; give a checkpoint whose class is part of transformers"
            )
        raise ValueError(
            f"{where}: model_type={kind!r} is not in transformers {transformers.__version__}, expected one that is; update "
            "transformers, or mend model_type in config.json"
        )
    try:
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)  # None would ask on the terminal
    except Exception as error:  # each config class has errors of its own
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{where / 'config.json'}: refused by transformers' {kind} class ({reason}); mend it"
        ) from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{where}: model_type={kind!r} has no causal language model in transformers, expected a decoder; give another "
            "checkpoint"
        )
    return config


def _check_tied_head(checkpoint: Checkpoint, config: Any) -> None:
    if config.tie_word_embeddings and "lm_head.weight" in checkpoint.files:
        raise ValueError(
            f"{checkpoint.directory}: lm_head.weight is stored, but tie_word_embeddings=True says that the head is the "
            "embedding; load the model and save_pretrained it again, with tie_word_embeddings=False if the two differ"
        )


def check_own_config(checkpoint: Checkpoint, config: Any) -> None:
    """The tensors of a checkpoint are those that its own config asks for, in name and shape. Nothing is allocated.

    Raises ValueError, naming the first five tensors that are not. Tensors that nothing uses are assembly's to refuse.
    """
    wanted, tied = _wanted(config)
    odd = [f"{name} is absent" for name in sorted(wanted.keys() - checkpoint.files.keys() - tied)]
    odd += [
        f"{name} has shape {checkpoint.shape(name)}, expected {wanted[name]}"
        for name in checkpoint.names
        if name in wanted and checkpoint.shape(name) != wanted[name]
    ]
    if odd:
        raise ValueError(
            f"{checkpoint.directory}: the tensors are not those of its config.json: {'; '.join(odd[:SHOWN])} ({len(odd)} in "
            "all); copy config and weights from one model"
        )


def _wanted(config: Any) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Shapes by name of the tensors that a config asks for, and which of them are others under a second name."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, set(model.all_tied_weights_keys)


def compare_configs(theirs: Any, ours: Any) -> tuple[list[str], list[str]]:
    """Differences between a branch's config and the seed's, and differences that are allowed, in words."""
    if theirs.model_type != ours.model_type:  # fields of another class say nothing
        return [_unlike("model_type", theirs.model_type, ours.model_type)], []
    known = set(type(ours)().to_dict())  # other fields are attributes that no class reads
    theirs, ours = theirs.to_dict(), ours.to_dict()
    odd = {name for name in (theirs.keys() | ours.keys()) - FREE_FIELDS if theirs.get(name) != ours.get(name)}
    free = {name for name in odd if name not in known or name.endswith(DROPOUTS)}
    order = sorted(
        odd, key=lambda name: (FIRST_FIELDS.index(name) if name in FIRST_FIELDS else len(FIRST_FIELDS), name)
    )
    found = [_unlike(name, theirs.get(name), ours.get(name)) for name in order if name not in free]
    allowed = [
        f"{name} is {_short(theirs.get(name))}, the seed's is {_short(ours.get(name))}; the mixture gets the seed's"
        for name in order
        if name in free
    ]
    return found, allowed


def _unlike(name: str, theirs: Any, ours: Any) -> str:
    if isinstance(theirs, list) and isinstance(ours, list):
        if len(theirs) != len(ours):
            return f"{name} has {len(theirs)} entries, expected the seed's {len(ours)}"
        places = [place for place, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1]]
        first, count = places[0], len(places)
        return (
            f"{name}[{first}] is {_short(theirs[first])}, expected the seed's {_short(ours[first])} ({count} of "
            f"{len(ours)} entries differ)"
        )
    return f"{name} is {_short(theirs)}, expected the seed's {_short(ours)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def compare_tokenizers(branch: Checkpoint, seed: Checkpoint) -> tuple[list[str], list[str]]:
    """Differences between two tokenizers that make experts read other tokens, and notes on the rest."""
    theirs, ours = vocabularies(branch.directory), vocabularies(seed.directory)
    shared = [kind for kind in ("words", "pieces") if kind in theirs and kind in ours]
    if not shared:
        missing = branch if not theirs else seed
        if theirs and ours:
            return [], ["the two tokenizers are in files of different kinds and were not compared"]
        note = f"no tokenizer in {missing.directory}, so that the tokenizers were not compared"
        return [], [note] if theirs or ours else []
    kind = shared[0]
    settings = other_settings(theirs[kind], ours[kind])
    notes = (
        [f"{', '.join(settings)} of tokenizer.json differ; the mixture gets the seed's tokenizer"] if settings else []
    )
    return differences(theirs[kind], ours[kind]), notes


def compare_tensors(branch: Checkpoint, seed: Checkpoint) -> list[str]:
    """Tensors that only one of two checkpoints has, and tensors of another shape, in words."""
    found = [f"{name} is missing, the seed has it" for name in seed.names if name not in branch.files]
    found += [f"{name} is one too many, the seed has none" for name in branch.names if name not in seed.files]
    return found + [
        f"{name} has shape {branch.shape(name)}, expected the seed's {seed.shape(name)}"
        for name in seed.names
        if name in branch.files and branch.shape(name) != seed.shape(name)
    ]


def _other_dtype(branch: Checkpoint, seed: Checkpoint) -> list[str]:
    theirs, ours = (str(one.dtype()).removeprefix("torch.") for one in (branch, seed))
    if theirs == ours:
        return []
    return [
        f"its weights are stored in {theirs}, the seed's in {ours}; without a dtype of its own the mixture gets {ours}"
    ]
