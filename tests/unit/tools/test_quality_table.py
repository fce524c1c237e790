"""The quality table: which runs are begun, and what its cells say."""

import json

from tools import quality_table


def test_a_finished_row_is_kept_and_an_interrupted_one_goes_on(tmp_path, monkeypatch):
    summary = tmp_path / "summary.json"
    calls = []

    def finish(command, **_):
        calls.append(command)
        summary.write_text(json.dumps({"finished": True, "ppl": {"ptq": 2.0}}))

    monkeypatch.setattr(quality_table.subprocess, "run", finish)
    for steps, recipe in ((0, "gpt_ptq.py"), (60, "gpt_qat.py")):
        summary.write_text(json.dumps({"finished": False, "ppl": {}}))
        for _ in range(2):
            found = quality_table.run("int8", tmp_path, steps, tmp_path / "conf.yaml", ["a.b=1"])
            assert found["ppl"] == {"ptq": 2.0}
        (command,) = calls
        assert any(recipe in word for word in command) and command[-1] == "a.b=1"
        assert ("trainer.max_steps=60" in command) == (steps == 60)
        calls.clear()


def test_distances_are_from_the_model_that_was_treated_alike():
    results = {"bf16": {"ppl": {"bf16": 10.0, "bf16_finetuned": 8.0}},
               "int8": {"ppl": {"ptq": 11.0, "qat": 9.0}}}  # fmt: skip
    text = quality_table.markdown(results, {"int8": {"ppl": 10.5}, "null": {"ppl": 10.1}})
    assert "| unquantized | 10.00 | - | 10.10 | 8.00 |" in text
    assert "| INT8 | 11.00 (+10.0%) | - | 10.50 (+5.0%) | 9.00 (+12.5%) |" in text
