"""What a plan refuses before anything is loaded."""

import pytest

from mqat.config import load_config
from mqat.plan.run import describe, make_plan

ARCHITECTURE = "model.architecture={hidden_size: 64, num_layers: 2, vocab_size: 256}"


def test_data_files_that_are_not_there_are_named(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("text")
    keys = [ARCHITECTURE, f"model.data.validation=[{text}]", "model.global_batch_size=1"]
    make_plan(load_config(None, [*keys, f"model.data.train=[{text}]"]))  # control
    missing = f"model.data.train=[{text},{tmp_path}/gone.txt]"
    with pytest.raises(ValueError, match=r"model\.data\.train: .*/gone\.txt: no such file"):
        make_plan(load_config(None, [*keys, missing]))


def test_unquantized_training_says_that_nothing_is_quantized(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("text")
    keys = [
        ARCHITECTURE, f"model.data.train=[{text}]", f"model.data.validation=[{text}]",
        "model.global_batch_size=1", "quantization.algorithm=int8", "quantization.kv_cache=int8",
    ]  # fmt: skip
    said = describe(make_plan(load_config(None, [*keys, "command=qat"])))
    assert (said["quantized linears"], said["algorithm"], said["key/value cache"]) == (
        8,
        "int8",
        "int8",
    )
    said = describe(make_plan(load_config(None, [*keys, "command=sft"])))
    assert (said["quantized linears"], said["algorithm"], said["key/value cache"]) == (
        0,
        "none",
        None,
    )
    with pytest.raises(ValueError, match="int9"):  # what is not used is still to be known
        make_plan(load_config(None, [*keys, "command=sft", "quantization.algorithm=int9"]))
