"""From a model description and a layout to Megatron GPT chunks whose linears can be quantized."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mqat.config import ModelConfig
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.schemes import Scheme, table_schemes
from mqat.models.structure import ACTIVATION, EMBEDDING, EXPERTS, OUTPUT_LAYER
from mqat.parallel.cross_entropy import chunked_cross_entropy
from mqat.parallel.embedding import QuantVocabParallelEmbedding
from mqat.parallel.layout import shard_count
from mqat.parallel.linear import QuantColumnParallelLinear
from mqat.quant.scheme import LinearScheme
from mqat.specs.activations import FUNCTIONS
from mqat.specs.backend import SdpaAttention, gpt_layer_spec
from mqat.specs.config_check import fields_of_experts, layer_pattern, position_word
from mqat.specs.gpt import quantize_block_spec
from mqat.specs.megatron_options import check_switches
from mqat.specs.rope import DecoderRotary, attention_factor, set_attention_factor_
from mqat.specs.slots import spec_slot
from mqat.specs.transformer_engine import core_attention
from mqat.specs.window import window_fields


class DecoderModel(GPTModel):  # type: ignore[misc]
    """`GPTModel` with a model's own rotary positions, and vocabulary padding kept out of the softmax.

    The table is padded so that any valid TP size cuts it evenly; without the mask, padded rows would
    take probability and the loss would differ from the unpadded model's.

    Megatron's layer specs have no place for the vocabulary tables, so that quantized ones are built
    here, in the place of its own.

    Args:
        *args: As for `GPTModel`.
        model: Its description; the vocabulary is without padding there.
        tables: Name of a quantized table -> scheme.
        num_shards: Largest tensor-parallel size of the model.
        chunks_loss: Compute the loss of some tokens at a time.
        **kwargs: As for `GPTModel`.
    """

    def __init__(
        self,
        *args: Any,
        model: DecoderConfig,
        tables: Mapping[str, LinearScheme],
        num_shards: int,
        chunks_loss: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.chunks_loss = chunks_loss
        self.true_vocab_size, self.logit_softcap = model.vocab_size, model.logit_softcap
        scale = torch.tensor(model.embedding_scale, dtype=self.config.params_dtype)
        self.embedding_scale = float(scale)  # rounded, as models are trained
        if self.position_embedding_type == "rope":
            group = self.pg_collection.cp
            self.rotary_pos_emb: Any = DecoderRotary(model, self.config, group)
        common = {"config": self.config, "tp_group": self.pg_collection.tp}
        if self.pre_process and EMBEDDING.name in tables:
            scatters = self.embedding.reduce_scatter_embeddings
            del self.embedding.word_embeddings  # a table may be the model's largest tensor
            self.embedding.word_embeddings = QuantVocabParallelEmbedding(
                self.vocab_size,
                self.config.hidden_size,
                init_method=self.config.embedding_init_method,
                reduce_scatter_embeddings=scatters,
                quantized_name=EMBEDDING.name,
                scheme=tables[EMBEDDING.name],
                **common,
            )
        if self.post_process and OUTPUT_LAYER.name in tables:
            del self.output_layer  # likewise
            self.output_layer: Any = QuantColumnParallelLinear(
                self.config.hidden_size,
                self.vocab_size,
                init_method=self.config.init_method,
                bias=False,
                gather_output=not self.parallel_output,
                quantized_name=OUTPUT_LAYER.name,
                scheme=tables[OUTPUT_LAYER.name],
                num_shards=num_shards,
                **common,
            )
        if tables and (self.pre_process or self.post_process):
            self.setup_embeddings_and_output_layer()
        if self.pre_process and self.position_embedding_type == "learned_absolute":
            self.embedding.position_embeddings.to(self.embedding.word_embeddings.weight)
        if self.pre_process and self.embedding_scale != 1:
            self.embedding.register_forward_hook(lambda _, __, out: out * self.embedding_scale)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As `GPTModel`: per-token loss [b, s] of labels, else logits [b, s, Vp/tp] or hidden states."""
        output: Tensor = super().forward(
            input_ids, position_ids, attention_mask, decoder_input, labels, *args, **kwargs
        )
        return self.capped(output) if self.post_process and labels is None else output

    def capped(self, logits: Tensor) -> Tensor:
        """Logits as the family bounds them: `cap * tanh(logits / cap)`, or as they are."""
        cap = self.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Per-token loss [b, s] from this rank's logits [s, b, Vp/tp]."""
        logits = self.capped(logits)
        columns = logits.shape[-1]
        if self.chunks_loss:
            losses = chunked_cross_entropy(
                logits.flatten(0, 1),
                labels.t().flatten(),
                vocab_size=self.true_vocab_size,
                group=self.pg_collection.tp,
            )
            return losses.view(logits.shape[:2]).t().contiguous()
        first = self.pg_collection.tp.rank() * columns
        if first + columns > self.true_vocab_size:
            column = torch.arange(first, first + columns, device=logits.device)
            logits = logits.masked_fill(column >= self.true_vocab_size, float("-inf"))
        loss: Tensor = super().compute_language_model_loss(labels, logits)
        return loss


def padded_vocab_size(model: DecoderConfig) -> int:
    """Rows of the embedding table: a multiple of every valid TP size, the same on all layouts."""
    multiple = shard_count(model)
    return -(-model.vocab_size // multiple) * multiple


def _check_fusion(model: DecoderConfig, switches: Mapping[str, Any]) -> None:
    fused = [key for key in ("apply_rope_fusion", "fused_single_qkv_rope") if switches.get(key)]
    if fused and attention_factor(model) != 1:
        raise UserError(
            f"config: model.megatron.{fused[0]}=true: fused kernels do not multiply what they rotate, "
            f"by {attention_factor(model):.4g} as this model asks for (rope_scaling="
            f"{(model.rope_scaling or {}).get('rope_type')}); leave it out."
        )


def _switches(virtual: int | None) -> dict[str, Any]:
    """Defaults of what `model.megatron` may set; `virtual`: chunks of an interleaved pipeline."""
    return {
        # Batched messages in both directions between two stages would be taken for one another.
        "overlap_p2p_comm": virtual is not None,
        "batch_p2p_comm": virtual is None,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        # Freeing an output while gloo still sends it would send whatever comes to lie there.
        "deallocate_pipeline_outputs": virtual is None or torch.cuda.is_available(),
    }


def _of_experts(model: DecoderConfig, settings: ModelConfig) -> dict[str, Any]:
    coefficient, mixture = settings.moe_aux_loss_coeff, model.architecture.mixture
    assert mixture is not None, "there are experts"
    return fields_of_experts(model) | {
        "moe_layer_freq": layer_pattern(model),
        # Scores are compared after a correction is added, which is in float32.
        "moe_router_dtype": "fp32" if mixture.experts.router.correction else None,
        "moe_router_bias_update_rate": settings.moe_router_bias_update_rate,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "aux_loss" if coefficient else "none",
        "moe_aux_loss_coeff": coefficient,
        "expert_model_parallel_size": settings.expert_model_parallel_size,
        "expert_tensor_parallel_size": settings.expert_tensor_parallel_size
        or settings.tensor_model_parallel_size,
    }


def transformer_config(
    model: DecoderConfig,
    settings: ModelConfig,
    dtype: torch.dtype,
    *,
    spec_has_activation: bool = True,
) -> TransformerConfig:
    """Megatron's configuration for a decoder.

    `spec_has_activation`: the layer spec says what computes SwiGLU, not Megatron's MLP.

    Raises:
        UserError: An option of `settings.megatron` that is not handed on, that Megatron refuses, or that
            does not fit the model's positions.
    """
    _check_fusion(model, settings.megatron)
    family = model.architecture
    granularity = settings.activations_checkpoint_granularity
    full = granularity == "full"
    virtual = settings.virtual_pipeline_model_parallel_size
    arguments: dict[str, Any] = dict(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization=family.normalization,
        layernorm_zero_centered_gamma=family.zero_centered_gamma,
        layernorm_epsilon=model.rms_norm_eps,
        qk_layernorm=any(norm.size == "head" for norm in model.norms),
        gated_linear_unit=family.is_gated,
        activation_func=FUNCTIONS[family.activation],
        use_te_activation_func=spec_has_activation,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        rotary_interleaved=family.is_rotary_interleaved,
        softmax_scale=model.attention_scale,
        **window_fields(model),
        tensor_model_parallel_size=settings.tensor_model_parallel_size,
        pipeline_model_parallel_size=settings.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=settings.context_parallel_size,
        sequence_parallel=settings.sequence_parallel and settings.tensor_model_parallel_size > 1,
        recompute_granularity=granularity,
        recompute_method="uniform" if full else None,
        recompute_num_layers=settings.activations_checkpoint_num_layers if full else None,
        calculate_per_token_loss=True,
        masked_softmax_fusion=False,
    )
    if model.num_experts:
        arguments |= _of_experts(model, settings)
    check_switches(settings.megatron, settings.ddp)
    try:
        config = TransformerConfig(**arguments | _switches(virtual) | settings.megatron)
    except (AssertionError, TypeError, ValueError) as error:  # Megatron's own checks
        if not settings.megatron:
            raise
        raise UserError(f"config: model.megatron={settings.megatron}: {error}") from error
    set_attention_factor_(config, attention_factor(model))
    return config


def build_model(
    model: DecoderConfig,
    settings: ModelConfig,
    layers: Mapping[str, Scheme],
    dtype: torch.dtype,
    *,
    layer_spec: ModuleSpec | None = None,
    table_rows: int | None = None,
    dense_layer_spec: ModuleSpec | None = None,
    is_packed: bool = False,
) -> list[DecoderModel]:
    """This rank's pipeline chunks, with uninitialized weights and quantizers not yet calibrated.

    Args:
        model: Global sizes.
        settings: Parallel sizes and recompute; process groups must already exist.
        layers: Global name -> scheme (`Policy.resolve`).
        dtype: Of parameters and activations.
        layer_spec: In the place of `gpt_layer_spec()`.
        table_rows: Of vocabulary tables with their padding, where they are to be those of another model;
            None: `padded_vocab_size`.
        dense_layer_spec: Likewise, of a mixture's layers without experts.
        is_packed: Quantized weights are never allocated in floats; `packed_backbone.py` fills them.
    """
    family = model.architecture
    attention = core_attention() if settings.transformer_engine else SdpaAttention
    has_activation = family.activation == "silu" and family.is_gated
    if layer_spec is not None:
        slot = f"{EXPERTS}.activation_func" if model.num_experts else ACTIVATION
        has_activation = has_activation and spec_slot(layer_spec, slot) is not None
    config = transformer_config(model, settings, dtype, spec_has_activation=has_activation)
    spec = layer_spec or gpt_layer_spec(
        model.norms, attention, num_experts=model.num_experts, config=config
    )
    dense_spec = dense_layer_spec
    if model.dense_layers and layer_spec is None:
        dense_spec = dense_spec or gpt_layer_spec(model.norms, attention, config=config)
    virtual = settings.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in range(virtual) if virtual else [None]:
        block_spec = quantize_block_spec(
            spec,
            layers,
            model=model,
            transformer_config=config,
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            vp_stage=vp_stage,
            dense_spec=dense_spec,
            is_packed=is_packed,
        )
        stage = {"ignore_virtual": False, "vp_stage": vp_stage}
        chunk = DecoderModel(
            config,
            block_spec,
            vocab_size=table_rows or padded_vocab_size(model),
            max_sequence_length=model.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**stage),
            post_process=parallel_state.is_pipeline_last_stage(**stage),
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            position_embedding_type=position_word(family),
            rotary_percent=model.rotary_fraction,
            rotary_base=model.rope_theta,
            vp_stage=vp_stage,
            model=model,
            tables=table_schemes(layers),
            num_shards=shard_count(model),
            chunks_loss=settings.chunked_cross_entropy,
        )
        chunks.append(chunk)
    return chunks
