"""Tokenizers: loading what comes with a model, byte for byte, and a small one for models from scratch.

`tokenizer.json` decides where there is one: its ids are those of `tokenizers.Tokenizer.from_file`,
whatever class transformers would choose for the model (some of transformers 5 rebuild it).
`tokenizer.model` decides where there is no other, and GGUF metadata in a GGUF file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mqat.data.gguf_tokenizer import read_gguf_tokenizer
from mqat.data.sentencepiece_pieces import read_sentencepiece, surround
from mqat.data.strict_json import parse_json
from mqat.errors import UserError

_GENERATION_CONFIG = "generation_config.json"
_JSON, _MODEL, _CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
_MAP = "special_tokens_map.json"
# What belongs to a tokenizer, whichever class wrote it (`vocab_files_names` of transformers' classes).
_FILES = (
    _JSON, _MODEL, _CONFIG, _MAP, "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "tekken.json", "chat_template.json", "chat_template.jinja", _GENERATION_CONFIG,
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
_OPTIONS: dict[str, type | tuple[type, ...]] = {
    "model_max_length": (int, float), "padding_side": str, "clean_up_tokenization_spaces": bool
}  # fmt: skip
# The defaults of transformers' Llama and Gemma classes, which read such files.
_SENTENCEPIECE_NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
_KEPT = "mqat_source_files"  # attribute: files as they were read, and the state that they gave
_END = "<|endoftext|>"
# Conversations of models that bring no template of their own.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "<|endoftext|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_SMALLEST_VOCABULARY = 257  # 256 bytes and the end token


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Whatever a damaged tokenizer raises, panics of the Rust library included, as one UserError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except UserError as error:
        raise UserError(f"{path}: no usable tokenizer: {str(error).rstrip('.')}.") from error
    except BaseException as error:  # pyo3's PanicException is no Exception
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"{path}: no usable tokenizer ({reason}). Put tokenizer.json (or tokenizer.model) "
            "and tokenizer_config.json as they came with the model beside it."
        ) from error


def _gguf_file(path: Path) -> Path | None:
    """`path` itself, or the only `.gguf` of a directory without tokenizer files of its own."""
    if path.suffix == ".gguf":
        return path
    has_own = any((path / name).exists() for name in (_CONFIG, _JSON, _MODEL))
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not has_own else []
    return files[0] if len(files) == 1 else None


def _object(text: bytes | None, name: str) -> dict[str, Any]:
    value = parse_json(text) if text is not None else {}
    if not isinstance(value, dict):
        raise UserError(f"{name} is not a JSON object")
    return value


def _read_files(path: Path) -> dict[str, bytes]:
    """Contents of every tokenizer file of a directory, and of how generations end, by its path."""
    names = [
        *_FILES,
        *(f"{_TEMPLATES}/{f.name}" for f in sorted((path / _TEMPLATES).glob("*.jinja"))),
    ]
    return {name: (path / name).read_bytes() for name in names if (path / name).is_file()}


def _content(name: str, token: Any) -> str:
    """A token as transformers' files spell it: its text, or an object that has it."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise UserError(f"{_CONFIG}: {name}={token!r} is no token")
    return text


def _named_tokens(files: dict[str, bytes]) -> dict[str, Any]:
    """`bos_token`, ..., and the list `additional_special_tokens`, as transformers' classes take them."""
    settings = _object(files.get(_CONFIG), _CONFIG)
    if (
        "added_tokens_decoder" not in settings
    ):  # older files, of which transformers lets the map win
        settings |= _object(files.get(_MAP), _MAP)
    named: dict[str, Any] = {
        name: _content(name, settings[name]) for name in _NAMES if settings.get(name) is not None
    }
    extra = [value for key in _EXTRA if (value := settings.get(key))]
    for value in extra:
        if not isinstance(value, list | dict):
            raise UserError(f"{_CONFIG}: {_EXTRA[0]}={value!r} is no list")
    tokens = [t for value in extra for t in (value.values() if isinstance(value, dict) else value)]
    if tokens:
        named[_EXTRA[0]] = list(dict.fromkeys(_content(_EXTRA[0], token) for token in tokens))
    return named


def _chat_template(files: dict[str, bytes]) -> str | dict[str, str] | None:
    """One template, or several by name; files win over `tokenizer_config.json`, as in transformers."""
    named = {
        Path(name).stem: text.decode()
        for name, text in files.items()
        if name.startswith(_TEMPLATES)
    }
    if "chat_template.jinja" in files:
        named["default"] = files["chat_template.jinja"].decode()
    if named:
        return named["default"] if set(named) == {"default"} else named
    template = _object(files.get(_CONFIG), _CONFIG).get("chat_template")
    if template is None:
        template = _object(files.get("chat_template.json"), "chat_template.json").get(
            "chat_template"
        )
    if isinstance(template, list):
        names = [entry["name"] for entry in template]
        if len(set(names)) != len(names):
            raise UserError(f"{_CONFIG}: two chat templates of one name ({names})")
        template = dict(zip(names, (entry["template"] for entry in template), strict=True))
    texts = template.values() if isinstance(template, dict) else [template]
    if not all(isinstance(text, str | None) for text in texts):
        raise UserError(f"{_CONFIG}: chat_template is neither a text nor a list of named texts")
    return template


def _added_by_files(files: dict[str, bytes], backend: Any) -> None:
    """Adds the tokens beyond a SentencePiece vocabulary under the ids that the files give them."""
    from tokenizers import AddedToken

    listed = _object(files.get("added_tokens.json"), "added_tokens.json")
    tokens: dict[int, Any] = {int(index): AddedToken(name) for name, index in listed.items()}
    decoder = _object(files.get(_CONFIG), _CONFIG).get("added_tokens_decoder") or {}
    tokens |= {
        int(i): AddedToken(**{k: v for k, v in t.items() if k != "__type"})
        for i, t in decoder.items()
    }
    for index, token in sorted(tokens.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != index:
            raise UserError(
                f"token {token.content!r} cannot have the id {index}; put tokenizer.json here"
            )


def _from_sentencepiece(path: Path, files: dict[str, bytes], names: dict[str, Any]) -> Any:
    backend = read_sentencepiece(path / _MODEL)
    settings = _object(files.get(_CONFIG), _CONFIG)
    if settings.get("legacy") is False:
        raise UserError(
            f"{_CONFIG}: legacy=false means other tokens after special ones than {_MODEL} alone "
            "gives; put tokenizer.json here"
        )
    _added_by_files(files, backend)
    begins, ends = settings.get("add_bos_token", True), settings.get("add_eos_token", False)
    surround(backend, names["bos_token"] if begins else None, names["eos_token"] if ends else None)
    return backend


def _from_json(files: dict[str, bytes]) -> Any:
    from tokenizers import Tokenizer

    if _object(files[_JSON], _JSON).get("model", {}).get("dropout"):
        raise UserError(f"{_JSON}: model.dropout gives other tokens every time; set it to null")
    return Tokenizer.from_str(files[_JSON].decode())


def _wrap(
    backend: Any, names: dict[str, Any], template: str | dict[str, str] | None, **options: Any
) -> Any:
    """A transformers tokenizer that encodes as `backend` does."""
    from transformers import PreTrainedTokenizerFast

    backend.no_truncation()
    backend.no_padding()
    extra = names.get(_EXTRA[0], [])
    for token in (*(names[name] for name in _NAMES if name in names), *extra):
        if backend.token_to_id(token) is None:
            raise UserError(
                f"{token!r} is named as a special token and has no id in the vocabulary; remove the "
                f"name from {_CONFIG}, or use the tokenizer that came with the model"
            )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, **names, **options
    )
    tokenizer._tokenizer = backend  # transformers adds tokens and rewrites the post-processor
    return tokenizer


def _load(path: Path) -> Any:
    gguf = _gguf_file(path)
    if not path.exists():  # otherwise transformers takes the path for a name on the model hub
        raise FileNotFoundError("no such file or directory")
    if gguf is not None:
        tokenizer = _wrap(*read_gguf_tokenizer(gguf))
        files = _written_anew(tokenizer)
    else:
        files = _read_files(path)
        if _JSON not in files and _MODEL not in files:
            return _load_by_class(path, files)
        names = _named_tokens(files)
        if _JSON in files:
            backend = _from_json(files)
        else:
            names = _SENTENCEPIECE_NAMES | names
            backend = _from_sentencepiece(path, files, names)
        settings = _object(files.get(_CONFIG), _CONFIG)
        options = {key: settings[key] for key in _OPTIONS if settings.get(key) is not None}
        for key, value in options.items():
            if not isinstance(value, _OPTIONS[key]):
                raise UserError(f"{_CONFIG}: {key}={value!r} is of a wrong type")
        tokenizer = _wrap(backend, names, _chat_template(files), **options)
    setattr(tokenizer, _KEPT, (files, _state(tokenizer)))
    return tokenizer


def _check_splitting(path: Path, files: dict[str, bytes]) -> None:
    """Refuses files that hold a vocabulary and neither say how text is split nor name who knows."""
    others = (*path.glob("*.tiktoken"), *path.glob("*spiece.model"), *path.glob("*.bpe.model"))
    for file in others:
        kind = "tiktoken" if file.suffix == ".tiktoken" else "SentencePiece"
        raise UserError(
            f"{file.name} is a {kind} vocabulary, of which a class decides how text is split and "
            f"numbered; put {_JSON} here, as transformers saves it for that class"
        )
    settings = _object(files.get(_CONFIG), _CONFIG)
    vocabularies = [name for name in ("vocab.json", "vocab.txt") if name in files]
    is_named = "tokenizer_class" in settings or (path / "config.json").is_file()
    if vocabularies and not is_named:
        raise UserError(
            f"{vocabularies[0]} does not say how text is split, and no {_CONFIG} names a "
            f"tokenizer_class; put {_JSON} or that file here"
        )
    if not files.keys() - {_CONFIG, _MAP, _GENERATION_CONFIG} and not settings:
        raise UserError(f"no tokenizer files here; put {_JSON} or {_MODEL} beside the model")


def _load_by_class(path: Path, files: dict[str, bytes]) -> Any:
    """Files that do not say how text is split, such as vocab.json and merges.txt: the class does."""
    from transformers import AutoTokenizer

    _check_splitting(path, files)
    tokenizer = AutoTokenizer.from_pretrained(
        str(path), local_files_only=True, trust_remote_code=False
    )
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} has no fast version, so answers cannot be marked; save the "
            "tokenizer as tokenizer.json"
        )
    setattr(tokenizer, _KEPT, (files | _written_anew(tokenizer), _state(tokenizer)))
    return tokenizer


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a Hugging Face directory (tokenizer.json or SentencePiece) or a GGUF file.

    Raises:
        ValueError: No tokenizer there, a damaged one, or one without a fast version.
    """
    with _one_line(path):
        return _load(path)


def check_fits(tokenizer: Any, vocab_size: int) -> None:
    """Refuses a tokenizer whose largest id has no row in the model's table.

    Raises:
        ValueError: It has such an id.
    """
    entries = max(tokenizer.get_vocab().values(), default=-1) + 1
    if entries > vocab_size:
        raise UserError(
            f"the tokenizer has {entries} entries, the model's vocabulary {vocab_size}; they do not "
            "belong together. Use the tokenizer that came with the model."
        )


def end_tokens(tokenizer: Any, stated: int | Sequence[int] | None = None) -> frozenset[int]:
    """Ids at which text ends: the tokenizer's end token, those of its generation settings, and others.

    `stated`: what the model's configuration calls `eos_token_id`.
    """
    kept_files: tuple[dict[str, bytes], str] = getattr(tokenizer, _KEPT, ({}, ""))
    settings = _object(kept_files[0].get(_GENERATION_CONFIG), _GENERATION_CONFIG)
    found: set[int] = set()
    for ids in (tokenizer.eos_token_id, settings.get("eos_token_id"), stated):
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return frozenset(found)


def _state(tokenizer: Any) -> str:
    """What decides about ids and chats; calls with padding or truncation do not change it."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.update(truncation=None, padding=None)
    names = {name: getattr(tokenizer, name) for name in _NAMES}
    text = json.dumps([backend, names, tokenizer.chat_template], default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _written_anew(tokenizer: Any) -> dict[str, bytes]:
    """Files of a tokenizer that has none of its own, in names that transformers 4 and 5 both know."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokens = {name: getattr(tokenizer, name) for name in _NAMES}
    settings |= {name: str(token) for name, token in tokens.items() if token is not None}
    extra = next((value for key in _EXTRA if (value := getattr(tokenizer, key, None))), None)
    if extra:
        settings[_EXTRA[0]] = [str(token) for token in extra]
    settings |= {key: getattr(tokenizer, key) for key in _OPTIONS}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template is not None:
        settings["chat_template"] = template
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.update(truncation=None, padding=None)
    return {
        _JSON: json.dumps(backend, ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass"),
        _CONFIG: json.dumps(settings, ensure_ascii=False, indent=1).encode(),
    }


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Writes the files that `load_tokenizer` reads into `directory`, which is created.

    A tokenizer that is as `load_tokenizer` found it is written byte for byte, with the generation
    settings and all chat templates beside it. Another one is written anew.
    """
    kept_files: tuple[dict[str, bytes], str] = getattr(tokenizer, _KEPT, ({}, ""))
    files, state = kept_files
    if state != _state(tokenizer):
        kept = files.get(_GENERATION_CONFIG)
        if kept is None and tokenizer.name_or_path:  # of transformers' own loading
            settings = Path(tokenizer.name_or_path) / _GENERATION_CONFIG
            kept = settings.read_bytes() if settings.is_file() else None
        files = _written_anew(tokenizer) | ({_GENERATION_CONFIG: kept} if kept else {})
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


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
