"""What commands refuse before they do anything."""

import sys

import pytest

from mqat.cli.__main__ import main


@pytest.mark.parametrize(
    "arguments",
    [
        "verify D --tokens -1",
        "verify D --tokens 0",
        "export C --out D --inference-tp 0",
        "report C --text T --out D --tensor-parallel 0",
        "import S --out D --pipeline-parallel -2",
    ],
)
def test_a_count_is_at_least_one(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mqat", *arguments.split()])
    with pytest.raises(SystemExit):
        main()
    assert f"{arguments.split()[-1]} must be an integer of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--style modelopt", "export.style='modelopt': trtllm has none"),
        ("--max-shard-gb 2", "leave out --max-shard-gb"),
        ("--format hf --allow-requantization", "leave out export.allow_requantization"),
        ("--format hf --qnemo", "a .qnemo holds a TensorRT-LLM directory"),
    ],
)
def test_an_export_option_of_another_form_is_refused(
    options, message, tiny, tmp_path, monkeypatch, capsys
):
    out, checkpoint = tmp_path / "out", str(tiny("fp8"))
    command = ["mqat", "export", checkpoint, "--out", str(out), *options.split()]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2 and message in capsys.readouterr().err
    assert not out.exists()


def test_a_style_with_its_format_is_honoured(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = f"mqat export {tiny('fp8')} --out {out} --format hf --style modelopt"
    monkeypatch.setattr(sys, "argv", command.split())
    main()
    assert (out / "hf_quant_config.json").is_file()
    assert "hf, modelopt. Check it with: mqat verify" in capsys.readouterr().out
