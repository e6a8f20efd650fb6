"""Explain a mixture: what each of its tensors came from, read from its files, or planned before writing it.

A directory is explained from assembly.json, config.json, proof.json and the headers of its shards: no weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from upcycle.directories import INDEX, resolve
from upcycle.durable import read_object
from upcycle.explanation import Explanation, TensorRow, combined_in_words
from upcycle.kinds import COMBINE
from upcycle.merge_config import MergeConfig, from_record
from upcycle.mixture_config import AssembleConfig

DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ROUTER_FIELDS = (
    "num_experts_per_tok", "router", "gate_scale", "router_options", "attention", "attention_router", "kv", "tie",
    "balance", "balance_coefficient", "balance_scope", "z_coefficient", "similarity_coefficient", "entropy_coefficient",
    "attention_losses", "initializer_range", "routed_layers", "split", "shared_expert", "shared_gate", "one_per_source",
    "combine",
)  # fmt: skip


def explain(directory: str | Path) -> Explanation:
    """What the mixture in `directory` is and came from, as far as its files tell; `notes` say which are missing.

    Raises ValueError: no config.json, or not of a mixture; a file that cannot be read.
    """
    directory = resolve(directory)
    config = read_json(directory / "config.json")
    if config is None:
        raise ValueError(f"{directory}: no config.json there; expected the directory of a mixture")
    if config.get("model_type") != "upcycled":
        raise ValueError(
            f"{directory}: model_type={config.get('model_type')!r}, expected 'upcycled', a mixture as upcycle.assemble "
            "writes it; of other models nobody has written down what their tensors came from"
        )
    record, notes = read_json(directory / "stage.json"), []
    assembled = assembled_of(directory, record)
    assembly = read_json(assembled / "assembly.json") if assembled else None
    if assembly is None:
        notes.append("assembly.json is missing: what the tensors came from is not known")
    elif record and record.get("function") == "train_model":
        notes.append(f"trained after its assembly (stage {record['stage']}); origins are those of {assembled}")
    if assembly and assembly.get("drawn"):
        notes.append(
            "from scratch: every weight was drawn at random, and names of models say where experts stand, no more"
        )
    notes += [_edit(one) for one in (assembly or {}).get("edits", [])]
    if folded := (assembly or {}).get("folded"):
        said = f"folded; before that, {combined_in_words(COMBINE | {k: v for k, v in folded.items() if k in COMBINE} | {'of': 'weights'})}"
        notes.append(said + _trained_before(folded))
    proof = read_json(directory / "proof.json")
    if proof is None:
        notes.append("proof.json is missing: these weights were not compared with the experts they came from")
    headers = _headers(directory, notes)
    made_from = read_json(assembled / "stage.json") if assembled else None
    if assembly and (said := assembly["placed"]["note"]):
        notes.append(f"matched to BAM{' before it was edited' if assembly.get('edits') else ''}: {said}")
    attention = (config["attention_experts"] or config["experts"]) if config["attention"] == "mixture" else []
    return Explanation(
        directory=str(directory),
        family=config["seed"]["model_type"],
        layers=config["seed"].get("num_hidden_layers") or config["seed"]["n_layer"],
        experts=config["experts"],
        attention_experts=attention,
        sources=stages_of(_models(config, assembly), made_from),
        routers={name: ({"combine": COMBINE} | config)[name] for name in ROUTER_FIELDS},
        tensors=_rows(headers, assembly, list(dict.fromkeys([*config["experts"], *attention]))),
        proof=proof,
        notes=notes,
    )


def read_json(path: Path, *keys: str) -> Any:
    """The file's object; None where there is no file. Raises ValueError: a file that is no JSON, or lacks one of `keys`."""
    return read_object(path, *keys, fix="copy it again") if path.is_file() else None


def assembled_of(directory: Path, record: dict | None) -> Path | None:
    """Where this mixture was assembled: the artifact that it was trained from, or where it is itself."""
    inputs = record.get("inputs", {}) if record else {}
    siblings = [directory.parent / f"{stage.replace('/', '-')}-{key[:8]}" for stage, key in inputs.items()]
    return next((path for path in [*siblings, directory] if (path / "assembly.json").is_file()), None)


def _models(config: dict, assembly: dict | None) -> list[str]:
    """The models that have experts."""
    return assembly["placed"]["models"] if assembly else list(dict.fromkeys(config["expert_sources"]))


def stages_of(models: list[str], record: dict | None) -> dict[str, str]:
    """The artifact of each model, for a mixture out of an artifact store."""
    keys = record["inputs"] if record and record.get("function") == "assemble_moe" else {}
    stages = {name: "seed" if name == "seed" else f"branch/{name}" for name in models}
    return {name: f"{stage.replace('/', '-')}-{keys[stage][:8]}" for name, stage in stages.items() if stage in keys}


def _headers(directory: Path, notes: list[str]) -> dict[str, tuple[list[int], str] | None]:
    """Shape and dtype of every tensor, from the shards' headers; None for what a missing shard should hold."""
    index = read_json(directory / INDEX)
    found: dict[str, tuple[list[int], str] | None] = dict.fromkeys(index["weight_map"]) if index else {}
    named = set(index["weight_map"].values()) if index else set()
    shards = sorted({*named, *(path.name for path in directory.glob("*.safetensors"))})
    for shard in shards:
        if not (directory / shard).is_file():
            notes.append(f"{shard} is missing, which the index names: its tensors are not counted")
            continue
        try:
            with safe_open(directory / shard, framework="np") as opened:
                for name in opened.keys():
                    header = opened.get_slice(name)
                    dtype = str(header.get_dtype())
                    found[name] = (list(header.get_shape()), DTYPES.get(dtype, dtype))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{directory / shard}: not a whole safetensors file ({error}); copy it again") from None
    if not shards:
        notes.append("there are no weights (*.safetensors)")
    return found


def _edit(edit: dict[str, str]) -> str:
    """An entry of assembly.json's edits (edits.py), in words."""
    if added := edit.get("added"):
        what = f"expert {added} was added (first rows in the routers: {edit['router_row']})"
    else:
        what = f"expert {edit['removed']} was taken out"
    return f"edited: {what}{_trained_before(edit)}"


def _trained_before(change: dict[str, Any]) -> str:
    trained = change.get("trained_before")
    return f"; trained before that (stage {trained}), which no origin here shows" if trained else ""


def _rows(headers: dict[str, Any], assembly: dict | None, experts: list[str]) -> list[TensorRow]:
    """In assembly.json's order, which is that of the layers; what it does not know comes last."""
    known = {row["target"]: row for row in assembly["tensors"]} if assembly else {}
    unknown, rows = {"origin": "unknown", "sources": []}, []
    for target in [*known, *(name for name in headers if name not in known)]:
        made = known.get(target, unknown)
        shape, dtype = headers.get(target) or (None, None)
        method = made.get("method") or (from_record(assembly["merge"]).method if assembly else "")
        origin = _origin(made["origin"], method) if assembly else made["origin"]
        used, files = [], made.get("files", {})
        if assembly and origin not in ("fresh", "unknown"):
            models = assembly["placed"]["models"]
            whose = ["seed"] if made["origin"] == "seed" else made.get("sha256") or files or models
            used = _in_order(whose, models if made["origin"] in ("merged", "seed") else experts)
            files = {name: files[name] for name in _in_order(files, models)}
        rows.append(TensorRow(target, origin, used, made["sources"], files, shape, dtype))
    return rows


def _in_order(names: Iterable[str], order: list[str]) -> list[str]:
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _origin(origin: str, method: str) -> str:
    if origin == "seed" or (origin, method) == ("merged", "seed"):
        return "the seed's"
    if origin != "merged":
        return origin
    return "averaged" if method == "average" else f"merged by {method}"


def explain_plan(
    seed: Path, branches: dict[str, Path], choice: AssembleConfig, out: str = "nowhere yet"
) -> Explanation:
    """What `assembly.write_mixture` would write, after the checks that come before any work; nothing is written.

    `notes` say what differs between the checkpoints and is allowed, and which branch looks like a stranger to the seed.
    Memory: one tensor of every checkpoint. Raises ValueError: see `preflight.check_alike` and `pieces.plan_pieces`.
    """
    import torch
    from transformers import AutoConfig

    from upcycle.assembly import placed_experts, upcycled_config
    from upcycle.checkpoint import Checkpoint
    from upcycle.families import is_listed
    from upcycle.merge import check_merge
    from upcycle.modeling import UpcycledForCausalLM
    from upcycle.pieces import plan_pieces
    from upcycle.preflight import check_alike
    from upcycle.relatedness import check_related
    from upcycle.roles import tensor_facts

    first, others = Checkpoint(seed), {name: Checkpoint(path) for name, path in branches.items()}
    notes = check_alike(first, others)
    dense = AutoConfig.from_pretrained(seed)
    found = placed_experts(dense, list(branches), choice)
    config = upcycled_config(dense, found, choice)
    pieces = plan_pieces(config, first.names, found)
    with torch.device("meta"):
        shapes = {name: list(t.shape) for name, t in UpcycledForCausalLM._from_config(config).state_dict().items()}
    kin = check_related(first, others)
    notes += kin.warnings
    if not is_listed(config.seed):
        notes.append(
            f"{config.seed.model_type} is not in the table of families; it has the parts of {config.seed.parts_of}, a small mixture of it passed the "
            "check, and its mixture must prove itself"
        )
    if found.note:
        notes.append(f"matched to BAM: {found.note}")
    dtype, checkpoints = choice.dtype or str(first.dtype()).removeprefix("torch."), {"seed": first} | others
    facts = tensor_facts(dense)
    check_merge(choice.merge, found.models)
    rows = [
        _planned(piece, _method(piece, choice.merge, facts), config, found, checkpoints, shapes, dtype)
        for piece in pieces
    ]
    return Explanation(
        directory=out,
        family=config.seed.model_type,
        layers=config.seed.num_hidden_layers,
        experts=config.experts,
        attention_experts=[expert.name for expert in found.attention],
        sources={name: str(checkpoints[name].directory) for name in found.models},
        routers={name: getattr(config, name) for name in ROUTER_FIELDS},
        tensors=rows,
        proof=None,
        notes=notes,
        kinship=kin.figures(),
    )


def _method(piece: Any, merge: MergeConfig, facts: Mapping[str, Any]) -> str:
    """By what a planned tensor is merged, if it is."""
    from upcycle.merge import by_linears_only

    if piece.origin != "merged":
        return ""
    found = facts[piece.sources[0]]
    way = merge.of(found.role)
    return "average" if by_linears_only(way, found.in_axis) else way.method


def _planned(
    piece: Any, method: str, config: Any, found: Any, checkpoints: dict[str, Any], shapes: dict, dtype: str
) -> TensorRow:
    origin = _origin(piece.origin, method)
    models = ["seed"] if origin == "the seed's" else piece.models(found)
    used = models if origin == "the seed's" else _whose(piece, found, config)
    files = {name: [checkpoints[name].files[source] for source in piece.sources] for name in models}
    kept = "float32" if piece.origin == "fresh" else dtype
    return TensorRow(piece.target, origin, used, list(piece.sources), files, shapes[piece.target], kept)


def _whose(piece: Any, found: Any, config: Any) -> list[str]:
    """The experts that a planned tensor holds; of a merged one, the models."""
    if piece.origin == "stacked":
        return [expert.name for expert in found.of(piece.sublayer)]
    return piece.models(found) if piece.expert is None else [config.names_of("attention")[piece.expert]]


def check_family(seed: Path, branches: list[str], choice: AssembleConfig) -> None:
    """The seed's tensors all have a place in the mixture; known before its branches are.

    Raises ValueError: see `assembly.upcycled_config` and `pieces.plan_pieces`.
    """
    from upcycle.assembly import placed_experts, upcycled_config
    from upcycle.checkpoint import Checkpoint
    from upcycle.pieces import plan_pieces
    from upcycle.preflight import model_config

    checkpoint = Checkpoint(seed)
    config = model_config(checkpoint)
    found = placed_experts(config, branches, choice)
    plan_pieces(upcycled_config(config, found, choice), checkpoint.names, found)
