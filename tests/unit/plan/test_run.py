"""What a plan refuses before anything is loaded."""

import pytest

from mqat.config import load_config
from mqat.plan.run import make_plan

ARCHITECTURE = "model.architecture={hidden_size: 64, num_layers: 2, vocab_size: 256}"


def test_data_files_that_are_not_there_are_named(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("text")
    keys = [ARCHITECTURE, f"model.data.validation=[{text}]", "model.global_batch_size=1"]
    make_plan(load_config(None, [*keys, f"model.data.train=[{text}]"]))  # control
    missing = f"model.data.train=[{text},{tmp_path}/gone.txt]"
    with pytest.raises(ValueError, match=r"model\.data\.train: .*/gone\.txt: no such file"):
        make_plan(load_config(None, [*keys, missing]))
