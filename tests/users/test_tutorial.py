"""The tutorial's commands, one after the other, with a tiny model in the place of the reader's."""

import json
import re
import shlex

import pytest

from tests.launch import ROOT, mqat
from tests.unit.test_docs import blocks

PAGE = ROOT / "docs" / "tutorial.md"


def conversation(number):
    turns = [
        {"role": "user", "content": f"What is {number} plus {number}?"},
        {"role": "assistant", "content": f"It is {2 * number}."},
    ]
    return json.dumps({"messages": turns}) + "\n"


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
    """What the page's first section asks for: `my-model`, the data, a text."""
    config = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_attention_heads": 4,
              "num_query_groups": 2, "vocab_size": 300}  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, numbers in (("train", range(200)), ("heldout", range(200, 240))):
        (tmp_path / f"{name}.jsonl").write_text("".join(map(conversation, numbers)))
    (tmp_path / "my-text.txt").write_text("What is 2 plus 2? It is 4. " * 40)
    settings = [f"model.architecture.{key}={value}" for key, value in config.items()]
    done = mqat(
        "sft", *settings, "quantization.algorithm=null", "trainer.max_steps=2",
        "model.data.format=sft", "export.format=hf",
        "model.data.train=[train.jsonl]", "model.data.validation=[heldout.jsonl]",
        "model.data.seq_length=64", "exp_manager.exp_dir=sft", "export.save_path=my-model",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp_path


@pytest.mark.slow
def test_every_command_of_the_tutorial_works(readers_folder):
    for _, text in blocks(PAGE, "yaml"):
        (readers_folder / "my.yaml").write_text(text)
    commands = [line for _, text in blocks(PAGE, "bash") for line in text.splitlines()]
    assert len(commands) == 7
    said = {}
    for command in commands:
        name, *arguments = shlex.split(command)
        assert name == "mqat"
        done = mqat(*arguments)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        said[arguments[0]] = done.stdout
    assert "TP 2 x PP 1" in said["plan"]
    assert "verified" in said["verify"] and "not compared: tokenizer files" in said["verify"]
    assert re.search(r"perplexity \d", said["eval"])
    run = readers_folder / "runs" / "my-qat"
    assert "verified</strong>" in (run / "report.html").read_text("utf-8")
    assert "gained" in (run / "quality" / "quality.html").read_text("utf-8")
