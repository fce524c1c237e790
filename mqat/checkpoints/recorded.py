"""Logits of a small fixed batch, as the model that was saved computed them.

A file of a checkpoint, so that whoever rebuilds the model from its description can tell whether it is
the same one. Layouts change no more than rounding: `mqat.verify.agreement` says how far that goes.

| tensor      | shape     | dtype   |                                                    |
|-------------|-----------|---------|----------------------------------------------------|
| `tokens`    | [1, s]    | int64   | fixed ids, so that no tokenizer is needed          |
| `positions` | [p]       | int64   | where logits are kept: a few of the sequence       |
| `logits`    | [1, p, V] | float32 | of the model with its quantizers, without padding  |
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mqat.errors import UserError

RECORDED = "recorded_logits.safetensors"
_NUM_TOKENS, _EVERY = 64, 4


@dataclass(frozen=True)
class RecordedLogits:
    """The tensors of the table above, and the dtype in which the model computed them."""

    tokens: Tensor
    positions: Tensor
    logits: Tensor
    dtype: torch.dtype

    def save(self, directory: Path) -> None:
        """Writes the file."""
        tensors = {"tokens": self.tokens, "positions": self.positions, "logits": self.logits}
        about = {"dtype": str(self.dtype).removeprefix("torch.")}
        save_file(
            {n: t.contiguous() for n, t in tensors.items()}, directory / RECORDED, metadata=about
        )


def fixed_batch(vocab_size: int, longest: int) -> tuple[Tensor, Tensor]:
    """Tokens and positions of the table above, for a model with sequences up to `longest`."""
    length = min(_NUM_TOKENS, longest)
    tokens = torch.arange(length) * 7919 % vocab_size
    return tokens[None], torch.arange(min(_EVERY, length) - 1, length, _EVERY)


def read_recorded(checkpoint: Path) -> RecordedLogits | None:
    """What was recorded; None: nothing, as in imported checkpoints and older ones.

    Raises:
        UserError: The file is damaged.
    """
    file = checkpoint / RECORDED
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as handle:
            dtype = getattr(torch, handle.metadata()["dtype"])
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        return RecordedLogits(**tensors, dtype=dtype)
    except (SafetensorError, OSError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error}); use another checkpoint.") from error
