"""Tokenizers: loading what comes with a model, and a small one for models trained from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Conversations of models that bring no template of their own.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "<|endoftext|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a Hugging Face directory, or of a `.gguf` file (slower: seconds).

    Raises:
        ValueError: No tokenizer there.
    """
    from transformers import AutoTokenizer

    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        return AutoTokenizer.from_pretrained(str(path))
    except Exception as error:  # transformers raises many types, some only for a missing file
        raise ValueError(
            f"{path}: no usable tokenizer ({type(error).__name__}: {error}). Put tokenizer.json (or "
            "tokenizer.model) and tokenizer_config.json beside the model."
        ) from error


def train_small_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer trained on `texts`; deterministic, a few seconds per megabyte.

    Args:
        texts: Training text.
        vocab_size: Entries, including 256 bytes and one end-of-text token.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(
        texts, vocab_size=vocab_size, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trainer._tokenizer,
        eos_token="<|endoftext|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
