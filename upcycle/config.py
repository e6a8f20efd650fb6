"""Every setting of a run, as frozen dataclasses. Nothing here imports torch, so `plan` and `status` start fast.

A config is checked once, at the border (`launch/pipeline.py`); past it, nobody sees plain dictionaries of options.
Numbers are in the units their names say: `_tokens`, `_bytes`, `_fraction`, `_steps`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, get_args

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid")
Group = Literal["router", "experts", "curvature", "attention", "rest"]
GROUPS: tuple[str, ...] = get_args(Group)

# Families that a seed can be pretrained in; checkpoints that are brought may be of any in upcycle.families.
ARCHITECTURES = ("gpt_neox", "llama")
REQUIRED_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES = (
    *REQUIRED_SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps",
    "layer_norm_eps", "rope_theta", "rope_parameters", "attention_bias", "hidden_act", "rotary_pct",
    "use_parallel_residual", "initializer_range", "attention_dropout", "hidden_dropout",
)  # fmt: skip
REFUSED_SIZES = {
    "mlp_bias": "a seed that is pretrained here has none in its feed-forwards; leave it out",
    "vocab_size": "the vocabulary's size is tokenizer.vocab_size; set it there",
}


def nearest(word: str, valid: Iterable[str]) -> str:
    """The end of a message: what `word` may have been meant to be, and a full stop or question mark."""
    close = difflib.get_close_matches(word, list(valid), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else "."


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DomainConfig:
    """Where a domain's documents come from, and how much of them is held out.

    `source` says how `path` is read: `corpus` (a name in `upcycle.corpora.CORPORA`), `json` | `parquet` | `text`
    (a file, a glob or a folder), `hub` (a Hugging Face dataset name or a local folder laid out like one).
    A domain with `trained: false` is only evaluated.
    """

    source: Literal["corpus", "json", "parquet", "text", "hub"]
    path: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    streaming: bool = False
    num_proc: int | None = None
    max_bytes: int | None = None
    trained: bool = True
    test_fraction: float = Field(default=0.05, ge=0, lt=1)
    valid_fraction: float = Field(default=0.02, ge=0, lt=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenizerConfig:
    """A byte-level BPE trained on `proportions` of the domains' training text (from-scratch seeds only)."""

    vocab_size: int
    proportions: dict[str, float]
    sample_bytes: int = 8_000_000


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScheduleConfig:
    """Learning rate over a phase: linear warm-up, then `kind` down to `final_fraction` of the peak."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = Field(default=100, ge=0)
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    decay_fraction: float = Field(default=0.2, gt=0, le=1)  # wsd: the last share of the steps, in which the rate falls


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GroupConfig:
    """How one parameter group differs: its rate is `lr_multiplier` times the phase's."""

    lr_multiplier: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW. Groups are `router`, `experts`, `attention`, `rest`; 1-D tensors never decay."""

    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    groups: dict[Group, GroupConfig] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PhaseConfig:
    """A stretch of training: its length, what trains in it, and its peak learning rate.

    Exactly one of `steps` and `tokens`, or neither for "the rest" (last phase only). `trainable` and `frozen` are
    group names or regular expressions over parameter names; `frozen` is applied after `trainable`. A pattern of letters
    and underscores only must be a group. `lr` of None is the run's. `experts`: of the tensors that hold the experts side by
    side, and of the routers' rows, train those of these experts only; () is all. What experts share is not its business:
    `{trainable: [router, experts], experts: [new]}` trains nothing else of a BTX mixture.
    """

    steps: int | None = None
    tokens: int | None = None
    lr: float | None = Field(default=None, gt=0)
    trainable: tuple[str, ...] = (".*",)
    frozen: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """One training run: how many tokens, of what, in which steps, at which rate."""

    tokens: int = Field(gt=0)
    proportions: dict[str, float]
    sequence_length: int = Field(gt=1)
    batch_sequences: int = Field(gt=0)
    micro_batch_sequences: int = Field(gt=0)
    lr: float = Field(gt=0)
    schedule: ScheduleConfig = ScheduleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    phases: tuple[PhaseConfig, ...] = (PhaseConfig(),)
    precision: Literal["fp32", "bf16"] = "bf16"
    gradient_checkpointing: bool = False
    max_epochs: float = 4.0
    rng_seed: int = Field(default=1, ge=0)

    @property
    def batch_tokens(self) -> int:
        return self.batch_sequences * self.sequence_length

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.batch_tokens)

    @model_validator(mode="after")
    def _consistent(self):
        if self.batch_sequences % self.micro_batch_sequences:
            raise ValueError(
                f"batch_sequences={self.batch_sequences} is not a multiple of "
                f"micro_batch_sequences={self.micro_batch_sequences}; make it one"
            )
        if not self.proportions or min(self.proportions.values()) < 0 or sum(self.proportions.values()) <= 0:
            raise ValueError(f"proportions={self.proportions} must name domains with shares >= 0 that sum above 0")
        if not self.phases:
            raise ValueError("phases=[] trains nothing; write [{}] for one phase that trains everything")
        for number, phase in enumerate(self.phases):
            got = f"phases[{number}] has steps={phase.steps} and tokens={phase.tokens}"
            if phase.steps is not None and phase.tokens is not None:
                raise ValueError(f"{got}, expected at most one of them; leave one out")
            if phase.steps is None and phase.tokens is None and number < len(self.phases) - 1:
                raise ValueError(f"{got}; every phase but the last needs exactly one of steps and tokens")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SeedConfig:
    """The dense model everything starts from: a checkpoint (`path`), or an architecture trained from scratch."""

    path: str | None = None
    architecture: str | None = None
    sizes: dict[str, int | float | bool | str | dict[str, int | float | bool | str]] = Field(default_factory=dict)
    tokenizer: TokenizerConfig | None = None
    train: TrainConfig | None = None

    @model_validator(mode="after")
    def _one_origin(self):
        if (self.path is None) == (self.architecture is None):
            raise ValueError(
                f"got path={self.path} and architecture={self.architecture}, expected exactly one of path (a checkpoint) "
                "and architecture (train one from scratch); set the other to null"
            )
        if self.path is not None and self.train is not None:
            raise ValueError(
                f"train has no effect beside path={self.path}: a checkpoint is taken as it is; set seed.train=null, "
                "or give a branch the training"
            )
        if self.architecture is not None:
            self._check_architecture(self.architecture)
        return self

    def _check_architecture(self, architecture: str) -> None:
        if self.train is None or self.tokenizer is None:
            raise ValueError("a seed trained from scratch needs train and tokenizer")
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture={architecture!r} is not supported, expected one of {', '.join(ARCHITECTURES)}"
                f"{nearest(architecture, ARCHITECTURES)} Bring a checkpoint of another family as seed.path"
            )
        for name in self.sizes:
            if name in REFUSED_SIZES:
                raise ValueError(f"sizes.{name}: {REFUSED_SIZES[name]}")
            if name not in SIZES:
                raise ValueError(f"sizes.{name}: unknown size{nearest(name, SIZES)} Valid here: {', '.join(SIZES)}")
        missing = [name for name in REQUIRED_SIZES if name not in self.sizes]
        if missing:
            raise ValueError(f"sizes lacks {', '.join(missing)}; a seed trained from scratch needs a value for each")
        for name in REQUIRED_SIZES:
            size = self.sizes[name]
            if type(size) is not int or size < 1:
                raise ValueError(f"sizes.{name}={size!r}, expected a whole number above 0; give one")
        hidden, heads = self.sizes["hidden_size"], self.sizes["num_attention_heads"]
        if "head_dim" not in self.sizes and hidden % heads:  # pyright: ignore[reportOperatorIssue]
            raise ValueError(
                f"sizes.hidden_size={hidden} is not a multiple of num_attention_heads={heads}; make it one"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BranchConfig:
    """One domain model: trained from the seed (`train`), or brought along (`path`)."""

    path: str | None = None
    train: TrainConfig | None = None

    @model_validator(mode="after")
    def _one_origin(self):
        if (self.path is None) == (self.train is None):
            raise ValueError(
                f"got path={self.path} and {'a' if self.train else 'no'} train, expected exactly one of them; give the "
                "branch its checkpoint (path) or tokens to train on (train)"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvalConfig:
    """What is measured on every model. `max_tokens` bounds each domain's split (whole documents, from its start, one at least).

    stride: windows of `sequence_length` tokens begin this far apart, and each but the first predicts its last `stride`
    tokens only; None: they do not overlap. skip_first: so many tokens at the start of every window are not scored, for all models
    alike; what a mixture with pool.first=own_mean needs, which reads them ahead.
    """

    split: Literal["valid", "test"] = "test"
    sequence_length: int = Field(default=512, gt=1)
    stride: int | None = Field(default=None, gt=0)
    skip_first: int = Field(default=0, ge=0)
    batch_sequences: int = Field(default=8, gt=0)
    max_tokens: int | None = Field(default=None, gt=0)
    bootstrap_samples: int = 1000
    precision: Literal["fp32", "bf16"] = "fp32"
    rng_seed: int = Field(default=1, ge=0)

    @model_validator(mode="after")
    def _leaves_no_token_out(self):
        if self.tokens_apart > self.sequence_length:
            raise ValueError(
                f"stride={self.stride} leaves tokens out between windows of sequence_length={self.sequence_length}; expected "
                "at most that, or null"
            )
        if self.skip_first >= self.sequence_length:
            raise ValueError(
                f"skip_first={self.skip_first} leaves nothing of windows of sequence_length={self.sequence_length}; expected less"
            )
        return self

    @property
    def tokens_apart(self) -> int:
        """From the begin of a window to that of the next."""
        return self.stride or self.sequence_length


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SamplesConfig:
    """On how much of its training text a model's curvature is measured, and how.

    labels: drawn from the model's own predictions (the Fisher matrix), or as the text has them (the empirical one).
    largest_factor: linears with more in- or out-features have no Gram matrices and no Kronecker factors.
    """

    sequences: int = Field(default=256, gt=0)
    sequence_length: int = Field(default=512, gt=1)
    labels: Literal["sampled", "observed"] = "sampled"
    largest_factor: int = Field(default=16384, gt=0)
    rng_seed: int = Field(default=1, ge=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CurvatureConfig(SamplesConfig):
    """What is measured of a model's loss around its weights (curvature.measure)."""

    kinds: tuple[Literal["fisher", "gram", "kfac", "hessian", "gradient"], ...] = Field(
        default=("fisher",), min_length=1
    )

    @model_validator(mode="after")
    def _of_the_text(self):
        if "gradient" in self.kinds and self.labels == "sampled":
            raise ValueError(
                "kinds=gradient with labels=sampled is 0 on average; write labels=observed, for the text's own"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TextsConfig(SamplesConfig):
    """Of every model whose curvature a merge of the run reads. texts: for each model by name, the shares of the domains that it
    is measured on; one that is not named, on what it was trained on here. compare: for seed and branches, the Fisher's diagonal
    against Hutchinson's estimate of the Hessian's; and how far task arithmetic is from the dense continuation, if there is one,
    against what its theory predicts.
    """

    texts: dict[str, dict[str, float]] = Field(default_factory=dict)
    compare: bool = False

    @model_validator(mode="after")
    def _says_texts(self):
        for name, shares in self.texts.items():
            if not shares or min(shares.values()) < 0 or sum(shares.values()) <= 0:
                raise ValueError(f"texts.{name}={shares} must name domains with shares >= 0 that sum above 0")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ContinuationsConfig:
    """Questions from held-out documents: which of `choices` passages goes on from at most `context_characters` of text?

    questions: of one domain, at most. continuation_characters: of every choice, exactly.
    """

    questions: int = Field(default=200, gt=0)
    choices: int = Field(default=4, gt=1)
    context_characters: int = Field(default=256, gt=0)
    continuation_characters: int = Field(default=96, gt=0)
    rng_seed: int = Field(default=1, ge=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TasksConfig:
    """Tasks of lm-eval, for every model of the run.

    names: suites (`evals.suites`) and lm-eval's own tasks, groups and tags. num_fewshot: examples before each question
    (None: the suite's number, else the task's). limit: questions of a task, at most. sequence_length: tokens of an input,
    at most (None: what the model takes). execute_code: let tasks run the programs that the models write, here.
    """

    names: tuple[str, ...] = Field(min_length=1)
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, gt=0)
    batch_sequences: int = Field(default=8, gt=0)
    sequence_length: int | None = Field(default=None, gt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    execute_code: bool = False
    rng_seed: int = Field(default=1, ge=0)
    continuations: ContinuationsConfig = ContinuationsConfig()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AblationConfig:
    """Every mixture without each of its E experts, and with each alone: 2 · E + 1 evaluations. max_tokens: as in
    EvalConfig, whose it is where it is None."""

    max_tokens: int | None = Field(default=None, gt=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EnsembleConfig:
    """Seed and branches side by side, weighed by what they have predicted so far (arXiv:2208.03306); top_k: so many of them."""

    top_k: int | None = Field(default=None, ge=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """What holds for every domain: how alike two documents are before they must share a split, and EOS handling."""

    near_duplicate_similarity: float = Field(default=0.7, gt=0, le=1)
    rng_seed: int = Field(default=1, ge=0)
