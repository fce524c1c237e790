"""Keys and values kept while text is generated: what a rank's layers hold of the tokens before.

Megatron's own inference context keeps keys as they are before rotation, rotates all of them again for
every token, wants all rows of a batch at one position, and knows neither quantized caches nor this
package's positions. Here `backend.SdpaAttention` itself keeps what servers keep:

    keys after rotation, values   [b, capacity, groups of this rank, d], in the model's dtype, or codes
                                  of one byte where the layer's cache is quantized and calibrated

Rows are padded on the right and stand at positions of their own. What padding writes lies behind a row's
last token, is looked at by none of its tokens, and is overwritten by the next pass.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mqat.quant.functional import dequantize, quantize
from mqat.quant.quantizer import Quantizer
from mqat.specs.causal import capped_attention, document_attention, masked_attention


class Rows:
    """Where the rows of a batch stand; the same object for all layers.

    Attributes:
        starts: int64 [b], tokens that each row holds before this pass.
        width: Tokens of this pass, with padding.
        counts: int64 [b], tokens of this pass, without padding.
        is_first: No row holds any.
        capacity: Tokens that a row may hold, with padding.
    """

    def __init__(self, count: int, capacity: int) -> None:
        self.capacity, self.width = capacity, 0
        self.starts = self.counts = torch.zeros(count, dtype=torch.int64)
        self.is_first, self._end = True, 0
        self._masks: dict[int | None, tuple[int, Tensor]] = {}

    def begin(self, starts: Sequence[int], counts: Sequence[int], width: int) -> None:
        """The next pass: `width` tokens behind `starts` of each row, `counts` of them no padding."""
        self.is_first, self.width = not any(starts), width
        self._end = max(starts) + width
        assert self._end <= self.capacity, f"{self._end} tokens in a cache for {self.capacity}"
        here = torch.cuda.current_device()
        self.starts, self.counts = (torch.tensor(x, device=here) for x in (starts, counts))
        self._masks = {}

    def places(self) -> Tensor:
        """Positions of this pass's tokens, int64 [b, width]."""
        return self.starts[:, None] + torch.arange(self.width, device=self.starts.device)

    def lengths(self) -> Tensor:
        """Tokens that each row holds after this pass, int64 [b]."""
        return self.starts + self.counts

    def seen(self, window: int | None) -> tuple[int, Tensor]:
        """The first key that any query looks at, and what each may look at: bool [b, 1, width, keys]."""
        if window not in self._masks:
            first = 0 if window is None else max(int(self.starts.min()) - window + 1, 0)
            keys = torch.arange(first, self._end, device=self.starts.device)
            back = self.places()[:, None, :, None] - keys
            seen = (back >= 0) if window is None else (back >= 0) & (back < window)
            self._masks[window] = first, seen
        return self._masks[window]

    @property
    def end(self) -> int:
        """Tokens that the longest row holds after this pass, with padding."""
        return self._end


class _Store:
    """Keys or values of one layer, as they are or as codes of one byte."""

    def __init__(self, rows: Rows, quantizer: Quantizer | None) -> None:
        self.rows = rows
        is_on = quantizer is not None and quantizer.is_frozen and quantizer.is_enabled
        self.quantizer = quantizer if is_on else None
        self.held: Tensor | None = None

    def write(self, x: Tensor) -> None:
        """Of this pass, [width, b, groups, d]."""
        dtype = x.dtype
        if self.quantizer is not None:
            own = self.quantizer
            x = quantize(x, own.qparams(x)[0], own.format, own.scheme.granularity).view(torch.uint8)
        if self.held is None:
            shape = (x.shape[1], self.rows.capacity, *x.shape[2:])
            self.held, self.dtype = x.new_zeros(shape), dtype
        row = torch.arange(x.shape[1], device=x.device)[:, None]
        self.held[row, self.rows.places()] = x.transpose(0, 1)

    def read(self, first: int) -> Tensor:
        """From the token `first` on, [b, groups, keys, d]."""
        assert self.held is not None, "written in this pass"
        x = self.held[:, first : self.rows.end]
        if self.quantizer is not None:
            own = self.quantizer
            codes = x.contiguous().view(own.format.storage_dtype)
            x = dequantize(codes, own.qparams(codes)[0], own.scheme.granularity, self.dtype)
        return x.transpose(1, 2)

    @property
    def num_bytes(self) -> int:
        """Held on this rank."""
        return 0 if self.held is None else self.held.numel() * self.held.element_size()


class LayerCache:
    """Keys and values of one layer, and attention to them."""

    def __init__(self, rows: Rows, key: Quantizer | None, value: Quantizer | None) -> None:
        self.rows = rows
        self.key, self.value = _Store(rows, key), _Store(rows, value)

    def attend(
        self, q: Tensor, key: Tensor, value: Tensor, *, window: int | None, softcap: float | None,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        """Attention of this pass's queries to all that a row holds by now.

        Args:
            q: [b, heads, width, d].
            key: Of this pass, [width, b, groups, d]; fake-quantized where the cache is quantized.
            value: Likewise.
            window: Keys that a query looks at; None: all up to its own.
            softcap: Of scores.
            **options: `scale`, `dropout_p`.

        Returns:
            [b, heads, width, d].
        """
        self.key.write(key)
        self.value.write(value)
        if self.rows.is_first:
            k, v = (x.permute(1, 2, 0, 3) for x in (key, value))
            whole = [(0, q.shape[2])]
            options |= {"window": window, "softcap": softcap}
            return document_attention(q, k, v, chunks=whole, ends=None, **options)
        first, seen = self.rows.seen(window)
        k, v = self.key.read(first), self.value.read(first)
        if softcap is not None:
            return capped_attention(q, k, v, seen, softcap=softcap, **options)
        return masked_attention(q, k, v, attn_mask=seen, **options)


class RowAngles(nn.Module):
    """In the place of a rotary embedding: the angles of this pass's tokens, each row at its own place.

    Args:
        rotary: Megatron's embedding, or `rope.DecoderRotary`.
        rows: Where rows stand.
        longest: Sequence that the model is for.
        short: Tokens up to which a sequence has frequencies of its own (LongRoPE); None: all alike.
    """

    def __init__(self, rotary: Any, rows: Rows, longest: int, short: int | None) -> None:
        super().__init__()
        self.rows = rows
        last = min(rows.capacity, longest)
        lengths = [last] if short is None or short >= last else [short, last]
        self.tables: list[Tensor] = [rotary.get_emb(length)[:, 0, 0] for length in lengths]

    def get_rotary_seq_len(self, *_: Any, **__: Any) -> int:
        """Megatron asks, and hands it to `forward`, which knows better."""
        return self.rows.end

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """[width, b, 1, channels]."""
        places = self.rows.places()
        # Behind its last token a row may be longer than a table: padding may have any angle.
        found = [table[places.clamp(max=len(table) - 1)] for table in self.tables]
        if len(found) == 1:
            return found[0].transpose(0, 1)[:, :, None]
        is_long = self.rows.lengths() > len(self.tables[0])
        return torch.where(is_long[:, None, None], found[1], found[0]).transpose(0, 1)[:, :, None]
