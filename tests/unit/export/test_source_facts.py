"""What exports take over from a model's source, and what of it they cannot hold."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mqat.export import export
from tests.unit.export.checkpoints import TINY, all_layers, tensors_of, write_checkpoint

IDS = {"bos_token_id": 1, "eos_token_id": [0, 2]}


def write(form, checkpoint, out, dtype="bfloat16"):
    more = {"tensor_parallel": 1} if form is export.export_trtllm else {}
    form(checkpoint, out, dtype=dtype, **more)


FORMS = pytest.mark.parametrize("form", [export.export_hf, export.export_trtllm])


@FORMS
def test_stop_tokens_of_the_source_travel(form, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "c", replace(TINY, token_ids=IDS), {})
    write(form, checkpoint, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings == {"_from_model_config": True} | IDS
    if form is export.export_hf:
        assert IDS.items() <= json.loads((tmp_path / "out" / "config.json").read_text()).items()


@FORMS
def test_generation_settings_of_the_source_stay_as_they_are(form, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "c", replace(TINY, token_ids=IDS), {})
    text = '{"eos_token_id": [0, 2, 7],\n "temperature": 0.6}'
    (checkpoint / "tokenizer" / "generation_config.json").write_text(text)
    write(form, checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == text


@FORMS
@pytest.mark.parametrize("algorithm", ["null", "int8"])
def test_float16_that_overflows_is_refused_before_anything_is_written(
    form, algorithm, tmp_path, monkeypatch
):
    layers = all_layers(algorithm)
    state = tensors_of(TINY, layers)
    state["embedding.word_embeddings.weight"][300, 5] = (
        65520.0  # rounds to infinity, 65519 does not
    )
    checkpoint = write_checkpoint(tmp_path / "c", TINY, layers, tensors=state)
    made = []
    monkeypatch.setattr(export.AtomicDirectory, "create", lambda self: made.append(self))
    with pytest.raises(ValueError, match=r"embed.*weight: has elements beyond 65504.*bfloat16"):
        write(form, checkpoint, tmp_path / "out", "float16")
    assert not made and sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    monkeypatch.undo()
    write(form, checkpoint, tmp_path / "out")  # control
    state["embedding.word_embeddings.weight"][300, 5] = 65519.0
    fitting = write_checkpoint(tmp_path / "d", TINY, layers, tensors=state)
    write(form, fitting, tmp_path / "half", "float16")
