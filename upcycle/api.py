"""What the package offers in one call, without a config file or an artifact store."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError

from upcycle.assembly import write_mixture
from upcycle.config import nearest
from upcycle.directories import check_new, check_room, resolve
from upcycle.durable import atomic_directory
from upcycle.explain import explain_plan
from upcycle.explanation import Explanation
from upcycle.families import is_listed
from upcycle.init_texts import domains_needed, sources_of
from upcycle.merge import readers
from upcycle.mistakes import in_words
from upcycle.mixture_config import AssembleConfig
from upcycle.proof import prove

PRESETS = Path(__file__).resolve().parent.parent / "conf" / "assemble"


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset(method: str, **overrides: Any) -> AssembleConfig:
    """The settings of conf/assemble/<method>.yaml, with `overrides` on top (nested dicts are merged).

    Raises ValueError: no such method, or overrides that are no settings.
    """
    names = preset_names()
    if method not in names:
        raise ValueError(f"method={method!r} is not known; expected one of {', '.join(names)}{nearest(method, names)}")
    chosen = OmegaConf.merge(_composed(method), OmegaConf.create(overrides))
    # Below a root of its own, as in a run, whose rng_seed the presets take over.
    plain = OmegaConf.to_container(OmegaConf.create({"assemble": chosen}), resolve=True)["assemble"]  # pyright: ignore
    return validated(AssembleConfig, plain)  # pyright: ignore


def _composed(method: str) -> Any:
    """A preset on top of those that its defaults name, as Hydra composes them."""
    own: Any = OmegaConf.load(PRESETS / f"{method}.yaml")
    below = [name for name in own.pop("defaults", []) if name != "_self_"]
    return OmegaConf.merge(*[_composed(name) for name in below], own)


@overload
def assemble(
    *, seed: str | Path, branches: Mapping[str, str | Path], out: str | Path, method: str = ...,
    data: Mapping[str, str | Path] | None = ..., **overrides: Any
) -> Path: ...  # fmt: skip
@overload
def assemble(
    *, seed: str | Path, branches: Mapping[str, str | Path], dry_run: Literal[True], out: str | Path | None = ...,
    method: str = ..., data: Mapping[str, str | Path] | None = ..., **overrides: Any
) -> Explanation: ...  # fmt: skip
def assemble(
    *,
    seed: str | Path,
    branches: Mapping[str, str | Path],
    out: str | Path | None = None,
    method: str = "btx",
    data: Mapping[str, str | Path] | None = None,
    dry_run: bool = False,
    **overrides: Any,
) -> Path | Explanation:
    """Write the mixture of `seed` and `branches` into `out`, prove it, and return its path.

        upcycle.assemble(seed="A", branches={"code": "B", "math": "C"}, out="moe", method="bam")

    seed, branches: Hugging Face directories with safetensors, or names on the Hub. method: a preset of conf/assemble;
    `overrides` are fields of AssembleConfig, for example `router={"top_k": 3}`. data: folders of token arrays
    (`data.tokenize_domain`) by domain, for routers that start from training text (init.kind=domain_centroid). The directory appears only when
    everything in it is written and proved. dry_run: check the checkpoints, write nothing, and return what every tensor
    would be made of (print it).
    Warns of what differs between the checkpoints and is allowed, and of branches that look like strangers to the seed.
    Raises ValueError: see `write_mixture` and `prove`; `out` is not new or empty, or not given; data that nothing reads, or
    none where a router needs some.
    """
    choice = preset(method, **overrides)
    texts = {name: Path(folder) for name, folder in (data or {}).items()}
    if not domains_needed(choice, sources_of(choice, branches), list(texts)) and texts:
        raise ValueError(
            f"data={{{', '.join(texts)}}} has no effect: no router starts from training text; leave it out, or set "
            'router={"init": {"kind": "domain_centroid"}}'
        )
    if read := readers(choice.merge, ["seed", *branches]):
        raise ValueError(
            f"merge={choice.merge.words} reads the curvature ({', '.join(read)}) of the models, which this call does not measure; set "
            "mixtures.NAME.assemble.merge in a run, or take a method that reads none"
        )
    if out is None and not dry_run:
        raise ValueError("out is missing; name the directory that the mixture is to be written to")
    if out is not None:
        check_new(Path(out))
    start, paths = resolve(seed), {name: resolve(path) for name, path in branches.items()}
    planned = explain_plan(start, paths, choice, f"would be written to {out}" if out else "not written")
    if out is None or dry_run:
        return planned
    check_room(Path(out), planned.bytes or 0)
    for note in planned.notes:
        warnings.warn(note, stacklevel=2)
    with atomic_directory(Path(out)) as new:
        config = write_mixture(start, paths, new, choice, data=texts)
        if choice.prove or not is_listed(config.seed):
            prove(new, {"seed": start} | paths)
    return Path(out)


def validated(kind: Any, plain: dict[str, Any]) -> Any:
    """Raises ValueError: settings that are none, one line each."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        raise ValueError("\n".join(in_words(kind, error))) from None
