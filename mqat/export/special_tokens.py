"""The tokens with which a served model begins, ends and pads."""

import json
from pathlib import Path
from typing import Any

from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig

_SETTINGS = "generation_config.json"


def special_tokens(tokenizer: Path, model: DecoderConfig) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id`, `pad_token_id`, as the source of the model says them.

    What its config.json said wins, then its generation settings, where the checkpoint has them: an
    instruct model stops at several tokens, of which the tokenizer knows one.
    """
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    settings = _json(tokenizer / _SETTINGS)
    names = _json(tokenizer / "tokenizer_config.json")
    added = _json(tokenizer / "tokenizer.json").get("added_tokens") or []
    ids = {token["content"]: token["id"] for token in added}
    found = {}
    for key in keys:
        name = names.get(key.removesuffix("_id"))
        name = name.get("content") if isinstance(name, dict) else name
        value = model.token_ids.get(key, settings.get(key, ids.get(name)))
        if value is not None:
            found[key] = value
    return found


def generation_texts(tokenizer: Path, special: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`generation_config.json`, where the checkpoint does not bring the one of its source."""
    if (tokenizer / _SETTINGS).is_file():
        return {}
    return {_SETTINGS: {"_from_model_config": True} | special}


def _json(file: Path) -> dict[str, Any]:
    """A JSON object, or nothing if there is no such file.

    Raises:
        UserError: The file is not JSON.
    """
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not JSON ({error}).") from error
    return value if isinstance(value, dict) else {}
