"""Explain a mixture: what each of its tensors came from, read from its files, or planned before writing it.

A directory is explained from assembly.json, config.json, proof.json and the headers of its shards: no weight is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from upcycle.config import AssembleConfig
from upcycle.directories import INDEX, resolve
from upcycle.explanation import Explanation, TensorRow

DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
ROUTER_FIELDS = (
    "num_experts_per_tok", "router", "gate_scale", "attention", "kv", "balance", "balance_coefficient", "balance_scope",
    "z_coefficient", "initializer_range",
)  # fmt: skip


def explain(directory: str | Path) -> Explanation:
    """What the mixture in `directory` is and came from, as far as its files tell; `notes` say which are missing.

    Raises ValueError: no config.json, or not of a mixture; a file that cannot be read.
    """
    directory = resolve(directory)
    config = _json(directory / "config.json")
    if config is None:
        raise ValueError(f"{directory}: no config.json there; expected the directory of a mixture")
    if config.get("model_type") != "upcycled":
        raise ValueError(
            f"{directory}: model_type={config.get('model_type')!r}, expected 'upcycled', a mixture as upcycle.assemble "
            "writes it; of other models nobody has written down what their tensors came from"
        )
    record, notes = _json(directory / "stage.json"), []
    assembled = _assembled(directory, record)
    assembly = _json(assembled / "assembly.json") if assembled else None
    if assembly is None:
        notes.append("assembly.json is missing: what the tensors came from is not known")
    elif record and record.get("function") == "train_model":
        notes.append(f"trained after its assembly (stage {record['stage']}); origins are those of {assembled}")
    proof = _json(directory / "proof.json")
    if proof is None:
        notes.append("proof.json is missing: these weights were not compared with the experts they came from")
    headers = _headers(directory, notes)
    made_from = _json(assembled / "stage.json") if assembled else None
    return Explanation(
        directory=str(directory),
        family=config["seed"]["model_type"],
        layers=config["seed"].get("num_hidden_layers") or config["seed"]["n_layer"],
        experts=config["experts"],
        sources=_stages_of(config["experts"], made_from),
        routers={name: config[name] for name in ROUTER_FIELDS},
        tensors=_rows(headers, assembly, config["experts"]),
        proof=proof,
        notes=notes,
    )


def _json(path: Path) -> Any:
    """The file's value; None where there is no file. Raises ValueError: a file that is no JSON."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not whole JSON ({error}); copy it again") from None


def _assembled(directory: Path, record: dict | None) -> Path | None:
    """Where this mixture was assembled: the artifact that it was trained from, or where it is itself."""
    inputs = record.get("inputs", {}) if record else {}
    siblings = [directory.parent / f"{stage.replace('/', '-')}-{key[:8]}" for stage, key in inputs.items()]
    return next((path for path in [*siblings, directory] if (path / "assembly.json").is_file()), None)


def _stages_of(experts: list[str], record: dict | None) -> dict[str, str]:
    """The artifact of each expert, for a mixture out of an artifact store."""
    keys = record["inputs"] if record and record.get("function") == "assemble_moe" else {}
    stages = {name: "seed" if name == "seed" else f"branch/{name}" for name in experts}
    return {name: f"{stage.replace('/', '-')}-{keys[stage][:8]}" for name, stage in stages.items() if stage in keys}


def _headers(directory: Path, notes: list[str]) -> dict[str, tuple[list[int], str] | None]:
    """Shape and dtype of every tensor, from the shards' headers; None for what a missing shard should hold."""
    index = _json(directory / INDEX)
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


def _rows(headers: dict[str, Any], assembly: dict | None, experts: list[str]) -> list[TensorRow]:
    """In assembly.json's order, which is that of the layers; what it does not know comes last."""
    known = {row["target"]: row for row in assembly["tensors"]} if assembly else {}
    unknown, rows = {"origin": "unknown", "sources": []}, []
    for target in [*known, *(name for name in headers if name not in known)]:
        made = known.get(target, unknown)
        shape, dtype = headers.get(target) or (None, None)
        origin = _origin(made["origin"], assembly["merge"]) if assembly else made["origin"]
        whose = [] if origin in ("fresh", "unknown") else made.get("sha256", experts)
        used = [name for name in experts if name in whose]
        files = {name: made["files"][name] for name in used if "files" in made}
        rows.append(TensorRow(target, origin, used, made["sources"], files, shape, dtype))
    return rows


def _origin(origin: str, method: str) -> str:
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

    from upcycle.assembly import upcycled_config
    from upcycle.checkpoint import Checkpoint
    from upcycle.families import is_listed
    from upcycle.modeling import UpcycledForCausalLM
    from upcycle.pieces import plan_pieces
    from upcycle.preflight import check_alike
    from upcycle.relatedness import check_related

    first, others = Checkpoint(seed), {name: Checkpoint(path) for name, path in branches.items()}
    notes = check_alike(first, others)
    experts = ({"seed": first} if choice.include_seed else {}) | others
    config = upcycled_config(AutoConfig.from_pretrained(seed), list(experts), choice)
    pieces = plan_pieces(config, first.names)
    with torch.device("meta"):
        shapes = {name: list(t.shape) for name, t in UpcycledForCausalLM._from_config(config).state_dict().items()}
    kin = check_related(first, others)
    notes += kin.warnings
    if not is_listed(config.seed):
        notes.append(
            f"{config.seed.model_type} is not in the table of families; it has the parts of {config.seed.parts_of}, a small mixture of it passed the "
            "check, and its mixture must prove itself"
        )
    dtype, rows = choice.dtype or str(first.dtype()).removeprefix("torch."), []
    for piece in pieces:
        used = list(experts) if piece.expert is None else [config.experts[piece.expert]]
        used = [] if piece.origin == "fresh" else used
        rows.append(
            TensorRow(
                piece.target,
                _origin(piece.origin, choice.merge),
                used,
                list(piece.sources),
                {name: [experts[name].files[source] for source in piece.sources] for name in used},
                shapes[piece.target],
                "float32" if piece.origin == "fresh" else dtype,
            )
        )
    return Explanation(
        directory=out,
        family=config.seed.model_type,
        layers=config.seed.num_hidden_layers,
        experts=list(experts),
        sources={name: str(checkpoint.directory) for name, checkpoint in experts.items()},
        routers={name: getattr(config, name) for name in ROUTER_FIELDS},
        tensors=rows,
        proof=None,
        notes=notes,
        kinship=kin.figures(),
    )


def check_family(seed: Path, branches: list[str], choice: AssembleConfig) -> None:
    """The seed's tensors all have a place in the mixture; known before its branches are.

    Raises ValueError: see `assembly.upcycled_config` and `pieces.plan_pieces`.
    """
    from upcycle.assembly import upcycled_config
    from upcycle.checkpoint import Checkpoint
    from upcycle.pieces import plan_pieces
    from upcycle.preflight import model_config

    checkpoint = Checkpoint(seed)
    experts = ["seed"] * choice.include_seed + branches
    plan_pieces(upcycled_config(model_config(checkpoint), experts, choice), checkpoint.names)
