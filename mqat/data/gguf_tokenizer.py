"""The tokenizer that GGUF metadata describe, split as the model's own tokenizer splits.

`tokenizer.ggml.pre` names the rule. Names and patterns are those of llama.cpp's `src/llama-vocab.cpp`;
where that file quotes the model's tokenizer.json beside an approximation, they are the model's.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from mqat.data.sentencepiece_pieces import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Pieces,
    fast_tokenizer,
    surround,
)
from mqat.errors import UserError

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_TAIL}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_SYMBOLS}|{_TAIL}"
_BIG, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str, digits: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{_BIG}*{_SMALL}+{ending}|{start}{_BIG}+{_SMALL}*{ending}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
    )


_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")
_LLAMA3_NAMES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "lfm2")
# Patterns applied one after the other; None: GPT-2's own pattern, which the ByteLevel step brings.
RULES: dict[str, tuple[str | None, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "exaone4"), (None,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        (r"\p{N}", None),
    ),
    **dict.fromkeys(_LLAMA3_NAMES, (_LLAMA3,)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), (_QWEN2,)),
    "tekken": (_cased("", r"\p{N}"),),
    **dict.fromkeys(("gpt-4o", "llama4"), (_cased(f"{_ENDINGS}?", r"\p{N}{1,3}"),)),
    "deepseek-v3": _DEEPSEEK3,
    "deepseek-coder": _DEEPSEEK_CODER,
}
# These look a whole word up before they merge, and begin a text with the begin token by themselves.
_WHOLE_WORDS = frozenset((*_LLAMA3_NAMES, "tekken"))
_NORMALIZED = frozenset(("qwen2",))  # to NFC, by the model's tokenizer.json
_NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",
    "mask_token": "mask_token_id",
}
_NEEDED = {"gpt2": "merges", "llama": "scores"}  # kind of vocabulary -> what it is merged by
_UNDERSTOOD = frozenset(_NAMES.values()) | {
    "model", "pre", "tokens", "token_type", "scores", "merges", "eot_token_id", "eom_token_id",
    "add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces",
}  # fmt: skip
# Vocabulary entries under a second name, which no chat needs, and a count that only encoders use.
_HARMLESS = frozenset(
    ("token_type_count", "cls_token_id", "prefix_token_id", "suffix_token_id", "middle_token_id")
)


# Value types of GGUF metadata (ggml's docs/gguf.md) as `struct` formats; 8 is a string, 9 an array.
_FORMATS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9


class _Metadata:
    """Reads values one after the other; the `gguf` package needs 20 s for a vocabulary of 49152."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def numbers(self, format: str, count: int) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{count}{format}", self.data, self.position)
        self.position += struct.calcsize(f"<{count}{format}")
        return values

    def value(self, kind: int) -> Any:
        if kind == _ARRAY:
            (inner,), (count,) = self.numbers("I", 1), self.numbers("Q", 1)
            if inner in _FORMATS:
                return list(self.numbers(_FORMATS[inner], count))
            return [self.value(inner) for _ in range(count)]
        if kind != _STRING:
            return self.numbers(_FORMATS[kind], 1)[0]
        (length,) = self.numbers("Q", 1)
        if length > len(self.data) - self.position:
            raise struct.error("a string is longer than the file")
        self.position += length
        return self.data[self.position - length : self.position].decode("utf-8")


def _read_metadata(path: Path) -> dict[str, Any]:
    """Every key and value of a little-endian GGUF file of version 2 or 3.

    Raises:
        UserError: Not such a file, or damaged.
    """
    found: dict[str, Any] = {}
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Metadata(data)
            magic, version, _, count = struct.unpack_from("<4sIQQ", data)
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(f"magic {magic!r}, version {version}")
            reader.position = 24
            for _ in range(count):
                key = reader.value(_STRING)
                if key in found:
                    raise ValueError(f"key {key!r} stands there twice")
                found[key] = reader.value(reader.numbers("I", 1)[0])
    except (OSError, ValueError, KeyError, struct.error, MemoryError, RecursionError) as error:
        raise UserError(f"not a complete GGUF file of version 2 or 3 ({error})") from error
    return found


def _check_keys(fields: dict[str, Any]) -> None:
    for key, value in fields.items():
        name = key.removeprefix("tokenizer.ggml.")
        is_known = name in _UNDERSTOOD or name in _HARMLESS or name.startswith("fim_")
        if not is_known and "chat_template" not in key and value is not False:
            raise UserError(
                f"GGUF key {key!r} is not honoured, so tokens could be others than the model's; use "
                "the Hugging Face directory of this model"
            )


def byte_level(values: dict[str, Any], pre: str) -> Any:
    """A `tokenizers.Tokenizer` of `tokens`, `token_type` and `merges` that splits by a rule.

    Raises:
        UserError: No rule of `RULES`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if pre not in RULES:
        raise UserError(
            f"tokenizer.ggml.pre={pre!r}: how this model splits text is not known; known are "
            f"{sorted(RULES)}. Convert the model with a newer llama.cpp, or use its Hugging Face "
            "directory"
        )
    merges = [tuple(pair.split(" ", 1)) for pair in values["merges"]]
    vocabulary = {token: index for index, token in enumerate(values["tokens"])}
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _WHOLE_WORDS)
    backend = Tokenizer(model)
    patterns = RULES[pre]
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns if p is not None]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=None in patterns)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    if pre in _NORMALIZED:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    _add_special(backend, values)
    return backend


def _pieces(values: dict[str, Any]) -> Any:
    kinds = list(values["token_type"])
    unknown = values.get("unknown_token_id", -1)
    # Converters of Gemma list every special token as a control piece, this one too.
    if UNKNOWN not in kinds and 0 <= unknown < len(kinds):
        kinds[unknown] = UNKNOWN
    return fast_tokenizer(
        Pieces(
            names=values["tokens"],
            scores=values["scores"],
            kinds=kinds,
            unigram=False,
            add_dummy_prefix=bool(values.get("add_space_prefix", True)),
            remove_extra_whitespaces=bool(values.get("remove_extra_whitespaces", False)),
        )
    )


def _add_special(backend: Any, values: dict[str, Any]) -> None:
    from tokenizers import AddedToken

    for token, kind in zip(values["tokens"], values["token_type"], strict=True):
        if kind in (UNKNOWN, CONTROL):
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])


def _chat_template(fields: dict[str, Any]) -> str | dict[str, str] | None:
    """`tokenizer.chat_template` is the default one; named ones stand beside it."""
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): fields[key] for key in fields if key.startswith(prefix)}
    default: str | None = fields.get("tokenizer.chat_template")
    if not named:
        return default
    return named | ({} if default is None else {"default": default})


def read_gguf_tokenizer(path: Path) -> tuple[Any, dict[str, str], str | dict[str, str] | None]:
    """The tokenizer of a GGUF file.

    Returns:
        A `tokenizers.Tokenizer`; its special tokens by transformers' names; the chat template or, by
        name, templates.

    Raises:
        UserError: A rule of splitting or a key that is not known; damaged metadata; a key is missing
            without which there is no tokenizer.
    """
    fields = {k: v for k, v in _read_metadata(path).items() if k.startswith("tokenizer.")}
    _check_keys(fields)
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    kind, pre = values.get("model"), values.get("pre", "")
    if kind not in _NEEDED:
        raise UserError(f"tokenizer.ggml.model={kind!r} is not read; known are {list(_NEEDED)}")
    for key in ("tokens", "token_type", _NEEDED[kind]):
        if not isinstance(values.get(key), list):
            raise UserError(f"GGUF key 'tokenizer.ggml.{key}' is missing or no array")
    tokens = values["tokens"]
    if len(set(tokens)) != len(tokens):
        raise UserError("two ids of one token; the GGUF vocabulary is damaged")
    if len(tokens) != len(values["token_type"]):
        raise UserError("tokens and token types differ in number; the GGUF vocabulary is damaged")
    backend = byte_level(values, pre) if kind == "gpt2" else _pieces(values)
    ids = {name: values[key] for name, key in _NAMES.items() if values.get(key, -1) != -1}
    for name, index in ids.items():
        if not 0 <= index < len(tokens):
            raise UserError(f"{name} is {index}, no token of {len(tokens)} in the GGUF vocabulary")
    names = {name: tokens[index] for name, index in ids.items()}
    # Without the key, llama.cpp begins SentencePiece texts and those of `_WHOLE_WORDS` by itself.
    begins = values.get("add_bos_token", kind == "llama" or pre in _WHOLE_WORDS)
    ends = values.get("add_eos_token", False)
    for name, is_added in (("bos_token", begins), ("eos_token", ends)):
        if is_added and name not in names:
            raise UserError(f"texts are to have a {name}, and GGUF key {_NAMES[name]!r} names none")
    surround(backend, names["bos_token"] if begins else None, names["eos_token"] if ends else None)
    return backend, names, _chat_template(fields)
