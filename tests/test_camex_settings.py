"""Settings of combined experts that mean nothing, or cannot be, are refused before any work, with what to write instead."""

from __future__ import annotations

import re

import pytest
import tiny

import upcycle
from tests.test_merges import configured
from upcycle.configuration import UpcycledConfig
from upcycle.experts import place

SEGMENT = {"kind": "soft", "top_k": 1, "pool": {"per": "segment", "tokens": 8, "first": "base"}}
CA = {"of": "weights", "base": "seed", "curvature": "kronecker"}


def choice(router=None, placement=None, **combine):
    return upcycle.preset(
        "camex_layer",
        router=router or {},
        placement=placement or {},
        combine={"of": "weights", "base": "seed", **combine},
    )


REFUSED = {
    "combine: base=seed has no effect with of=outputs": {"of": "outputs", "curvature": "none"},
    "combine: rank=2 has no effect with curvature=none": {"curvature": "none", "rank": 2},
    "combine: share=all has no effect with curvature=none": {"curvature": "none", "share": "all"},
    "combine: train_base=false has no effect with base=zeros": {
        "base": "zeros", "train_base": False, "router": {"pool": {"first": "uniform"}},
    },
    "combine: curvature=kronecker has no effect with base=none": {"base": "none", "router": {"pool": {"first": "uniform"}}},
    "router.pool.per=token decides for every token; write router.pool.per=segment": {
        "router": {"pool": {"per": "token", "tokens": 256, "first": "seed"}},
    },
    "router.pool.first=base needs a base expert, got combine.base=zeros": {"base": "zeros"},
    "first segments would go through another layer's feed-forward": {"update": "travel"},
    "pool.first=seed needs the seed among the experts": {"router": {"pool": {"first": "seed"}}},
    "merges whole feed-forwards, got placement.split=2": {"placement": {"split": 2}},
    "base=mean has no effect with curvature=none, alpha=1 and router.pool.first=uniform": {
        "base": "mean", "curvature": "none", "router": {"pool": {"first": "uniform"}},
    },
    "leave differences of 0, which teach no curvature": {"placement": {"experts": "seed"}},
    "is also among placement.experts=['seed', 'code']": {"placement": {"experts": ["seed", "code"]}},
    "alpha: Input should be greater than 0": {"alpha": 0.0},
    "alpha: Input should be less than or equal to 1000": {"alpha": 1e39},
    "alpha: Input should be a finite number": {"alpha": float("inf")},
    "rank: Input should be less than or equal to 256": {"rank": 257},
    "drop: Input should be less than 1": {"drop": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_mean_nothing_are_refused(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choice(**REFUSED[message])


def test_a_first_segment_for_the_base_needs_merged_weights():
    with pytest.raises(ValueError, match="is for experts whose weights are merged"):
        upcycle.preset("btx", router=SEGMENT, combine={})
    own = {"pool": {"per": "segment", "tokens": 8, "first": "own_mean"}}
    with pytest.raises(
        ValueError, match=r"attention_router.pool.first=own_mean is for experts whose weights are merged"
    ):
        upcycle.preset("bam", attention_router=own)


def test_the_base_is_one_of_the_models_and_none_of_the_routed():
    found = place(choice(), ["code", "law"], layers=2, width=8)
    assert [one.name for one in found.experts] == ["code", "law"] and [one.name for one in found.base] == ["seed"]
    assert found.models == ("seed", "code", "law")
    other = place(choice(base="law"), ["code", "law"], layers=2, width=8)
    assert [one.name for one in other.experts] == ["seed", "code"] and other.models == ("seed", "code", "law")
    mean = place(choice(base="mean"), ["code"], layers=2, width=8)
    assert [one.name for one in mean.experts] == ["seed", "code"] and mean.base == ()
    with pytest.raises(ValueError, match="two experts or more beside the base seed, got code; add a branch"):
        place(choice(), ["code"], layers=2, width=8)
    with pytest.raises(
        ValueError, match="combine.base=mean is no model's name, and a branch is called so; rename that branch"
    ):
        place(choice(base="mean"), ["code", "mean"], layers=2, width=8)


def test_a_config_that_cannot_be_is_refused():
    fields = {"seed": tiny.dense_config("llama").to_dict(), "router": "soft"}
    segment = {"per": "segment", "tokens": 3, "first": "uniform"}
    for message, changes in {
        "expected combine.of=weights, or all else as it is by default": {"combine": {"base": "seed"}, "router_options": segment},
        "expected a soft or top-k router that decides per segment": {"combine": {"of": "weights"}},
        "first='base' needs a base expert": {"combine": {"of": "weights"}, "router_options": segment | {"first": "base"}},
        "sends first segments through another layer's": {
            "combine": CA | {"update": "travel"}, "router_options": segment | {"first": "base"},
        },
        "combine.curvature='krone' is not known": {"combine": CA | {"curvature": "krone"}, "router_options": segment},
        "combine: 'ranks' is not known": {"combine": CA | {"ranks": 2}, "router_options": segment},
        "merges whole feed-forwards, got split=2": {"combine": CA, "router_options": segment, "split": 2},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(message)):
            UpcycledConfig(**fields | changes)


def test_a_run_says_early_which_sizes_and_which_windows_cannot_be():
    layer = [
        "experiment=tiny",
        "assemble@mixtures.btx.assemble=camex_layer",
        "mixtures.btx.assemble.router.pool.tokens=8",
    ]
    with pytest.raises(
        ValueError, match=r"mixtures.btx.assemble.curvature: a dimension of 1021 splits into 1 × 1021 at best"
    ):
        configured(*layer, "seed.sizes.intermediate_size=1021")
    with pytest.raises(ValueError, match=r"mixtures.btx routes the first 8 tokens .*write eval.skip_first=8"):
        configured(*layer, "mixtures.btx.assemble.router.pool.first=own_mean")
    configured(*layer, "mixtures.btx.assemble.router.pool.first=own_mean", "eval.skip_first=8")
