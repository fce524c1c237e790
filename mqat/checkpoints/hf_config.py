"""A Hugging Face `config.json` read as a decoder; what it says and mqat does not honour is refused.

Sources: transformers 5.24 and 4.57, `configuration_utils.py` and `models/*/configuration_*.py`.
What the two versions read differently is refused. Positions are `hf_positions`' part.
"""

from collections.abc import Mapping
from typing import Any

from mqat.checkpoints.hf_positions import positions
from mqat.checkpoints.values import MOST_LISTED, Told, is_whole
from mqat.checkpoints.values import flag as _flag
from mqat.checkpoints.values import positive as _positive
from mqat.checkpoints.values import whole as _whole
from mqat.errors import UserError
from mqat.models.decoder import FAMILIES, DecoderConfig
from mqat.models.family import Family, Mixture

# Read by the functions below.
_UNDERSTOOD = {
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "max_position_embeddings", "tie_word_embeddings", "layer_types",
    "partial_rotary_factor", "original_max_position_embeddings", "bos_token_id", "eos_token_id",
    "pad_token_id",
}  # fmt: skip
# Of mixtures of experts.
_MIXTURE = {"num_experts_per_tok", "router_aux_loss_coef"}
_COUNTS = ("num_experts", "num_local_experts")  # transformers 5 takes either for all families
# No model here computes anything with them.
_HARMLESS = {
    # configuration_utils.PreTrainedConfig: where a file comes from, what a call returns, kinds of tasks
    "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "torch_dtype", "dtype",
    "_model_name_or_path", "unk_token_id",  # left over from a GGUF file that transformers loaded
    "use_cache", "return_dict", "output_hidden_states", "output_attentions", "torchscript",
    "use_bfloat16", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
    "task_specific_params", "tokenizer_class", "prefix", "sep_token_id", "is_decoder",
    "cross_attention_hidden_size", "tf_legacy_loss", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "_flash_attn_2_enabled",
    # weights before training; the same product in slices (4), not read (5); where windows begin
    "initializer_range", "initializer_factor", "pretraining_tp", "max_window_layers",
    # generation/configuration_utils.GenerationConfig: 4 hands them on to `generate`, 5 ignores them here
    "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "num_return_sequences", "temperature", "top_k", "top_p", "min_p", "typical_p",
    "repetition_penalty", "length_penalty", "diversity_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id", "output_scores",
    "return_dict_in_generate", "remove_invalid_values", "exponential_decay_length_penalty",
    # written by others, read by nobody: SmolLM, transformers.js, Unsloth, old tokenizers, ourselves
    "is_llama_config", "transformers.js_config", "unsloth_version", "unsloth_fixed",
    "max_sequence_length", "producer",
}  # fmt: skip
# Would change what is computed, or what training means, with any other value.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0,), "hidden_dropout": (0,), "resid_pdrop": (0,), "embd_pdrop": (0,),
    "rope_interleaved": (False,), "use_mrope": (False,),
    "attention_bias": (False,), "mlp_bias": (False,), "bias": (False,), "qkv_bias": (False,),
    "use_sliding_window": (False,), "is_encoder_decoder": (False,), "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,), "pruned_heads": ({},), "chunk_size_feed_forward": (0,),
    "qk_layernorm": (False,), "use_qk_norm": (False,), "use_bidirectional_attention": (False,),
    "router_jitter_noise": (0,), "output_router_logits": (False,),
}  # fmt: skip
_WAYS_OUT = {
    "quantization_config": "the weights are quantized; import the unquantized model",
    "auto_map": "the model brings code of its own, which is not run; remove the key if it is plain",
}


def decoder_config(hf: Any) -> DecoderConfig:
    """The model that a parsed `config.json` describes, in the spellings of transformers 4 and 5.

    Raises:
        UserError: Not one of `FAMILIES`; a key that is missing, of the wrong type, contradicts another,
            or changes the model in a way that is not built.
    """
    if not isinstance(hf, Mapping):
        raise UserError(f"config.json: expected a JSON object, found {type(hf).__name__}.")
    name = hf.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise UserError(
            f"model_type={name!r}: supported are {', '.join(FAMILIES)}; convert the checkpoint to "
            "LlamaForCausalLM if it is equivalent."
        )
    _check_keys(hf, family)
    hf = Told(hf, family.hf_keys, family.hf_defaults)
    heads = _whole(hf, "num_attention_heads")
    hidden, layers = _whole(hf, "hidden_size"), _whole(hf, "num_hidden_layers", most=MOST_LISTED)
    # null means the default of Llama; where the key is absent, others have defaults of their own.
    optional = family.may_omit_groups
    groups = _whole(hf, "num_key_value_heads", heads, may_be_absent=optional)
    head_dim = _whole(hf, "head_dim", None if family.head_dim_is_stated else hidden // heads)
    vocab = _whole(hf, "vocab_size")
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=_whole(hf, "intermediate_size", family.inner_default(hidden)),
        num_layers=layers,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        rms_norm_eps=_positive(hf, "rms_norm_eps", kinds=float),  # transformers 5 takes no integer
        max_position_embeddings=_whole(hf, "max_position_embeddings"),
        tie_word_embeddings=_flag(hf, "tie_word_embeddings"),
        family=family.name,
        biases=family.biases_of({key: _flag(hf, key) for key in family.bias_switches}),
        token_ids=token_ids(hf, vocab),
        **positions(family, hf, layers, head_dim),
        **_experts(family, hf, layers),
    )


def token_ids(given: Mapping[str, Any], vocab_size: int) -> dict[str, int | list[int]]:
    """The ids with which a model begins, ends and pads, as far as `given` has them; -1 means none.

    Raises:
        UserError: One is no integer (the end: nor a list of them), or has no row in the vocabulary.
    """
    found: dict[str, int | list[int]] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = given.get(key)
        if value is None or value == -1:
            continue
        several = value if isinstance(value, list) and key.startswith("eos") else [value]
        if not several or not all(is_whole(v, 0) and v < vocab_size for v in several):
            raise UserError(f"{key}={value!r}: not a token of a vocabulary of {vocab_size}.")
        found[key] = value
    return found


def _check_keys(hf: Mapping[str, Any], family: Family) -> None:
    """Refuses what no line of this module, and no model in transformers, knows to be harmless."""
    window = family.window
    own: set[str | None] = {
        *family.bias_switches, *family.attention, *family.hf_keys.values(), *family.hf_harmless
    }  # fmt: skip
    understood = _UNDERSTOOD - family.hf_keys.keys()
    if window is not None:
        own |= {"sliding_window", window.switch, window.every and window.every[0]}
    mixture = family.mixture
    if mixture is not None:
        own |= {*mixture.keys, *_MIXTURE}
        own |= {*_COUNTS} if mixture.count in _COUNTS else set()
    own |= {family.head_norms_switch, family.hf_further_layers}
    fixed = {key: (value,) for key, value in {**family.hf_extra, **family.hf_fixed}.items()}
    neutral = _NEUTRAL | fixed
    for key, value in hf.items():
        if value is None or key in understood or key in own or key in _HARMLESS:
            continue
        if not any(value == known for known in neutral.get(key, ())):
            usual = " or ".join(map(repr, neutral.get(key, ()))) or "its absence"
            way_out = _WAYS_OUT.get(key, f"supported is {usual}, which must be the same model")
            raise UserError(f"config.json: {key}={value!r} is not honoured: {way_out}.")
    names = hf.get("architectures")
    wanted = family.hf_architecture
    known = isinstance(names, list) and [str(n).lower() for n in names] == [wanted.lower()]
    if names is not None and not known:
        raise UserError(
            f"config.json: architectures={names!r}, model_type={family.name!r}: only {wanted} is read."
        )
    word = family.hf_keys.get("hidden_act", "hidden_act") or "hidden_act"
    activation = hf.get(word, family.hf_activations[0])
    if activation not in family.hf_activations:
        words = " and ".join(map(repr, family.hf_activations))
        raise UserError(
            f"{word}={activation!r}: only {words} is supported for a {family.name} model."
        )


def _experts(family: Family, hf: Told, layers: int) -> dict[str, Any]:
    """The description's fields about experts; empty for dense models."""
    mixture = family.mixture
    if mixture is None:
        return {}
    names = _COUNTS if mixture.count in _COUNTS else (mixture.count,)
    counts = {key: hf[key] for key in names if hf.get(key) is not None}
    if len(set(map(str, counts.values()))) > 1:
        raise UserError(f"config.json: {counts} contradict each other; keep the one that is meant.")
    coefficient = hf.get("router_aux_loss_coef", 0.0)
    if coefficient != 0:
        coefficient = _positive(hf, "router_aux_loss_coef")
    switch, size = family.head_norms_switch, _whole(hf, mixture.size)
    found: dict[str, Any] = {
        "num_experts": _whole(hf, next(iter(counts), mixture.count), most=MOST_LISTED),
        "experts_per_token": _whole(hf, "num_experts_per_tok"),
        "expert_intermediate_size": size,
        "normalizes_expert_weights": mixture.normalizes is None or _flag(hf, mixture.normalizes),
        "router_aux_loss_coef": float(coefficient),
        "normalizes_heads": switch is None or _flag(hf, switch),
        "dense_layers": _dense_layers(hf, mixture, layers),
    }
    if mixture.shared_size is not None:
        found["shared_intermediate_size"] = _whole(hf, mixture.shared_size)
    if mixture.shared_count is not None:
        found["shared_intermediate_size"] = _whole(hf, mixture.shared_count) * size
    if mixture.scaling is not None:
        found["expert_weight_scale"] = _positive(hf, mixture.scaling)
    if mixture.groups is not None:
        names = ("expert_groups", "expert_groups_per_token")
        found |= {name: _whole(hf, key) for name, key in zip(names, mixture.groups, strict=True)}
    return found


def _dense_layers(hf: Told, mixture: Mixture, layers: int) -> list[int]:
    """Layers without experts."""
    dense = mixture.dense
    if dense is None:
        return []
    if dense.first is not None:
        return list(range(min(_whole(hf, dense.first, least=0), layers)))
    assert dense.listed is not None and dense.step is not None, "there is one way or the other"
    listed, step = hf.get(dense.listed) or [], _whole(hf, dense.step, 1)
    if not isinstance(listed, list) or not all(is_whole(x, 0) and x < layers for x in listed):
        raise UserError(
            f"config.json: {dense.listed}={listed!r}: must be a list of numbers of {layers} layers."
        )
    return [layer for layer in range(layers) if layer in listed or (layer + 1) % step]
