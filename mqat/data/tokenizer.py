"""Tokenizers: loading what comes with a model, and a small one for models trained from scratch."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mqat.errors import UserError

GENERATION_CONFIG = "generation_config.json"
_END = "<|endoftext|>"
# Conversations of models that bring no template of their own.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "<|endoftext|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_SMALLEST_VOCABULARY = 257  # 256 bytes and the end token


def _gguf_file(path: Path) -> Path | None:
    """`path` itself, or the only `.gguf` of a directory without tokenizer files of its own."""
    if path.suffix == ".gguf":
        return path
    has_own = any((path / name).exists() for name in ("tokenizer_config.json", "tokenizer.json"))
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not has_own else []
    return files[0] if len(files) == 1 else None


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a Hugging Face directory (tokenizer.json or SentencePiece) or a GGUF file.

    From GGUF it takes seconds: the `gguf` package parses every vocabulary entry in Python.

    Raises:
        ValueError: No tokenizer there, or one that cannot say which characters a token covers.
    """
    from transformers import AutoTokenizer

    gguf = _gguf_file(path)
    try:
        if not path.exists():  # otherwise transformers takes the path for a name on the model hub
            raise FileNotFoundError("no such file or directory")
        if gguf is not None:
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers raises many types, some only for a missing file
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: no usable tokenizer ({type(error).__name__}: {reason}). Put tokenizer.json "
            "(or tokenizer.model) and tokenizer_config.json beside the model."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"{path}: {type(tokenizer).__name__} has no fast version, so answers cannot be marked; "
            "save the tokenizer as tokenizer.json."
        )
    return tokenizer


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Writes the files that `load_tokenizer` reads into `directory`, which is created.

    The generation settings beside the tokenizer's own files come along: they say where a model stops.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(directory))
    settings = Path(tokenizer.name_or_path) / GENERATION_CONFIG
    if settings.is_file():
        shutil.copyfile(settings, directory / GENERATION_CONFIG)


def train_small_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer trained on `texts`; deterministic, under a second per megabyte.

    Args:
        texts: Training text.
        vocab_size: Most entries, including 256 bytes and one end-of-text token.

    Raises:
        ValueError: `vocab_size` cannot hold the bytes.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    if vocab_size < _SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size={vocab_size} cannot hold 256 bytes and an end token; use at least "
            f"{_SMALLEST_VOCABULARY}."
        )
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(
        texts, vocab_size=vocab_size, special_tokens=[_END], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trainer._tokenizer, eos_token=_END, pad_token=_END
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
