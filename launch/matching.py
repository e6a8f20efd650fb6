"""Fair baselines: how many tokens, of which domains, a run takes to have seen, or cost, as much as the reference mixture."""

from __future__ import annotations

from dataclasses import replace

from launch.config import Config
from launch.lineage import Lineage, add
from upcycle.config import TrainConfig
from upcycle.phases import plan_phases


def matched(train: TrainConfig, match: str, start: Lineage, reference: Lineage | None, where: str) -> TrainConfig:
    """`train` with the tokens and proportions that take a model from `start` to where the reference mixture is.

        data:     tokens_d = reference_d − start_d, for every domain d
        compute:  tokens   = (FLOPs of the reference − FLOPs of start) / training FLOPs per token of start's shape,
                  shared among the domains as `data` would share them

    The reference's tokens and FLOPs are those of its seed, its branches and its own training; start's, those of every stage
    behind the model so far: of the seed for a dense continuation or for copies of the seed, of seed and branches for a
    mixture of branches, nothing for a mixture that is drawn at random. FLOPs are cost.py's. `data` ends on the step that
    completes its tokens, `compute` on the nearest whole step.
    Raises ValueError: a branch of unknown cost; a start that took as much as the reference already, or more of a domain.
    """
    assert reference is not None, where  # config.py refuses it
    if start.domains is None or reference.domains is None or start.flops is None or reference.flops is None:
        raise ValueError(
            f"{where}: match={match} needs the tokens of every branch, and one was brought along, whose tokens nobody here "
            "knows; write match: none, or train that branch here"
        )
    left = add(reference.domains, start.domains, sign=-1)
    more = [domain for domain, count in left.items() if count < 0]
    total, flops_left = sum(left.values()), reference.flops - start.flops
    if more or total <= 0 or flops_left <= 0:
        what = f"more of {', '.join(more)} than" if more else "as much as"
        raise ValueError(
            f"{where}: match={match} leaves nothing to train, since what it is made of took {what} the reference mixture; "
            "write match: none, or name a longer mixture as match_to"
        )
    proportions = {domain: count / total for domain, count in left.items() if count}
    if match == "compute":
        per_step = train.batch_tokens * start.shape.step_flops_per_token(
            train.sequence_length, train.micro_batch_sequences
        )
        total = max(1, round(flops_left / per_step)) * train.batch_tokens
    found = replace(train, tokens=total, proportions=proportions)
    plan_phases(found, where)
    return found


def reference_name(cfg: Config) -> str | None:
    """The mixture that others are matched to: match_to, or the first that is trained on tokens of its own."""
    return cfg.match_to or next(iter(cfg.unmatched), None)
