"""Rotary positions: how fast the pairs of channels of a head turn, and Megatron's embedding with that.

| rope_type  | frequencies                                             | cosine and sine times          |
|------------|---------------------------------------------------------|--------------------------------|
| (none)     | base^(-2i/d)                                            | 1                              |
| `linear`   | / factor                                                | 1                              |
| `dynamic`  | a larger base, in rows beyond `max_position_embeddings` | 1                              |
| `llama3`   | slow ones / factor, fast ones as they are               | 1                              |
| `yarn`     | likewise, with bounds in channels                       | 1 + ln(factor) / 10, or stated |
| `longrope` | / `short_factor`, in rows beyond the original length    | by the factor, or stated       |
|            | / `long_factor`; one number for each pair               |                                |

A sequence's length is that of its row: documents packed in one are served as one prompt of that length
would be. Runs refuse rows beyond `max_position_embeddings`, up to which `dynamic` changes nothing.

Sources: transformers 5.24 `modeling_rope_utils.py`; YaRN, arXiv:2309.00071; LongRoPE, arXiv:2402.13753;
Megatron-Core 0.16 to 0.19 `models/common/embeddings/{rotary,yarn_rotary}_pos_embedding.py`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from torch import Tensor

from mqat.models.decoder import DecoderConfig
from mqat.transfer import to_device

_ORIGINAL = "original_max_position_embeddings"
# What Megatron's RotaryEmbedding._apply_scaling hard-codes besides the factor.
MEGATRON_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, _ORIGINAL: 8192}


def frequencies(model: DecoderConfig, length: int = 1, *, is_windowed: bool = False) -> Tensor:
    """Radians a token, of each pair of rotated channels.

    Args:
        model: Its sizes, base and scaling.
        length: Tokens of the sequence.
        is_windowed: Of the layers with a window, where these have a base of their own.

    Returns:
        float32 [rotated channels / 2] on the CPU.
    """
    size, longest = model.rotary_channels, model.max_position_embeddings
    base, scaling = model.rope_theta, model.rope_scaling or {}
    if is_windowed and model.windowed_rope_theta is not None:
        base, scaling = model.windowed_rope_theta, {}
    kind, factor = scaling.get("rope_type"), scaling.get("factor", 1.0)
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    if kind == "dynamic" and length > longest:
        base *= (factor * length / longest - (factor - 1)) ** (size / (size - 2))
    plain = 1.0 / base**exponents
    if kind == "linear":
        return plain / factor
    if kind == "llama3":
        turns = scaling[_ORIGINAL] / (2 * math.pi / plain)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * plain / factor + kept * plain
    if kind == "yarn":
        kept = _yarn_kept(scaling, size, base, longest)
        return plain / factor * (1 - kept) + plain * kept
    if kind == "longrope":
        name = "long_factor" if length > scaling[_ORIGINAL] else "short_factor"
        return 1.0 / (torch.tensor(scaling[name], dtype=torch.float32) * base**exponents)
    return plain


def switching_length(model: DecoderConfig) -> int | None:
    """Tokens of a sequence beyond which all of it turns otherwise (LongRoPE); None: never."""
    scaling = model.rope_scaling or {}
    return int(scaling[_ORIGINAL]) if scaling.get("rope_type") == "longrope" else None


def _yarn_kept(scaling: Mapping[str, Any], size: int, base: float, longest: int) -> Tensor:
    """How much of each frequency stays unscaled, from 1 (fast) to 0 (slow), [size / 2]."""
    original = scaling.get(_ORIGINAL, longest)

    def pair_of(turns: float) -> float:
        """The pair, of size / 2, that turns so often within the original length."""
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = (
        pair_of(scaling.get(key, default)) for key, default in (("beta_fast", 32), ("beta_slow", 1))
    )
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    width = last - first if last != first else 0.001
    return 1 - ((torch.arange(size // 2, dtype=torch.float32) - first) / width).clamp(0, 1)


def attention_factor(model: DecoderConfig) -> float:
    """What rotated queries and keys are multiplied by, each."""
    scaling = model.rope_scaling or {}
    kind, stated = scaling.get("rope_type"), scaling.get("attention_factor")
    if kind not in ("yarn", "longrope") or stated is not None:
        return stated if kind in ("yarn", "longrope") and stated is not None else 1.0
    if kind == "longrope":
        original = scaling[_ORIGINAL]
        factor = scaling.get("factor") or model.max_position_embeddings / original
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0

    def grown(by: float) -> float:
        return 0.1 * by * math.log(scaling["factor"]) + 1 if scaling["factor"] > 1 else 1.0

    own, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return grown(own) / grown(all_dim) if own and all_dim else grown(1)


def set_attention_factor_(config: Any, factor: float) -> None:
    """Tells Megatron's attention, which reads YaRN's parameters from its configuration.

    Of `yarn_rotary_scaling_factor` f, `yarn_mscale` m and `yarn_mscale_all_dim` a it takes
    (0.1 m ln(f) + 1) / (0.1 a ln(f) + 1): here 1 + m, as ln(f) is 10 and a is 0.
    """
    if factor != 1:
        config.yarn_rotary_scaling_factor = math.exp(10)
        config.yarn_mscale, config.yarn_mscale_all_dim = factor - 1, 0.0


def built_attention_factor(config: Any) -> float:
    """The inverse: what Megatron's attention makes of its configuration."""
    return float(_yarn_get_concentration_factor_from_config(config))


class DecoderRotary(RotaryEmbedding):  # type: ignore[misc]
    """Megatron's rotary embedding with the frequencies of a model.

    Where windowed layers have a base of their own, the last dimension holds the angles of the other
    layers and then theirs (`specs/window.py` has the attention that takes its half).

    Attributes:
        model: Its description.
        inv_freq: Of sequences of the original length and of layers without a window, float32.
    """

    def __init__(self, model: DecoderConfig, config: Any, cp_group: Any) -> None:
        super().__init__(
            kv_channels=model.head_dim,
            rotary_percent=model.rotary_fraction,
            rotary_interleaved=config.rotary_interleaved,
            rotary_base=model.rope_theta,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=cp_group,
        )
        self.model = model
        self.inv_freq: Tensor = frequencies(model).to(torch.cuda.current_device())

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles [s, 1, 1, rotated channels], or twice as many channels."""
        device = torch.cuda.current_device()
        places = torch.arange(max_seq_len, device=device, dtype=torch.float32) + offset
        kinds = (False,) if self.model.windowed_rope_theta is None else (False, True)
        found = []
        for is_windowed in kinds:
            rates = frequencies(self.model, max_seq_len + offset, is_windowed=is_windowed)
            angles = torch.outer(places, to_device(rates, places.device))
            if self.rotary_interleaved:
                found.append(angles.repeat_interleave(2, dim=-1))
            else:
                found.append(torch.cat([angles, angles], dim=-1))
        return torch.cat(found, dim=-1)[:, None, None, :]
