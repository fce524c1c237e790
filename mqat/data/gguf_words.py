"""A tokenizer.json in the words of GGUF metadata, which llama.cpp splits texts by.

A file names the rule of splitting; which of the rules is the tokenizer's is found by what they do to a
text that tells them apart, as llama.cpp's converter does it with hashes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mqat.data.gguf_tokenizer import RULES, byte_level
from mqat.data.sentencepiece_pieces import CONTROL, NORMAL, UNUSED, USER_DEFINED
from mqat.errors import UserError

_SPECIAL = {
    "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id",
}  # fmt: skip
# Digits, blanks, line ends, contractions in both cases, scripts, marks, signs, code.
_PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶‍🌫️ (emojis) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天 "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!?? I've been 'told he's there, "
    "'RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL e\u0301 HelloWorld "
    "XMLHttp i=(a+b)/2;\r\n\tif(x){y}//\r\n ½ Ⅷ ١٢٣ /path/to/x \u3000全角\u00a0nbsp\u200bzero"
)


def gguf_tokenizer_keys(directory: Path, token_ids: dict[str, Any], size: int) -> dict[str, Any]:
    """`tokenizer.*` of a file whose table has `size` rows.

    Args:
        directory: With tokenizer.json.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`, where they are known.
        size: Rows of the embedding; those without a token get a name that no text has.

    Raises:
        UserError: There is no such file, its vocabulary is no byte-level BPE, or it splits texts by no
            rule of llama.cpp that is known here.
    """
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{directory}: GGUF files are written for byte-level tokenizers with a tokenizer.json; "
            "there is none. Use another export.format."
        )
    described = json.loads(file.read_text("utf-8"))
    model, backend = described["model"], Tokenizer.from_file(str(file))
    if model["type"] != "BPE" or (described["decoder"] or {}).get("type") != "ByteLevel":
        raise UserError(
            f"{file}: GGUF files are written for byte-level BPE vocabularies; this is another kind. Use "
            "another export.format."
        )
    names, kinds = _tokens(described, size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    found: dict[str, Any] = {
        "model": "gpt2", "tokens": names, "token_type": kinds, "merges": merges
    }  # fmt: skip
    found["pre"] = _rule(found, backend, file)
    with_added, without = (backend.encode("a", add_special_tokens=a).ids for a in (True, False))
    begin, _, end = _around(with_added, without)
    found |= {"add_bos_token": bool(begin), "add_eos_token": bool(end)}
    for name, key in _SPECIAL.items():
        value = token_ids.get(name)
        if value is not None:
            found[key] = value[0] if isinstance(value, list) else value
    keys = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    template = _chat_template(directory)
    return keys | ({} if template is None else {"tokenizer.chat_template": template})


def _tokens(described: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Name and kind of every id."""
    names = [f"[unused{index}]" for index in range(size)]
    kinds = [UNUSED] * size
    for token, index in described["model"]["vocab"].items():
        names[index], kinds[index] = token, NORMAL
    for token in described["added_tokens"]:
        index = token["id"]
        names[index] = token["content"]
        kinds[index] = CONTROL if token["special"] else USER_DEFINED
    return names, kinds


def _rule(found: dict[str, Any], backend: Any, file: Path) -> str:
    """The first rule that splits the probe as the tokenizer does."""
    wanted = backend.encode(_PROBE, add_special_tokens=False).ids
    for rule in RULES:
        if byte_level(found, rule).encode(_PROBE, add_special_tokens=False).ids == wanted:
            return rule
    raise UserError(
        f"{file}: splits texts by none of the rules that mqat writes into GGUF files "
        f"({', '.join(RULES)}); use another export.format."
    )


def _around(with_added: list[int], without: list[int]) -> tuple[list[int], list[int], list[int]]:
    """What stands before and behind the tokens of a text."""
    for start in range(len(with_added) - len(without) + 1):
        stop = start + len(without)
        if with_added[start:stop] == without:
            return with_added[:start], without, with_added[stop:]
    return [], with_added, []


def _chat_template(directory: Path) -> str | None:
    file, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if file.is_file():
        return file.read_text("utf-8")
    found = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    template = found.get("chat_template")
    return template if isinstance(template, str) else None
