from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mqat.data.tokenizer import load_tokenizer, save_tokenizer, train_small_tokenizer

TEXT = "Où est 日本?  def f(x):\n\n    return x ** 2\t# 🙂"


def test_the_small_tokenizer_round_trips_any_text(tokenizer: Any) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    assert max(ids) < len(tokenizer) <= 600
    assert tokenizer.eos_token_id is not None


def test_training_gives_the_same_tokenizer_in_every_process() -> None:
    # Ranks train their own copy: set and hash order of a process must not matter.
    script = (
        "from mqat.data.packaged import python_docs_documents as docs\n"
        "from mqat.data.tokenizer import train_small_tokenizer\n"
        "print(train_small_tokenizer(docs()[:4], 400).backend_tokenizer.to_str())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size=100 cannot hold 256 bytes.*at least 257"):
        train_small_tokenizer(["text"], 100)


def test_saving_and_loading_keeps_tokens_template_and_end(tokenizer: Any, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path / "deep" / "tokenizer")
    loaded = load_tokenizer(tmp_path / "deep" / "tokenizer")
    assert loaded(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_a_place_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no usable tokenizer.*no such file"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no usable tokenizer.*put tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="no usable tokenizer"):
        load_tokenizer(tmp_path / "broken.gguf")


def test_the_packaged_gguf_brings_its_tokenizer(smollm2_tokenizer: Any) -> None:
    ids = smollm2_tokenizer("Hello  world\n\n été <|im_end|>")["input_ids"]
    assert ids[0] == 19556 and ids[-1] == smollm2_tokenizer.eos_token_id  # no begin token
    assert len(smollm2_tokenizer) == 49152
    assert "<|im_start|>" in smollm2_tokenizer.chat_template
