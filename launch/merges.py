"""The merges of a run: are their settings right, which models' curvature do they read, and on which text is it measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from launch.lineage import add
from upcycle.batches import consumed_tokens
from upcycle.config import CurvatureConfig, SamplesConfig, nearest
from upcycle.merge_config import ROLES, MergeConfig
from upcycle.mixture_config import AssembleConfig
from upcycle.stages import compare_curvature, compare_task_arithmetic, learn_camex, measure_curvature
from upcycle.store import Artifact, Store

if TYPE_CHECKING:
    from launch.config import Config
    from upcycle.cost import Shape

SOME_READ = (
    "labels",
    "largest_factor",
)  # settings of a measurement that not every kind reads; they are no part of its key then
READ = {"fisher": ("labels",), "gram": ("largest_factor",), "kfac": SOME_READ, "hessian": (), "gradient": ()}
PASSES = {
    "gram": 1,
    "fisher": 3,
    "kfac": 3,
    "gradient": 3,
    "hessian": 9,
}  # in forwards; a Hessian is the gradient of one
TASK_ARITHMETIC_SCALE = 0.4  # merge.METHODS' own default


class Curvature:
    """Declares the stages `curvature/KIND/MODEL`, one pass over one model each, as merges ask for them."""

    def __init__(self, cfg: Config, store: Store, models: Mapping[str, Artifact], data: Mapping[str, Artifact]):
        self.cfg, self.store, self.models, self.data = cfg, store, models, data

    def read_by(
        self, merge: MergeConfig, members: Iterable[str], owner: str, choice: AssembleConfig | None = None
    ) -> dict[str, dict[str, Artifact]]:
        """{kind of statistic: its artifact of each model} that the merge of these members reads. owner: the merge or mixture; choice:
        of a mixture."""
        found = {}
        for kind, read in reads(merge, members).items():
            if kind == "camex":
                found[kind] = dict.fromkeys(read, self._learned(merge, read, owner, choice))
            else:
                found[kind] = {name: self._of(kind, name) for name in read}
        return found

    def _learned(self, merge: MergeConfig, members: list[str], owner: str, choice: AssembleConfig | None) -> Artifact:
        """What a CAMEx merge learns of its models together."""
        from upcycle.merge import learning

        texts = {name: texts_of(self.cfg, name) for name in members}
        own = self.cfg.curvature
        config = learning(merge, members, texts, own.sequence_length, own.rng_seed, choice)
        data = {domain: self.data[domain] for shares in texts.values() for domain in shares}
        branches = {name: model for name, model in self.models.items() if name != "seed"}
        return self.store.stage(
            f"curvature/camex/{owner}", learn_camex, config, seed=self.models["seed"], branches=branches, data=data
        )

    def compared(self) -> None:
        """Declares the stages `curvature/compared/MODEL`."""
        for name, model in self.models.items():
            both = {kind: self._of(kind, name) for kind in ("fisher", "hessian")}
            self.store.stage(f"curvature/compared/{name}", compare_curvature, None, model=model, **both)

    def error_of_task_arithmetic(self, target: Artifact) -> None:
        """Declares the stage `curvature/task_arithmetic`: its distance from `target`, measured and predicted."""
        branches = {name: model for name, model in self.models.items() if name != "seed"}
        inputs = {
            "at_target": {name: self._of("gradient", name, target, f"{name}-at-{target.name}") for name in branches},
            "at_branch": {name: self._of("gradient", name) for name in branches},
        }
        self.store.stage(
            "curvature/task_arithmetic", compare_task_arithmetic, {"scale": TASK_ARITHMETIC_SCALE},
            seed=self.models["seed"], branches=branches, target=target, fisher=self._of("fisher", "seed"), **inputs,
        )  # fmt: skip

    def _of(self, kind: str, name: str, model: Artifact | None = None, title: str | None = None) -> Artifact:
        """A statistic of a model, or of another `model` on that one's text."""
        shares, own = texts_of(self.cfg, name), self.cfg.curvature
        fields = [
            field for field in SamplesConfig.__dataclass_fields__ if field in READ[kind] or field not in SOME_READ
        ]
        samples = {field: getattr(own, field) for field in fields}
        if kind == "gradient":
            samples["labels"] = "observed"
        config = {"curvature": CurvatureConfig(kinds=(kind,), **samples), "proportions": shares}  # pyright: ignore
        data = {domain: self.data[domain] for domain in shares}
        stage = f"curvature/{kind}/{title or name}"
        return self.store.stage(stage, measure_curvature, config, model=model or self.models[name], data=data)


def reads(merge: MergeConfig, members: Iterable[str]) -> dict[str, list[str]]:
    """`merge.readers`. Raises ValueError: see `merge.check_options`."""
    if merge.record in ("average", "seed"):
        return {}  # without a look at merge.METHODS, which takes torch
    from upcycle.merge import readers

    return readers(merge, members)


def curvature_cost(
    cfg: Config, merge: MergeConfig, members: Iterable[str], shape: Shape, choice: AssembleConfig | None = None
) -> tuple[dict[str, int], float]:
    """(tokens of each domain that something was learned from, FLOPs) of what a merge reads; shape: the seed's; choice: of a mixture.

    Statistics are counted by the passes that they take, each for itself although merges share them; they teach nothing new, and so
    count no tokens.
    """
    own, domains, flops = cfg.curvature, {}, 0.0
    for kind, models in reads(merge, members).items():
        if kind != "camex":
            each = own.sequences * own.sequence_length * shape.forward_flops_per_token(own.sequence_length)
            flops += len(models) * PASSES[kind] * each
            continue
        from upcycle.merge import learning

        texts = {name: texts_of(cfg, name) for name in models}
        domains, learned = learning_cost(
            learning(merge, models, texts, own.sequence_length, own.rng_seed, choice), shape
        )
        flops += learned
    return domains, flops


def learning_cost(config: Mapping[str, Any], shape: Shape) -> tuple[dict[str, int], float]:
    """(tokens of each domain, FLOPs) of learning a CAMEx merge; config: of `stages.learn_camex`; shape: the seed's.

    Of a mixture, the feed-forwards of layers without experts, and keys and values that BAM's experts share, are merged too and not counted.
    """
    from upcycle.merge import kinds_of

    options, merge, choice = config["options"], config["merge"], config["assemble"]
    sequences, length = options["steps"] * options["batch_sequences"], config["sequence_length"]
    domains: dict[str, int] = {}
    for shares in config["texts"].values():
        domains = add(domains, consumed_tokens(shares, config["rng_seed"], length, sequences))
    experts = set() if choice is None else {"mlp"} | ({"attention"} if choice.attention == "mixture" else set())
    roles = [role for role in ROLES if role not in experts and "camex" in kinds_of(merge.of(role))]
    maps = 3 * options["steps"] * shape.map_flops(len(config["texts"]), options["rank"], roles)
    return domains, maps + sum(domains.values()) * shape.train_flops_per_token(length)


def curvature_stages(merge: MergeConfig, members: Iterable[str], owner: str) -> list[list[str]]:
    """The names of the stages that measure what the merge reads, all side by side; none is no list. owner: as in `Curvature.read_by`."""
    names = [
        f"curvature/{kind}/{owner if kind == 'camex' else name}"
        for kind, read in reads(merge, members).items()
        for name in read
    ]
    return [list(dict.fromkeys(names))] if names else []


def texts_of(cfg: Config, name: str) -> dict[str, float]:
    """The shares of the domains that a model's curvature is measured on: as `curvature.texts` says, else what it was trained on
    here, else the domain of its name; a seed that was brought along, all trained domains alike.

    Raises ValueError: a model that was brought along, and nothing says which domain is its own.
    """
    if name in cfg.curvature.texts:
        return cfg.curvature.texts[name]
    train = cfg.seed.train if name == "seed" else cfg.branches[name].train
    if train is not None:
        return {domain: share for domain, share in train.proportions.items() if share > 0}
    if name in cfg.trained_domains:
        return {name: 1.0}
    if name == "seed" and cfg.trained_domains:
        return dict.fromkeys(cfg.trained_domains, 1.0)
    add = "" if cfg.trained_domains else ", after adding one as +domains@domains.code=code"
    raise ValueError(
        f"a merge reads the curvature of {name}, which was brought along, and nothing says on which text to measure it; write "
        f"curvature.texts.{name}={{DOMAIN: 1.0}} with a trained domain ({', '.join(cfg.trained_domains) or 'there is none'}){add}"
    )


def check_merges(cfg: Config, members: Mapping[str, Iterable[str]]) -> None:
    """Every merge can be made. members: of each mixture, the models that have experts.

    Raises ValueError: see `merge.check_merge`; a merge without branches; curvature without text to measure it on.
    """
    if cfg.merges and not cfg.branches:
        name = next(iter(cfg.merges))
        raise ValueError(
            f"merges.{name} has no branch to be made of, expected at least one; give it as branches.NAME.path=DIR"
        )
    for name, shares in cfg.curvature.texts.items():
        if name not in (models := ["seed", *cfg.branches]):
            raise ValueError(f"curvature.texts.{name}: expected one of {', '.join(models)}{nearest(name, models)}")
        for domain in shares:
            if domain not in cfg.trained_domains:
                raise ValueError(
                    f"curvature.texts.{name} names {domain!r}, expected one of the trained domains "
                    f"({', '.join(cfg.trained_domains)}){nearest(domain, cfg.trained_domains)}"
                )
    if (
        cfg.curvature.texts
        and not cfg.curvature.compare
        and not any(reads(merge, m) for _, merge, m in merges_of(cfg, members))
    ):
        raise ValueError("curvature.texts has no effect: no merge of this run reads curvature; leave it out")
    for name in ["seed", *cfg.branches] if cfg.curvature.compare else []:
        texts_of(cfg, name)
    for where, merge, models in merges_of(cfg, members):
        if merge.record in ("average", "seed"):
            continue
        from upcycle.merge import check_merge

        try:
            check_merge(merge, models)
            for name in dict.fromkeys(name for read in reads(merge, models).values() for name in read):
                texts_of(cfg, name)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None


def merges_of(cfg: Config, members: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, MergeConfig, list[str]]]:
    """(where it stands, the merge, the models that have a share) of every merge of the run."""
    for name, merge in cfg.merges.items():
        yield "" if name == "merged" else f"merges.{name}: ", merge, ["seed", *cfg.branches]
    for name, models in members.items():
        if not cfg.mixtures[name].scratch:
            yield f"mixtures.{name}.assemble.", cfg.mixtures[name].assemble.merge, list(models)
