"""Which texts the routers of a mixture are initialised with, known from its settings. No torch, so that plans stay quick.

A source is the model that an expert comes from: "seed", or a branch by its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from upcycle.config import nearest
from upcycle.mixture_config import AssembleConfig
from upcycle.router_config import InitConfig

GENERAL = "general"  # the domain that is the seed's, if there is one of this name


def sources_of(choice: AssembleConfig, branches: Iterable[str]) -> list[str]:
    """The sources of a mixture's experts, each once, in the order of their first expert."""
    named = choice.placement.experts
    if named == "branches":
        return ["seed"] * choice.include_seed + list(branches)
    return ["seed"] if named == "seed" else list(dict.fromkeys(named))


def check_texts(choice: AssembleConfig, sources: Sequence[str], domains: Iterable[str]) -> None:
    """Every router that starts from texts has texts of every source of experts. domains: those with training text.

    Raises ValueError: it has not, naming the source; there is one source only.
    """
    for setting, init in choice.inits.items():
        if not init.needs_text:
            continue
        distinct = list(dict.fromkeys(sources))
        if len(distinct) < 2:
            raise ValueError(
                f"{setting}.init.kind={init.kind} tells experts apart by their texts, and all of these come from "
                f"{distinct[0]}; write {setting}.init.kind=normal"
            )
        if init.needs_prompts:
            _check_prompts(setting, init, distinct)
        else:
            _check_domains(setting, distinct, list(domains))


def _check_prompts(setting: str, init: InitConfig, sources: Sequence[str]) -> None:
    given = [source for source, texts in init.prompts.items() if texts]
    missing = [source for source in sources if source not in given]
    if missing:
        raise ValueError(
            f"{setting}.init.prompts has no texts of {', '.join(missing)}, expected some of every model that experts come "
            f"from ({', '.join(sources)}), got those of {', '.join(given) or 'none'}; add "
            f"{setting}.init.prompts.{missing[0]}=[TEXT, ...]{nearest(missing[0], given)}"
        )
    for source in sources:
        if empty := [number for number, text in enumerate(init.prompts[source], 1) if not text.strip()]:
            raise ValueError(f"{setting}.init.prompts.{source}: text {empty[0]} is empty; write something or remove it")


def _check_domains(setting: str, sources: Sequence[str], domains: list[str]) -> None:
    missing = [source for source in sources if source not in domains and source != "seed"]
    if missing:
        found = f"those of {', '.join(domains)}" if domains else "none"
        raise ValueError(
            f"{setting}.init.kind=domain_centroid needs the training text of every branch's domain, got {found}: none is "
            f"called {', '.join(missing)}; give the domain the branch's name, or write {setting}.init.kind=hidden_mean with "
            f"prompts{nearest(missing[0], domains)}"
        )
    if len([source for source in sources if domain_of(source, domains)]) < 2:
        raise ValueError(
            f"{setting}.init.kind=domain_centroid needs the training text of two domains or more to tell experts apart, got "
            f"{', '.join(domains)} for {', '.join(sources)}; add a domain called {GENERAL}, which is the seed's"
        )


def domain_of(source: str, domains: Iterable[str]) -> str | None:
    """The domain whose text shows what a source is for: that of its name; of the seed, "general".

    None for a seed without one: its text is that of all domains, whose mean is the origin of the rows (`text_rows`).
    """
    names = [source, *([GENERAL] if source == "seed" else [])]
    return next((name for name in names if name in domains), None)


def domains_needed(choice: AssembleConfig, sources: Iterable[str], domains: Sequence[str]) -> list[str]:
    """The domains whose training text some router starts from; [] if none does.

    Raises ValueError: see `check_texts`.
    """
    sources = list(sources)
    check_texts(choice, sources, domains)
    if all(init.kind != "domain_centroid" for init in choice.inits.values()):
        return []
    return sorted({domain for source in sources if (domain := domain_of(source, domains))})
