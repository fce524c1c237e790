"""Positions and attention in a TensorRT-LLM `config.json`; what its classes do not compute is refused.

Sources: TensorRT-LLM `models/{llama,qwen,gemma}/config.py`, `functional.py` (RotaryScalingType),
`layers/attention.py`.
"""

from typing import Any

from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.models.hf_keys import positions_to_hf

_SCALINGS = ("linear", "dynamic", "llama3")


def position_fields(model: DecoderConfig) -> dict[str, Any]:
    """Keys of rotary positions.

    Raises:
        UserError: The model has a scaling or a window that the checkpoint format cannot say.
    """
    family = model.architecture
    if family.positions is not None:
        return {"position_embedding_type": "learned_absolute"}
    scaling = dict(model.rope_scaling or {})
    kind = scaling.pop("rope_type", None)
    window, longest = model.sliding_window, model.max_position_embeddings
    told, pattern = _attention_keys(model), _pattern(model)
    is_told = "sliding_window" in told and pattern is not None
    unsaid = {
        f"rope_scaling of type {kind!r}": kind is not None and kind not in _SCALINGS,
        f"sliding_window={window} with sequences of up to {longest} tokens": (
            window is not None and window < longest and not is_told
        ),
        "rope_scaling of the layers without a window only": (
            kind is not None and model.windowed_rope_theta is not None
        ),
        f"rotary_fraction={model.rotary_fraction:g}": (
            model.rotary_fraction != 1 and family.trtllm_fraction is None
        ),
    }
    for what, is_unsaid in unsaid.items():
        if is_unsaid:
            raise UserError(
                f"export.format=trtllm: {what} has no key in a checkpoint of a {model.family} model, "
                "which TensorRT-LLM would compute differently; use export.format=hf."
            )
    if family.trtllm_fraction is not None:
        told[family.trtllm_fraction] = model.rotary_fraction
    if "sliding_window" in told:  # under both names, of earlier and of later releases
        told |= dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern"), pattern)
    return told | {
        "position_embedding_type": (
            "rope_gptj" if family.is_rotary_interleaved else "rope_gpt_neox"
        ),
        "rotary_base": model.rope_theta,
        "rotary_scaling": {"type": kind, **scaling} if kind else None,
    }


def _attention_keys(model: DecoderConfig) -> dict[str, Any]:
    """What TensorRT-LLM calls as Hugging Face does."""
    hf = positions_to_hf(model)
    told = {key: hf.get(key) for key in model.architecture.trtllm_attention}
    if "sliding_window" in told:  # Hugging Face wants a number even where no layer has the window
        told["sliding_window"] = model.sliding_window
    if "rope_local_base_freq" in told and model.windowed_rope_theta is None:
        told["rope_local_base_freq"] = model.rope_theta
    return told


def _pattern(model: DecoderConfig) -> int | None:
    """The n of which each n-th layer has no window and all others have one; None: none fits."""
    layers = range(model.num_layers)
    return next(
        (
            n
            for n in range(1, model.num_layers + 2)
            if tuple(i for i in layers if (i + 1) % n) == model.windowed_layers
        ),
        None,
    )
