"""Where a report comes from: versions, commits, rng seeds and settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from upcycle.durable import read_object
from upcycle.store import RECORD, provenance

WITHOUT_EFFECT = (
    "artifacts",
    "launch",
    "out",
    "plan",
    "stage",
    "track",
)  # on any result: where and how it was computed
# Beside those that decide results and stand in every artifact's record.
LIBRARIES = ("tokenizers", "safetensors", "scipy", "matplotlib", "hydra-core", "lm-eval", "deepspeed")


def origins(stages: Mapping[str, Path], composed: Mapping[str, Any]) -> dict[str, Any]:
    """Versions and commit of what makes the report, `made_by` of its stages, `rng_seeds` and `config`, the settings.

    Settings WITHOUT_EFFECT are left out, so that the same results give the same report wherever they were computed.
    """
    composed = {key: value for key, value in composed.items() if key not in WITHOUT_EFFECT}
    return provenance(LIBRARIES) | {
        "made_by": made_by(stages),
        "rng_seeds": {path: value for path, value in flattened(composed) if path.split(".")[-1] == "rng_seed"},
        "config": composed,
    }


def made_by(stages: Mapping[str, Path]) -> dict[str, list[str]]:
    """{commit: the stages that it made}, from their stage.json; "unknown" for those without one."""
    found: dict[str, list[str]] = {}
    for name, directory in stages.items():
        path = directory / RECORD
        record = read_object(path) if path.is_file() else {}
        found.setdefault(record.get("made_by", {}).get("commit", "unknown"), []).append(name)
    return found


def flattened(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every setting, as `mix.router.top_k`; lists and empty mappings are values."""
    for key, value in settings.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{path}.")
        else:
            yield path, value
