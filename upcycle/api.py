"""What the package offers in one call, without a config file or an artifact store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError

from upcycle.assembly import write_mixture
from upcycle.config import AssembleConfig
from upcycle.durable import atomic_directory
from upcycle.proof import prove

PRESETS = Path(__file__).resolve().parent.parent / "conf" / "assemble"


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset(method: str, **overrides: Any) -> AssembleConfig:
    """The settings of conf/assemble/<method>.yaml, with `overrides` on top (nested dicts are merged).

    Raises ValueError: no such method, or overrides that are no settings.
    """
    if method not in preset_names():
        raise ValueError(f"method={method!r} is not known; expected one of {', '.join(preset_names())}")
    chosen = OmegaConf.merge(OmegaConf.load(PRESETS / f"{method}.yaml"), OmegaConf.create(overrides))
    # Below a root of its own, as in a run, whose rng_seed the presets take over.
    plain = OmegaConf.to_container(OmegaConf.create({"assemble": chosen}), resolve=True)["assemble"]  # pyright: ignore
    try:
        return TypeAdapter(AssembleConfig).validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def assemble(
    *, seed: str | Path, branches: Mapping[str, str | Path], out: str | Path, method: str = "btx", **overrides: Any
) -> Path:
    """Write the mixture of `seed` and `branches` into `out`, prove it, and return its path.

        upcycle.assemble(seed="A", branches={"code": "B", "math": "C"}, out="moe", method="bam")

    seed, branches: Hugging Face directories with safetensors. method: a preset of conf/assemble; `overrides` are fields
    of AssembleConfig, for example `router={"top_k": 3}`. The directory appears only when everything in it is written
    and proved.
    Raises ValueError: see `write_mixture` and `prove`; `out` exists already.
    """
    out, choice = Path(out), preset(method, **overrides)
    if out.exists():
        raise ValueError(f"out={out} exists already; name a directory that does not")
    paths = {name: Path(path) for name, path in branches.items()}
    with atomic_directory(out) as partial:
        write_mixture(Path(seed), paths, partial, choice)
        if choice.prove:
            prove(partial, ({"seed": Path(seed)} if choice.include_seed else {}) | paths)
    return out
