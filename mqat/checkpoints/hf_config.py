"""A Hugging Face `config.json` read as a decoder; what it says and mqat does not honour is refused.

Sources: transformers 5.24 and 4.57, `configuration_utils.py`, `modeling_rope_utils.py` and
`models/{llama,mistral,qwen2,qwen3}`. What the two versions read differently is refused.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from mqat.errors import UserError
from mqat.models.decoder import FAMILIES, DecoderConfig, check_window
from mqat.models.family import Family, Mixture

# Read by the functions below.
_UNDERSTOOD = {
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "max_position_embeddings", "tie_word_embeddings", "layer_types",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
# Of mixtures of experts.
_MIXTURE = {"num_experts_per_tok", "router_aux_loss_coef"}
_COUNTS = ("num_experts", "num_local_experts")  # transformers 5 takes either for all families
# No model here computes anything with them.
_HARMLESS = {
    # configuration_utils.PreTrainedConfig: where a file comes from, what a call returns, kinds of tasks
    "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "torch_dtype", "dtype",
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
    "partial_rotary_factor": (1,), "rope_interleaved": (False,), "use_mrope": (False,),
    "attention_bias": (False,), "mlp_bias": (False,), "bias": (False,), "qkv_bias": (False,),
    "use_sliding_window": (False,), "is_encoder_decoder": (False,), "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,), "pruned_heads": ({},), "chunk_size_feed_forward": (0,),
    "qk_layernorm": (False,), "use_qk_norm": (False,),
    "router_jitter_noise": (0,), "output_router_logits": (False,),
}  # fmt: skip
_WAYS_OUT = {
    "quantization_config": "the weights are quantized; import the unquantized model",
    "auto_map": "the model brings code of its own, which is not run; remove the key if it is plain",
}
_FACTORS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# modeling_rope_utils: read for `yarn` and `longrope` only.
_OTHER_ROPE = {
    "truncate", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "finetuned",
}  # fmt: skip


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
    heads = _whole(hf, "num_attention_heads")
    hidden, layers = _whole(hf, "hidden_size"), _whole(hf, "num_hidden_layers")
    longest = _whole(hf, "max_position_embeddings")
    # null means the default of Llama; where the key is absent, others have defaults of their own.
    optional = family.name == "llama"
    groups = _whole(hf, "num_key_value_heads", heads, may_be_absent=optional)
    head_dim = _whole(hf, "head_dim", None if family.head_dim_is_stated else hidden // heads)
    _check_window(family, hf, layers, longest)
    theta, scaling = _rope(hf)
    vocab = _whole(hf, "vocab_size")
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=_whole(hf, "intermediate_size"),
        num_layers=layers,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        rms_norm_eps=_positive(hf, "rms_norm_eps", kinds=float),  # transformers 5 takes no integer
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=longest,
        tie_word_embeddings=_flag(hf, "tie_word_embeddings"),
        family=family.name,
        biases=family.biases_of({key: _flag(hf, key) for key in family.bias_switches}),
        token_ids=token_ids(hf, vocab),
        **_experts(family, hf),
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
    own: set[str | None] = {*family.bias_switches}
    if window is not None:
        own |= {"sliding_window", window.switch}
    mixture = family.mixture
    if mixture is not None:
        own |= {*_COUNTS, mixture.size, mixture.normalizes, *_MIXTURE}
        _check_everywhere(hf, mixture)
        own |= mixture.is_everywhere.keys()
    for key, value in hf.items():
        if value is None or key in _UNDERSTOOD or key in own or key in _HARMLESS:
            continue
        if not any(value == neutral for neutral in _NEUTRAL.get(key, ())):
            usual = " or ".join(map(repr, _NEUTRAL.get(key, ()))) or "its absence"
            way_out = _WAYS_OUT.get(key, f"supported is {usual}, which must be the same model")
            raise UserError(f"config.json: {key}={value!r} is not honoured: {way_out}.")
    names = hf.get("architectures")
    wanted = family.hf_architecture
    known = isinstance(names, list) and [str(n).lower() for n in names] == [wanted.lower()]
    if names is not None and not known:
        raise UserError(
            f"config.json: architectures={names!r}, model_type={family.name!r}: only {wanted} is read."
        )
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act={hf['hidden_act']!r}: only 'silu' is supported.")


def _check_everywhere(hf: Mapping[str, Any], mixture: Mixture) -> None:
    for key, value in mixture.is_everywhere.items():
        if hf.get(key, value) not in (value, None):
            raise UserError(
                f"config.json: {key}={hf[key]!r} leaves layers without experts; only models with experts "
                f"in every layer are built ({key}={value!r})."
            )


def _experts(family: Family, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The description's fields about experts; empty for dense models."""
    mixture = family.mixture
    if mixture is None:
        return {}
    normalizes = True
    if mixture.normalizes is not None:
        normalizes = _flag(hf, mixture.normalizes)
    counts = {key: hf[key] for key in _COUNTS if hf.get(key) is not None}
    if len(set(map(str, counts.values()))) > 1:
        raise UserError(f"config.json: {counts} contradict each other; keep the one that is meant.")
    coefficient = hf.get("router_aux_loss_coef", 0.0)
    if coefficient != 0:
        coefficient = _positive(hf, "router_aux_loss_coef")
    return {
        "num_experts": _whole(hf, next(iter(counts), mixture.count)),
        "experts_per_token": _whole(hf, "num_experts_per_tok"),
        "expert_intermediate_size": _whole(hf, mixture.size),
        "normalizes_expert_weights": normalizes,
        "router_aux_loss_coef": float(coefficient),
    }


def _check_window(family: Family, hf: Mapping[str, Any], layers: int, longest: int) -> None:
    """Refuses a sliding window that a sequence could be longer than."""
    types = hf.get("layer_types")
    if types is not None and types != ["full_attention"] * layers:
        raise UserError(
            f"config.json: layer_types={types!r}, num_hidden_layers={layers}: only full_attention in "
            "every layer is supported."
        )
    window = family.window
    if window is None or (types is not None and window.first_layer is not None):
        return
    if window.switch is not None and not _flag(hf, window.switch):
        return
    if window.first_layer is not None:
        key, default = window.first_layer
        if _whole(hf, key, default, least=0) >= layers:
            return
    if hf.get("sliding_window", window.default) is not None:
        check_window(_whole(hf, "sliding_window", window.default), longest)


def _rope(hf: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base, and the scaling in one spelling: `rope_type` and the four factors; None: not scaled."""
    names = ("rope_scaling", "rope_parameters")
    given = {key: hf[key] for key in names if hf.get(key) not in (None, {})}
    scalings = [_scaling(key, value) for key, value in given.items()]
    bases = [v for v in (hf, *given.values()) if "rope_theta" in v]
    thetas = {_positive(where, "rope_theta") for where in bases}
    if len(thetas) > 1 or any(scaling != scalings[0] for scaling in scalings):
        told = given | ({"rope_theta": hf["rope_theta"]} if "rope_theta" in hf else {})
        raise UserError(
            f"config.json: {told} contradict each other, and versions of transformers differ in which "
            "they follow; keep the one that is meant."
        )
    return next(iter(thetas), 10000.0), scalings[0] if scalings else None


def _scaling(key: str, rope: Any) -> dict[str, Any] | None:
    if not isinstance(rope, Mapping):
        raise UserError(f"config.json: {key}={rope!r}: must be an object or null.")
    kinds = [rope[word] for word in ("rope_type", "type") if rope.get(word) is not None]
    kind = kinds[0] if kinds else "default"
    if kind not in ("default", "llama3") or any(other != kind for other in kinds):
        found = " and ".join(map(repr, kinds))
        raise UserError(f"rope_type={found}: only 'default' and 'llama3' are supported.")
    factors = _FACTORS if kind == "llama3" else ()
    for word, value in rope.items():
        is_known = word in {"rope_type", "type", "rope_theta", *factors, *_OTHER_ROPE}
        if (
            not is_known
            and value is not None
            and not (word == "partial_rotary_factor" and value == 1)
        ):
            raise UserError(
                f"config.json: {key}.{word}={value!r} is not honoured for rope_type {kind!r}."
            )
    if kind == "default":
        return None
    numbers = {word: _positive(rope, word, f"{key}.") for word in _FACTORS}
    if numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise UserError(f"config.json: {key}.high_freq_factor must be above low_freq_factor.")
    return {"rope_type": "llama3"} | {word: rope[word] for word in _FACTORS}


def is_whole(value: Any, least: int) -> TypeGuard[int]:
    """Whether it is an integer of at least that."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_positive(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number above zero."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0


def _whole(
    hf: Mapping[str, Any],
    key: str,
    default: int | None = None,
    *,
    may_be_absent: bool = True,
    least: int = 1,
) -> int:
    """An integer; `default`, if there is one, where the key is null or may be absent."""
    value = hf.get(key)
    if value is None and default is not None and (key in hf or may_be_absent):
        value = default
    if not is_whole(value, least):
        found = repr(value) if key in hf else "missing"
        raise UserError(f"config.json: {key} is {found}, must be an integer of at least {least}.")
    return value


def _positive(
    given: Mapping[str, Any], key: str, prefix: str = "", *, kinds: Any = int | float
) -> float:
    value = given.get(key)
    if not isinstance(value, kinds) or not is_positive(value):
        found = repr(value) if key in given else "missing"
        raise UserError(f"config.json: {prefix}{key} is {found}, must be a positive number.")
    return float(value)


def _flag(hf: Mapping[str, Any], key: str) -> bool:
    value = hf.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"config.json: {key} is {value!r}, must be true or false.")
    return value
