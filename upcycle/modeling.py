"""UpcycledForCausalLM: the seed's own Hugging Face decoder with its MLPs, and for BAM its attentions, replaced.

Norms, residual structure, embeddings, rotary embedding, caches, masks, gradient checkpointing and attention kernels stay
the family's. Experts and model live in this one file because transformers decides from the source of the file whether
a model may use grouped expert kernels.
Shapes: B batch, S sequence, T tokens (B·S), D hidden, F feed-forward, E experts, K experts per token.
This file travels inside checkpoints as remote code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import logging

from .attention import GatedOutput, soft_mixture_of_attention
from .camex import SharedCurvature, merging_experts, shared_curvature
from .configuration import UpcycledConfig
from .families import ACTIVATIONS, Family, family_of, final_logits, stacked_shapes
from .kernels import shown_to_kernels
from .kinds import FACTS
from .kronecker_map import start
from .losses import IGNORED, router_losses
from .plans import plans_of_modules
from .router import REMEMBERED, Router, RoutingTrace, masks_for_routers, remembered
from .soft_merging import SoftMergedExperts

logger = logging.get_logger(__name__)


def _loop_over_experts(experts, hidden_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
    """The plain implementation ("eager"): each expert on its own tokens."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    up, up_bias = getattr(experts, first), getattr(experts, f"{first}_bias", None)
    down, down_bias = experts.down_proj, getattr(experts, "down_proj_bias", None)
    out = torch.zeros_like(hidden_TD)
    for expert in range(experts.num_experts):
        token, place = torch.where(experts_TK == expert)
        x = nn.functional.linear(hidden_TD[token], up[expert], None if up_bias is None else up_bias[expert])
        x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
        x = nn.functional.linear(x, down[expert], None if down_bias is None else down_bias[expert])
        out.index_add_(0, token, (x * gates_TK[token, place, None]).to(out.dtype))
    return out


@shown_to_kernels
@use_experts_implementation
class _StackedExperts(nn.Module):
    def __init__(self, config: UpcycledConfig, mlp: nn.Module, family: Family):
        super().__init__()
        shapes = stacked_shapes(mlp, family, config.num_experts, config.split)
        self.num_experts, self.hidden_dim, self.intermediate_dim = shapes["down_proj"]
        self.act_fn = next(getattr(mlp, name) for name in ACTIVATIONS if hasattr(mlp, name))
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self: Any, hidden_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        return _loop_over_experts(self, hidden_TD, experts_TK, gates_TK)


class StackedExperts(_StackedExperts):
    """The MLPs of all experts. gate_up_proj (E, 2F, D), gate rows first, or up_proj (E, F, D); down_proj (E, D, F).

    With biases where the family has them: gate_up_proj_bias (E, 2F) or up_proj_bias (E, F), down_proj_bias (E, D).
    mlp: the family's own, used for its activation and shapes only.
    """

    def __init__(self, config: UpcycledConfig, mlp: nn.Module, family: Family):
        super().__init__(config, mlp, family)  # whose decorator knows one layout for all instances of a class
        self.has_gate, self.has_bias = family.gated, hasattr(self, "down_proj_bias")


class RoutedExperts(nn.Module):
    """The feed-forward sublayer of a mixture: a router and the branches' MLPs; with a shared expert, MLP_s,

        half  ½ MLP_s(x) + ½ Σ_e gate_e · MLP_e(x)     copies of the seed stay the seed
        sum   MLP_s(x) + Σ_e gate_e · MLP_e(x)         (Nexus, arXiv:2408.15901)

    Where weights are merged, the MLP of the merged weights stands in place of Σ_e gate_e · MLP_e(x) (soft_merging.py).
    mlp: the family's own; it becomes the shared expert, or is used for its shapes only.
    """

    def __init__(self, config: UpcycledConfig, mlp: nn.Module, layer: int):
        super().__init__()
        family = family_of(config.seed)
        rule = config.rule("ffn", layer)
        self.router = Router(config.hidden_size, config.num_experts, f"ffn.{layer}", rule, **config.ties("ffn", layer))
        self.sparse = FACTS[rule.kind].sparse
        self.experts: Any = merging_experts(config, mlp, layer) or StackedExperts(config, mlp, family)
        self.dropout = nn.Dropout(getattr(config.seed, family.mlp_dropout) if family.mlp_dropout else 0.0)
        self.shared_expert = None if config.shared_expert == "none" else mlp
        self.share = 0.5 if config.shared_gate == "half" else 1.0
        self.trace: RoutingTrace | None = None

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        routing = self.router(hidden_BSD, self.trace)
        hidden_TD, experts_TK, gates_TK = hidden_BSD.flatten(0, -2), routing.experts, routing.gates
        if isinstance(self.experts, SoftMergedExperts):
            mixed_TD = self.experts(hidden_TD, routing, self.trace or RoutingTrace())
        elif self.sparse and self.training:
            mixed_TD = self._taken_places_only(hidden_TD, experts_TK, gates_TK)
        else:
            mixed_TD = self.experts(hidden_TD, experts_TK, gates_TK)
        mixed_BSD = self.dropout(mixed_TD.view(hidden_BSD.shape))
        if self.shared_expert is None:
            return mixed_BSD
        return self.share * (self.shared_expert(hidden_BSD) + mixed_BSD)

    def _taken_places_only(self, hidden_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """The same sum without the work for places that hold nothing. On CUDA index_add's order, so its rounding, varies."""
        token_N, place_N = (gates_TK != 0).nonzero(as_tuple=True)
        chosen_N1, gates_N1 = experts_TK[token_N, place_N, None], gates_TK[token_N, place_N, None]
        out_ND = self.experts(hidden_TD[token_N], chosen_N1, gates_N1)
        return torch.zeros_like(hidden_TD, dtype=out_ND.dtype).index_add(0, token_N, out_ND)


@cache
def traced(layer_class: type) -> type:
    """The family's decoder layer, handing the trace of this forward to its own sublayers while it runs.

    This happens inside the checkpointed region, so a recomputation sees the trace of its own forward.
    """

    def forward(self, *args, trace: RoutingTrace | None = None, **kwargs):
        parts = [self.get_submodule(name) for name in self.routed_parts]
        for part in parts:
            part.trace = trace
        try:
            return layer_class.forward(self, *args, **kwargs)
        finally:
            for part in parts:
                part.trace = None  # nothing of one forward stays on a module

    return type(layer_class.__name__, (layer_class,), {"forward": forward, "__module__": __name__})


@torch.no_grad()
def _init_ours(module: nn.Module, std: float) -> bool:
    """Initialise a module of ours; False if it is not one. transformers.initialization spares loaded tensors."""
    if not isinstance(module, (StackedExperts, SoftMergedExperts, SharedCurvature, GatedOutput, Router)):
        return False
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if "curvature_" in name:
            init.copy_(tensor, start(name, tuple(tensor.shape)))
            continue
        init.zeros_(tensor) if "bias" in name else init.normal_(tensor, std=std)
    return True


@cache
def initialising(decoder_class: type) -> type:
    """The seed's decoder class that also initialises our sublayers: transformers asks the nearest PreTrainedModel."""

    def _init_weights(self, module):
        if not _init_ours(module, getattr(self.config, "initializer_range", 0.02)):
            decoder_class._init_weights(self, module)

    def init_parallel_plans(self):
        decoder_class.init_parallel_plans(self)
        self._tp_plan, self._ep_plan, self._fsdp_plan = {}, {}, {}  # those of the mixture's config hold

    attributes = {
        "_init_weights": _init_weights,
        "init_parallel_plans": init_parallel_plans,
        "__module__": __name__,
        "_keep_in_fp32_modules_strict": {"router"},
    }
    return type(decoder_class.__name__, (decoder_class,), attributes)


class UpcycledPreTrainedModel(PreTrainedModel):
    config_class = UpcycledConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = {"router"}

    def _init_weights(self, module):
        if not _init_ours(module, self.config.initializer_range):
            super()._init_weights(module)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs):
        """Non-reentrant only: the reentrant kind loses the gradients of recorded router logits without a word.

        Raises ValueError: use_reentrant=True.
        """
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise ValueError(
                "activation_checkpointing_kwargs: got use_reentrant=True, expected False; reentrant checkpointing runs "
                "the first forward without a graph, so the auxiliary losses would give the routers no gradient"
            )
        super().activation_checkpointing_enable(activation_checkpointing_kwargs=options, **kwargs)


class UpcycledModel(UpcycledPreTrainedModel):
    """The decoder: `decoder` is the seed's own base model with sublayers replaced."""

    def __init__(self, config: UpcycledConfig):
        super().__init__(config)
        decoder_class = AutoModel._model_mapping[type(config.seed)]  # pyright: ignore[reportIndexIssue]
        self.decoder = initialising(decoder_class)._from_config(config.seed)
        family = family_of(config.seed)
        for index, layer in enumerate(getattr(self.decoder, family.layers)):
            layer.__class__ = traced(type(layer))
            layer.routed_parts = []
            if index not in config.routed:  # it takes the trace all the same, so that its attention does not see it
                continue
            layer.routed_parts.append(family.mlp)
            setattr(layer, family.mlp, RoutedExperts(config, getattr(layer, family.mlp), index))
            if config.attention == "mixture":
                dense = getattr(layer, family.attention)
                setattr(layer, family.attention, soft_mixture_of_attention(dense, config, index))
                layer.routed_parts.append(family.attention)
        self.curvature, self.remembers = shared_curvature(self), config.remembers
        self._can_compile_fullgraph = not self.remembers
        self.post_init()

    def init_parallel_plans(self):
        """The config's plans with what only the modules tell: names of embeddings and norms, and which parts exist."""
        super().init_parallel_plans()
        self._tp_plan, self._ep_plan, self._fsdp_plan = plans_of_modules(self, family_of(self.config.seed))

    def get_input_embeddings(self):
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.decoder.set_input_embeddings(value)

    def forward(self, input_ids=None, attention_mask=None, trace: RoutingTrace | None = None, **kwargs):
        trace = RoutingTrace() if trace is None else trace
        if trace.routings:
            raise ValueError(
                "trace: got one that a forward has already filled, expected a new RoutingTrace for every forward; "
                "its recorded decisions would be used again for these tokens"
            )
        tokens = input_ids if input_ids is not None else kwargs["inputs_embeds"]
        attention_mask = trace.see(input_ids, tokens.shape[1], attention_mask)
        past, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        use_cache = self.decoder.config.use_cache if use_cache is None else use_cache
        if self.remembers and (past is not None or use_cache):
            trace.earlier = remembered(past)
        if self.curvature is not None:
            trace.curvature = self.curvature()
        out = self.decoder(input_ids=input_ids, attention_mask=attention_mask, trace=trace, **kwargs)
        if trace.earlier is not None and out.past_key_values is not None:
            setattr(out.past_key_values, REMEMBERED, trace.kept)
        return out


@dataclass
class UpcycledOutput(MoeCausalLMOutputWithPast):
    """`loss` is cross-entropy alone in eval mode, plus the weighted auxiliary losses in training mode.

    aux_losses: each auxiliary loss, unweighted, averaged over layers and valid tokens; in `loss` they are divided by
    the number of targets instead. router_logits and
    attention_router_logits: (T, E) a layer.
    """

    cross_entropy: Tensor | None = None
    aux_losses: dict[str, Tensor] | None = None
    attention_router_logits: tuple[Tensor, ...] | None = None


class UpcycledForCausalLM(UpcycledPreTrainedModel, GenerationMixin):
    """A mixture of experts with a language-model head."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: UpcycledConfig):
        super().__init__(config)
        self.model = UpcycledModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=family_of(config.seed).head_bias)
        embedding = next(n for n, m in self.model.named_modules() if m is self.model.get_input_embeddings())
        self._tied_weights_keys = {"lm_head.weight": f"model.{embedding}.weight"}
        # What routers remember cannot be taken back, as assisted generation would.
        self._is_stateful, self._can_compile_fullgraph = config.remembers, not config.remembers
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def _get_static_cache_init_shape(self) -> Any:
        """(heads, head size) of a cache that is made before the prompt is read in chunks; None: each layer makes its own.

        Where attention is a mixture in some layers only, the cache has more heads there than elsewhere.
        """
        some = len(self.config.routed) < self.config.seed.num_hidden_layers
        own: Any = super()
        return None if some and self.config.attention == "mixture" else own._get_static_cache_init_shape()

    @staticmethod
    def create_masks_for_generate(*, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs) -> Any:
        """What transformers prepares for caches of fixed size; routers have to know of padding beside it."""
        prepared = create_masks_for_generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        return masks_for_routers(attention_mask, inputs_embeds.shape[1], prepared)

    def _reorder_cache(self, past_key_values: Any, beam_idx: Tensor) -> Any:
        """Beam search moves rows of the cache; what the routers remember moves with them."""
        past_key_values.reorder_cache(beam_idx)
        if kept := getattr(past_key_values, REMEMBERED, None):
            setattr(past_key_values, REMEMBERED, {name: one.rows(beam_idx) for name, one in kept.items()})
        return past_key_values

    def auxiliary_sums(self, trace: RoutingTrace, tokens_BS: Tensor) -> dict[str, Tensor]:
        """The auxiliary losses of all routers as sums over valid tokens (losses.router_losses), by the names of
        `auxiliary_coefficients`."""
        valid = torch.ones_like(tokens_BS, dtype=torch.bool) if trace.valid_BS is None else trace.valid_BS
        sums: dict[str, Tensor] = {}
        for part in self.config.parts:
            names, losses = self.config.loss_names(part), self.config.losses(part)
            wanted = {name: name in names for name in ("z", "similarity", "entropy")}
            balance = losses["balance"] if "balance" in names else "none"
            found = router_losses(trace.of(part), valid, balance, losses["balance_scope"], **wanted)
            sums |= {names[name]: value for name, value in found.items()}
        return sums

    @property
    def auxiliary_coefficients(self) -> dict[str, float]:
        return {
            full: self.config.losses(part)[f"{name}_coefficient"]
            for part in self.config.parts
            for name, full in self.config.loss_names(part).items()
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,  # named, or generate() would not pass it
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        trace: RoutingTrace | None = None,
        **kwargs,
    ) -> UpcycledOutput:
        """labels (B, S): as in transformers, not shifted, IGNORED (-100) where there is no target."""
        if trace is None and labels is not None and self.training and self.config.counts_steps:
            logger.warning_once(
                "This mixture's routers change with the optimizer's steps (bias_rate, sample_top1), which another loop than "
                "upcycle's own does not tell them: biases stay where they are and the temperature at 1. Pass "
                "trace=RoutingTrace(step=...), and call upcycle.train.move_biases after each step."
            )
        trace = RoutingTrace() if trace is None else trace
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, trace=trace, **kwargs
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = final_logits(self.config.seed, self.lm_head(out.last_hidden_state[:, keep]))
        loss, cross_entropy, aux = None, None, None
        if labels is not None:
            cross_entropy = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
            tokens_BS, valid = out.last_hidden_state[..., 0], trace.valid_BS
            sums, count = self.auxiliary_sums(trace, tokens_BS), tokens_BS.numel() if valid is None else valid.sum()
            aux = {name: value / count for name, value in sums.items()}
            loss = cross_entropy
            if self.training:
                # Sums over the step's count of targets, as for the cross-entropy: micro-batches of any size add up.
                targets = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
                loss = loss + sum(self.auxiliary_coefficients[name] * value / targets for name, value in sums.items())

        def logits_of(part: str) -> Any:
            return tuple(routing.logits for routing in trace.of(part)) if output_router_logits else None

        return UpcycledOutput(
            loss=loss,
            cross_entropy=cross_entropy,
            aux_losses=aux,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            router_logits=logits_of("ffn"),
            attention_router_logits=logits_of("attention"),
        )


AutoModel.register(UpcycledConfig, UpcycledModel, exist_ok=True)
AutoModelForCausalLM.register(UpcycledConfig, UpcycledForCausalLM, exist_ok=True)
UpcycledModel.register_for_auto_class("AutoModel")
UpcycledForCausalLM.register_for_auto_class("AutoModelForCausalLM")
