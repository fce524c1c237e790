"""Tokens are the model's own, and tokenizer files travel byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors

from mqat.data.chat import chat_template
from mqat.data.gguf_tokenizer import RULES
from mqat.data.tokenizer import check_fits, load_tokenizer, save_tokenizer

TEXT = "In 1871 the wall was built. Ships bring grain, timber and coal to the town.\n" * 4
PROBES = ["In 1871 it", "  the  wall\n\n", "town.<|end|>the wall", "été 🙂 ½"]
SETTINGS = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|end|>", "add_bos_token": False}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def files_of(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with a byte-level tokenizer.json that begins texts, which its config denies."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [TEXT], vocab_size=300, special_tokens=["<|end|>"], show_progress=False
    )
    backend = trained._tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    directory = tmp_path / "source"
    directory.mkdir()
    backend.save(str(directory / "tokenizer.json"), pretty=False)
    write_json(directory / "tokenizer_config.json", SETTINGS)
    return directory


def test_tokenizer_json_decides_whatever_class_is_named(source: Path, tmp_path: Path) -> None:
    right = Tokenizer.from_file(str(source / "tokenizer.json"))
    write_json(source / "config.json", {"model_type": "llama", "eos_token_id": [0, 7]})
    tokenizer = load_tokenizer(source)
    save_tokenizer(tokenizer, tmp_path / "copy")
    for probe in PROBES:
        assert tokenizer(probe)["input_ids"] == right.encode(probe).ids
        assert load_tokenizer(tmp_path / "copy")(probe)["input_ids"] == right.encode(probe).ids
    assert tokenizer.eos_token_id == 0


def test_files_travel_byte_for_byte(source: Path, tmp_path: Path) -> None:
    write_json(source / "special_tokens_map.json", {"eos_token": {"content": "<|end|>"}})
    write_json(source / "generation_config.json", {"eos_token_id": [0, 7], "temperature": 0.6})
    (source / "tokenizer.model").write_bytes(b"kept, not read")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    (source / "model.safetensors").write_bytes(b"weights")
    for step in ("checkpoint", "resumed"):
        tokenizer = load_tokenizer(source)
        tokenizer(["a", "a longer text"], padding=False, truncation=True, max_length=4)
        before = files_of(source)
        before.pop("model.safetensors", None)
        source = tmp_path / step
        save_tokenizer(tokenizer, source)
        assert files_of(source) == before
    tokenizer.chat_template = "changed by hand"
    save_tokenizer(tokenizer, tmp_path / "changed")
    assert load_tokenizer(tmp_path / "changed").chat_template == "changed by hand"
    assert (
        files_of(tmp_path / "changed")["generation_config.json"] == before["generation_config.json"]
    )


@pytest.mark.parametrize("added", [{}, {"added_tokens_decoder": {}}])
def test_the_map_of_special_tokens_wins_where_transformers_lets_it(
    source: Path, added: dict[str, Any]
) -> None:
    write_json(source / "special_tokens_map.json", {"eos_token": "e"})
    write_json(source / "tokenizer_config.json", SETTINGS | added)
    assert load_tokenizer(source).eos_token == ("<|end|>" if added else "e")
    same = transformers.PreTrainedTokenizerFast.from_pretrained(source)
    assert same.eos_token == ("<|end|>" if added else "e")


def test_a_key_that_stands_twice_is_refused(source: Path) -> None:
    (source / "tokenizer_config.json").write_text('{"eos_token": "<|end|>", "eos_token": "the"}')
    with pytest.raises(ValueError, match="the key 'eos_token' is there twice"):
        load_tokenizer(source)


def test_generation_settings_of_the_working_directory_stay_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 5})
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(source)
    tokenizer.chat_template = "changed, so that files are written anew"
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert "generation_config.json" not in files_of(tmp_path / "saved")


def test_named_templates_are_read_as_transformers_reads_them(source: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    write_json(source / "tokenizer_config.json", SETTINGS | {"chat_template": named})
    tokenizer = load_tokenizer(source)
    assert chat_template(tokenizer) == "D" and chat_template(tokenizer, [{}]) == "T"
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/rag.jinja").write_text("R")
    (source / "chat_template.jinja").write_text("J")
    assert load_tokenizer(source).chat_template == {"default": "J", "rag": "R"}
    write_json(source / "tokenizer_config.json", SETTINGS | {"chat_template": named + named})
    (source / "chat_template.jinja").unlink()
    (source / "additional_chat_templates/rag.jinja").unlink()
    with pytest.raises(ValueError, match="two chat templates of one name"):
        load_tokenizer(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad_token": "<pad>"}, r"'<pad>' is named as a special token and has no id"),
        ({"eos_token": 3}, r"eos_token=3 is no token"),
        ({"additional_special_tokens": ["<x>"]}, r"'<x>' is named as a special token"),
        ({"additional_special_tokens": "<x>"}, r"is no list"),
        ({"chat_template": [1]}, r"no usable tokenizer"),
        ({"chat_template": {"default": 1}}, r"neither a text nor a list of named texts"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(
    source: Path, change: dict[str, Any], message: str
) -> None:
    write_json(source / "tokenizer_config.json", SETTINGS | change)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(source)


def test_dropout_and_ids_beyond_the_model_are_refused(source: Path) -> None:
    tokenizer = load_tokenizer(source)
    check_fits(tokenizer, len(tokenizer))
    with pytest.raises(ValueError, match=r"has \d+ entries, the model's vocabulary 20"):
        check_fits(tokenizer, 20)
    values = json.loads((source / "tokenizer.json").read_text())
    values["model"]["dropout"] = 0.1
    write_json(source / "tokenizer.json", values)
    with pytest.raises(ValueError, match=r"dropout gives other tokens every time"):
        load_tokenizer(source)


def train_sentencepiece(directory: Path, **options: Any) -> Path:
    (directory / "train.txt").write_text(TEXT * 4)
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "train.txt"), model_prefix=str(directory / "tokenizer"),
        vocab_size=options.pop("vocab_size", 340), byte_fallback=options.pop("byte_fallback", True),
        hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    for name in ("tokenizer.vocab", "train.txt"):
        (directory / name).unlink()
    write_json(directory / "tokenizer_config.json", {"add_bos_token": False})
    return directory / "tokenizer.model"


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("remove", [True, False])
def test_sentencepiece_files_give_sentencepieces_ids(
    tmp_path: Path, model_type: str, rule: str, remove: bool
) -> None:
    options = {"model_type": model_type, "normalization_rule_name": rule}
    file = train_sentencepiece(tmp_path, remove_extra_whitespaces=remove, **options)
    right = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokenizer = load_tokenizer(tmp_path)
    save_tokenizer(tokenizer, tmp_path / "copy")
    assert (tmp_path / "copy/tokenizer.model").read_bytes() == file.read_bytes()
    for text in (TEXT, "  the wall", "ﬁ ½ été", " a  b ", ""):
        assert tokenizer(text)["input_ids"] == right.encode(text)
        assert load_tokenizer(tmp_path / "copy")(text)["input_ids"] == right.encode(text)


def test_sentencepiece_files_have_their_begin_token_and_added_tokens(tmp_path: Path) -> None:
    size = sentencepiece.SentencePieceProcessor(
        model_file=str(train_sentencepiece(tmp_path, model_type="bpe"))
    ).get_piece_size()
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<s>", "pad_token": "<pad>"})
    write_json(tmp_path / "added_tokens.json", {"<pad>": size})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("the<pad>")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert tokenizer.pad_token_id == size
    write_json(tmp_path / "added_tokens.json", {"<pad>": size + 3})
    with pytest.raises(ValueError, match=rf"'<pad>' cannot have the id {size + 3}"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(ValueError, match=r"not a SentencePiece model.*tiktoken"):
        load_tokenizer(tmp_path)


def gguf(path: Path, tokens: list[str], kinds: list[int], **fields: Any) -> Path:
    writer = pytest.importorskip("gguf").GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for key, value in fields.items():
        name = "tokenizer." + key.replace("__", ".")
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            (writer.add_bool if isinstance(value, bool) else writer.add_int32)(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


BYTES = sorted(Tokenizer.from_str(ByteLevelBPETokenizer().to_str()).pre_tokenizer.alphabet())
NAMES = [*BYTES, "ĠĠ", "<s>", "<e>", "<t>"]
BYTE_LEVEL = {
    "ggml__model": "gpt2",
    "ggml__merges": ["Ġ Ġ"],
    "ggml__bos_token_id": len(BYTES) + 1,
    "ggml__eos_token_id": len(BYTES) + 2,
    "ggml__eot_token_id": len(BYTES) + 3,
}
KINDS = [1] * (len(BYTES) + 1) + [3, 3, 4]


def test_gguf_brings_begin_token_and_templates(tmp_path: Path) -> None:
    named = {"chat_template": "D", "chat_template__rag": "R", "ggml__add_sep_token": False}
    file = gguf(tmp_path / "a.gguf", NAMES, KINDS, ggml__pre="llama-bpe", **BYTE_LEVEL, **named)
    tokenizer = load_tokenizer(file)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a<e>  <t>")["input_ids"]) == [
        "<s>", "a", "<e>", "ĠĠ", "<t>",
    ]  # fmt: skip
    assert tokenizer.chat_template == {"rag": "R", "default": "D"}
    save_tokenizer(tokenizer, tmp_path / "saved")
    settings = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert load_tokenizer(tmp_path / "saved")("a  1")["input_ids"] == tokenizer("a  1")["input_ids"]


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["It", "'s", "Ġ12345", "Ġ", "ĠOK", "!", "Ċ", "Ċ", "HelloWorld"]),
        (
            "smollm",
            ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "ĠOK", "!", "Ċ", "Ċ", "HelloWorld"],
        ),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "45", "Ġ", "ĠOK", "!ĊĊ", "HelloWorld"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "ĠOK", "!ĊĊ", "HelloWorld"]),
        ("tekken", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "ĠOK", "!ĊĊ", "Hello", "World"]),
        ("gpt-4o", ["It's", "Ġ", "123", "45", "Ġ", "ĠOK", "!ĊĊ", "Hello", "World"]),
        ("deepseek-v3", ["It", "'s", "Ġ", "123", "45", "Ġ", "ĠOK", "!ĊĊ", "HelloWorld"]),
        (
            "deepseek-coder",
            ["It", "'", "s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "ĠOK", "!", "Ċ", "Ċ", "HelloWorld"],
        ),
    ],
)
def test_the_rule_of_a_gguf_file_splits_as_its_models_do(
    tmp_path: Path, pre: str, words: list[str]
) -> None:
    file = gguf(tmp_path / "a.gguf", NAMES, KINDS, ggml__pre=pre, **BYTE_LEVEL)
    split = load_tokenizer(file).backend_tokenizer.pre_tokenizer
    assert [word for word, _ in split.pre_tokenize_str("It's 12345  OK!\n\nHelloWorld")] == words


@pytest.mark.parametrize("pre", sorted(RULES))
def test_every_rule_loses_no_character(tmp_path: Path, pre: str) -> None:
    file = gguf(tmp_path / "a.gguf", NAMES, KINDS, ggml__pre=pre, **BYTE_LEVEL)
    tokenizer = load_tokenizer(file)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True) == TEXT


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ggml__pre": "unheard-of"}, r"ggml\.pre='unheard-of'.*known are \['chatglm-bpe'"),
        ({}, r"ggml\.pre=''"),
        ({"ggml__pre": "qwen2", "ggml__new_rule": True}, r"'tokenizer\.ggml\.new_rule' is not hon"),
        ({"ggml__pre": "qwen2", "ggml__add_sep_token": True}, r"add_sep_token' is not honoured"),
        ({"ggml__pre": "qwen2", "ggml__model": "rwkv"}, r"ggml\.model='rwkv' is not read"),
        ({"ggml__pre": "qwen2", "ggml__bos_token_id": 5000}, r"bos_token is 5000, no token of 260"),
        ({"ggml__pre": "qwen2", "ggml__merges": "Ġ Ġ"}, r"merges' is missing or no array"),
    ],
)
def test_gguf_metadata_that_are_not_honoured_are_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    file = gguf(tmp_path / "a.gguf", NAMES, KINDS, **(BYTE_LEVEL | fields))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(file)


def test_minus_one_is_no_token_of_a_gguf_file(tmp_path: Path) -> None:
    absent = {"ggml__pre": "qwen2", "ggml__padding_token_id": -1}
    tokenizer = load_tokenizer(gguf(tmp_path / "a.gguf", NAMES, KINDS, **(BYTE_LEVEL | absent)))
    assert tokenizer.pad_token is None and tokenizer.eos_token == "<e>"


@pytest.mark.parametrize("unknown_kind", [2, 3])  # Gemma's file calls it a control piece
def test_gguf_pieces_are_tokenized_as_sentencepiece_does(tmp_path: Path, unknown_kind: int) -> None:
    right = sentencepiece.SentencePieceProcessor(
        model_file=str(
            train_sentencepiece(
                tmp_path, model_type="bpe", remove_extra_whitespaces=False,
                normalization_rule_name="identity",
            )
        )
    )  # fmt: skip
    ids = range(right.get_piece_size())
    kinds = [
        unknown_kind if right.is_unknown(i)
        else 3 if right.is_control(i) else 6 if right.is_byte(i) else 1
        for i in ids
    ]  # fmt: skip
    file = gguf(
        tmp_path / "a.gguf", [right.id_to_piece(i) for i in ids], kinds, ggml__model="llama",
        ggml__scores=[float(right.get_score(i)) for i in ids], ggml__bos_token_id=1,
        ggml__unknown_token_id=right.unk_id(),
    )  # fmt: skip
    tokenizer = load_tokenizer(file)
    for text in (TEXT, "  the wall", "été 🙂"):
        assert tokenizer(text)["input_ids"] == [1, *right.encode(text)]


@pytest.mark.parametrize(("files", "message"), [
    (("qwen.tiktoken", "tokenizer_config.json"), "qwen.tiktoken is a tiktoken vocabulary"),
    (("spiece.model",), "spiece.model is a SentencePiece vocabulary, of which a class decides"),
    (("sentencepiece.bpe.model",), "sentencepiece.bpe.model is a SentencePiece vocabulary"),
    (("vocab.json", "merges.txt"), "vocab.json does not say how text is split"),
    (("vocab.txt",), "vocab.txt does not say how text is split"),
    ((), "no tokenizer files here; put tokenizer.json or tokenizer.model"),
])  # fmt: skip
def test_vocabularies_that_do_not_say_how_text_is_split_are_refused_by_name(
    tmp_path, files, message
):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
