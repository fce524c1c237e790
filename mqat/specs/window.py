"""Layers whose attention differs: sliding windows, and rotary positions of their own.

Megatron's configuration has the window's size and which layers have it; its own core attention,
Transformer Engine's and `backend.SdpaAttention` read it there.
"""

from typing import Any

from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig


def window_fields(model: DecoderConfig) -> dict[str, Any]:
    """Fields of Megatron's configuration: how many tokens before a query it looks at, and where."""
    if model.sliding_window is None:
        return {}
    flags = [int(layer in model.windowed_layers) for layer in range(model.num_layers)]
    return {"window_size": (model.sliding_window - 1, 0), "window_attn_skip_freq": flags}


def window_of(config: Any, layer_number: int) -> int | None:
    """Tokens that a query of a layer (from 1) attends to, itself included; None: all before it.

    Raises:
        UserError: The window reaches to later tokens.
    """
    if not is_layer_window_attention(
        config.window_size, config.window_attn_skip_freq, layer_number
    ):
        return None
    before, after = config.window_size
    if before < 0 or after != 0:
        raise UserError(
            f"window_size={config.window_size}: attention is causal, so it must be (tokens before a "
            "query, 0)."
        )
    return int(before) + 1


def built_windows(config: Any) -> tuple[int | None, tuple[int, ...]]:
    """The window of a configuration, and the layers (from 0) that have it; (None, ()): none has."""
    sizes = [window_of(config, layer + 1) for layer in range(config.num_layers)]
    layers = tuple(layer for layer, size in enumerate(sizes) if size is not None)
    return (sizes[layers[0]] if layers else None), layers


def with_own_positions(attention: type, is_windowed: bool) -> type:
    """A self-attention that takes its half of the angles of `rope.DecoderRotary`.

    A subclass, so that checkpoints keep their names.

    Args:
        attention: Megatron's `SelfAttention`, or like it.
        is_windowed: It takes the second half, that of layers with a window.
    """

    class OwnPositions(attention):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> Any:
            """As Megatron's, of angles [s, 1, 1, 2 x rotated channels]."""
            own = rotary_pos_emb.chunk(2, dim=-1)[int(is_windowed)]
            return super().forward(*args, rotary_pos_emb=own, **kwargs)

    return OwnPositions
