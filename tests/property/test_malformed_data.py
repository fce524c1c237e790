"""Damaged data and tokenizer files: right labels and ids, or one UserError that names the file."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import ByteLevelBPETokenizer, Tokenizer, pre_tokenizers

from mqat.data.chat import tokenize_conversation
from mqat.data.documents import ReadStats, read_conversations, read_texts
from mqat.data.tokenizer import load_tokenizer
from mqat.errors import UserError

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "wrong", "weight": 0},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "answer"},
]
CALLING = [
    {"role": "user", "content": "weather"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "rain"},
    {"role": "assistant", "content": "it rains", "train": True},
]
ROWS = {
    "messages": {"messages": CHAT, "id": 7},
    "tools": {"messages": CALLING, "tools": [TOOL]},
    "sharegpt": {"system": "s", "conversations": [{"from": "human", "value": "question"},
                                                  {"from": "gpt", "value": "answer"}]},
    "alpaca": {"instruction": "do", "input": "it", "output": "answer"},
    "pair": {"input": "question", "output": "answer"},
    "completion": {"prompt": CHAT[:4], "completion": CHAT[4:]},
}  # fmt: skip
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}[{{ m.role }}]"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
OTHER = [
    None,
    0,
    1,
    -1,
    0.5,
    True,
    False,
    "",
    "x",
    " ",
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
    ["x"],
    10**400,
]
KEYS = ["x", "role", "content", "weight", "mask", "text", "from", "output", "content ", "Role"]


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in children:
        yield (*path, key)
        yield from nodes(child, (*path, key))


def damaged(value: Any, draw: random.Random) -> str:
    """JSON text of a value with one to three places dropped, emptied, retyped, renamed or doubled."""
    value = copy.deepcopy(value)
    doubled = ""
    for _ in range(draw.choice((1, 1, 2, 3))):
        paths = list(nodes(value))
        if not paths:
            break
        *way, key = draw.choice(paths)
        parent = value
        for step in way:
            parent = parent[step]
        kind = draw.choice(("drop", "retype", "retype", "rename", "double", "swap"))
        if kind == "drop":
            del parent[key]
        elif kind == "retype":
            parent[key] = copy.deepcopy(draw.choice(OTHER))
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw.choice(KEYS)] = parent.pop(key)
        elif kind == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif kind == "double":
            doubled = json.dumps(key)
            parent["\0twice"] = copy.deepcopy(draw.choice(OTHER))
        elif isinstance(parent, list):
            draw.shuffle(parent)
    return json.dumps(value).replace(json.dumps("\0twice"), doubled)


def learnt(row: dict[str, Any]) -> list[str]:
    """What must be learnt of a row that was accepted, read without the reader."""
    if "messages" in row:
        turns = row["messages"]
    elif "conversations" in row:
        turns = [
            {"content": t.get("value"), **t, "role": t.get("from", t.get("role"))}
            for t in row["conversations"]
        ]
    elif isinstance(row.get("completion"), list):
        turns = row["completion"]
    else:
        turns = [{"role": "assistant", "content": row.get("output", row.get("completion"))}]
    marks = ("weight", "train")
    return [
        t
        for t in turns
        if t["role"] in ("assistant", "gpt")
        and all(t.get(mark) in (None, True, 1) for mark in marks)
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    trained = ByteLevelBPETokenizer()
    text = "question answer it rains wrong again\n"
    trained.train_from_iterator(
        [text], vocab_size=280, special_tokens=["<|end|>", "<s>"], show_progress=False
    )
    trained._tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>",
        "bos_token": {"content": "<s>"}, "additional_special_tokens": ["<s>"], "model_max_length": 512,
        "chat_template": TEMPLATE,
        "added_tokens_decoder": {"0": {"content": "<|end|>", "special": True}},
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def test_damaged_rows_give_right_labels_or_one_error(source: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(source)
    outcomes: Counter[str] = Counter()
    for form, row in ROWS.items():
        for seed in range(80):
            text = damaged(row, random.Random(f"{form} {seed}"))
            file = tmp_path / "a.jsonl"
            file.write_text(text)
            try:
                (conversation,) = read_conversations([file], "error", ReadStats())
                ids, answer = tokenize_conversation(
                    conversation.messages, tokenizer, conversation.tools
                )
            except UserError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
                continue
            labels = tokenizer.decode([i for i, k in zip(ids, answer, strict=True) if k])
            expected = learnt(json.loads(text))
            turns = labels.split("<|end|>")[:-1]
            assert len(turns) == len(expected), text
            for turn, message in zip(turns, expected, strict=True):
                content = message.get("content")
                if isinstance(content, list):
                    content = "".join(part["text"] for part in content)
                assert turn.startswith(content or ""), text
                assert ("look" in turn) == bool(message.get("tool_calls")) or "tool" in form, text
            outcomes["right labels"] += 1
    assert min(outcomes.values()) > 60, outcomes


def test_damaged_texts_are_read_whole_or_refused(tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    file = tmp_path / "a.json"
    for seed in range(120):
        text = damaged({"text": "a document", "id": 1, "meta": {"x": [1]}}, random.Random(seed))
        file.write_text(text)
        try:
            documents = read_texts([file], "error", ReadStats())
        except UserError:
            outcomes["refused"] += 1
            continue
        assert documents == [json.loads(text)["text"]]
        outcomes["read"] += 1
    assert min(outcomes.values()) > 15, outcomes


PROBES = ["question answer\n\n1871", "it<|end|> rains", ""]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizer_files_give_the_ids_of_tokenizer_json_or_one_error(
    source: Path, tmp_path: Path, name: str
) -> None:
    outcomes: Counter[str] = Counter()
    value = json.loads((source / name).read_text())
    if name == "tokenizer.json":  # most of it is a vocabulary; draw from the rest as often
        value["model"]["merges"] = value["model"]["merges"][:2]
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for seed in range(150):
        part = dict(value)
        draw = random.Random(seed)
        if name == "tokenizer.json" and draw.random() < 0.7:
            vocabulary = part["model"]["vocab"]
            text = damaged(part | {"model": part["model"] | {"vocab": {}}}, draw)
            text = text.replace('"vocab": {}', f'"vocab": {json.dumps(vocabulary)}')
        else:
            text = damaged(part, draw)
        (tmp_path / name).write_text(text)
        try:
            tokenizer = load_tokenizer(tmp_path)
            ids = [tokenizer(probe)["input_ids"] for probe in PROBES]
        except UserError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        right = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        right.no_truncation()
        right.no_padding()
        assert ids == [right.encode(probe).ids for probe in PROBES], text
        outcomes["right ids"] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_damaged_sentencepiece_files_give_sentencepieces_ids_or_one_error(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("question answer it rains wrong again\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "train.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=40,
        model_type="bpe", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    whole = (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    outcomes: Counter[str] = Counter()
    for seed in range(80):
        draw = random.Random(seed)
        data = bytearray(whole)
        for _ in range(draw.choice((1, 2, 8))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        content = bytes(data[: draw.choice((len(data), len(data), draw.randrange(len(data))))])
        (tmp_path / "tokenizer.model").write_bytes(content)
        try:
            ids = [
                load_tokenizer(tmp_path)(probe)["input_ids"] for probe in ("question", "it  rains")
            ]
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        right = sentencepiece.SentencePieceProcessor(model_proto=content)
        assert ids == [right.encode(probe) for probe in ("question", "it  rains")]
        outcomes["right ids"] += 1
    assert min(outcomes.values()) > 5, outcomes


def test_damaged_gguf_metadata_give_the_same_ids_or_one_error(tmp_path: Path) -> None:
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<e>"]
    writer = pytest.importorskip("gguf").GGUFWriter(tmp_path / "whole.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_eos_token_id(len(names) - 1)
    writer.add_token_list(names)
    writer.add_token_types([1] * (len(names) - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    whole = (tmp_path / "whole.gguf").read_bytes()
    right = load_tokenizer(tmp_path / "whole.gguf")("ab 12")["input_ids"]
    outcomes: Counter[str] = Counter()
    for seed in range(150):
        draw = random.Random(seed)
        data = bytearray(whole)
        for _ in range(draw.choice((1, 2))):  # lengths, types and counts stand at the beginning
            data[draw.randrange(draw.choice((200, len(data))))] = draw.randrange(256)
        (tmp_path / "a.gguf").write_bytes(
            data[: draw.choice((len(data), draw.randrange(len(data))))]
        )
        try:
            ids = load_tokenizer(tmp_path / "a.gguf")("ab 12")["input_ids"]
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
            continue
        # A letter of another token may be damaged: it cannot be known.
        assert ids == right
        outcomes["same ids"] += 1
    assert min(outcomes.values()) > 5, outcomes
