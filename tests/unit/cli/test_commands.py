"""What commands refuse before they do anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mqat.cli import launch
from mqat.cli.__main__ import main
from mqat.config import COMMANDS
from mqat.plan.catalogue import recipes
from mqat.training import recipes as stories


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


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate C", "no prompt; give some after the model"),
        ("generate C a --top-k 3", "top_k=3, top_p=1 with temperature 0"),
        ("generate C a --stop=", "stop: an empty string"),
        ("generate C a --system b", "--system goes with --chat"),
        ("eval C", "nothing to evaluate; give --text FILE, --tasks NAMES"),
        ("eval C --text T --limit 3 --chat", "--limit, --chat: goes with --tasks"),
        ("eval C --tasks wikitext --stride 3", "--stride goes with --text"),
        ("eval C --text T --compile", "--compile goes with --lowered"),
        ("eval C --text T --out nowhere/F", "its folder does not exist"),
    ],
)
def test_what_means_nothing_is_refused_before_a_model_is_read(
    command, message, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["mqat", *command.split()])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2 and message in capsys.readouterr().err


def test_a_style_with_its_format_is_honoured(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = f"mqat export {tiny('fp8')} --out {out} --format hf --style modelopt"
    monkeypatch.setattr(sys, "argv", command.split())
    main()
    assert (out / "hf_quant_config.json").is_file()
    assert "hf, modelopt. Check it with: mqat verify" in capsys.readouterr().out


def run(monkeypatch, *arguments):
    """Exit status of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["mqat", *map(str, arguments)])
    try:
        main()
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("verify gone", "gone: no such file or directory"),
        ("verify empty", "empty: holds no export"),
        ("verify text", "text: not a .qnemo archive"),
        ("verify llama", "llama: is for llama.cpp, whose rounding of inputs no reader here has"),
        ("verify CHECKPOINT", "is a checkpoint, of which mqat export makes a directory"),
        ("inspect gone", "gone: no such file or directory"),
        ("inspect empty", "empty: config.json: unreadable"),
        ("eval gone --text text", "gone: no such file or directory"),
        ("eval empty --text text", "empty: no pretrained model found"),
        ("import gone --out new", "gone: no such file or directory"),
        ("import empty --out text", "text exists already"),
        ("export gone --out new", "gone: no such file or directory"),
        ("export empty --out new", "empty: not a complete mqat checkpoint"),
        ("report gone --text text --out new", "gone: no such file or directory"),
        ("plan --config gone --world-size 1", "config file gone: No such file"),
        ("plan --config broken --world-size 1", "config file broken: not valid YAML"),
        ("config nonsense", "unknown key 'nonsense'; mqat config lists them all"),
        ("recipes cp nonsense", "nonsense: no such recipe or file"),
        ("recipes cp qat_tiny text", "text exists already"),
        ("recipes cp qat_tiny gone/own.yaml", "there is no directory gone"),
        ("recipes cp text new", "text: is a file, not the name of a recipe"),
        ("recipes check qat_tiny", "say how many processes: --world-size N"),
        ("recipes check qat_tiny --world-size 3", "world size 3 is not a multiple of"),
        ("recipes check ptq_tiny --world-size 1", "give its config.json as --model-config"),
        ("run nonsense", "nonsense: no such recipe or file"),
        ("run empty", "empty: no such recipe or file"),
        ("run silent.yaml", "silent.yaml: does not say what is to be done with it"),
        ("run qat_tiny --nproc-per-node 4 model.lr=1", "unknown key 'model.lr'"),
        ("run qat_tiny trainer.num_nodes=2", "torchrun --nnodes 2 --nproc-per-node N"),
        ("qat --config gone", "config file gone: No such file"),
        ("ptq nonsense", "argument 'nonsense': expected section.key=value"),
    ],
)
def test_misuse_is_one_line_and_status_2(command, message, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text").write_text("text")
    Path("llama").mkdir()
    for name in ("config.json", "model.gguf"):
        Path("llama", name).touch()
    Path("broken").write_text("{\n\n- :")
    Path("silent.yaml").write_text("trainer:\n  max_steps: 1\n")
    words = command.replace("CHECKPOINT", str(tiny("int8"))).split()
    assert run(monkeypatch, *words) == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if "Warning" not in s]
    assert line.startswith("error: ") and message in line
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "broken",
        "empty",
        "llama",
        "silent.yaml",
        "text",
    ]


def test_recipes_are_listed_and_one_is_copied_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes())
    assert run(monkeypatch, "recipes", "cp", "qat_llama3_8b_8da4w", "own.yaml") == 0
    assert Path("own.yaml").read_bytes() == recipes()["qat_llama3_8b_8da4w"].read_bytes()
    capsys.readouterr()
    check = ["recipes", "check", "own.yaml", "--world-size", "16", "trainer.devices=16"]
    assert run(monkeypatch, *check, "model.pipeline_model_parallel_size=2") == 0
    said = capsys.readouterr().out
    assert "layout: TP 2 x PP 2 x CP 1 x DP 4 + sequence parallel" in said
    assert (
        "train.jsonl (model.data.train)" in said and "weights and tokenizer of Meta-Llama-3" in said
    )
    assert said.rstrip().endswith("fits 16 processes; start it: mqat run own.yaml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own.yaml"]


@pytest.mark.parametrize("command", COMMANDS)
def test_run_does_what_the_file_says_with_the_keys_behind_options(command, tmp_path, monkeypatch):
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"command": command, "trainer": {"devices": 8, "seed": 1}}))
    ran, started = [], []
    monkeypatch.setattr(stories, f"run_{command}", ran.append)
    monkeypatch.setattr(launch, "_launch", lambda *given: started.append(given))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert run(monkeypatch, "run", own) == 0 and not ran
    assert started == [(8, ["trainer.devices=8"])]
    options = ("--nproc-per-node", "1", "trainer.seed=3", "model.optim.lr=1")
    assert run(monkeypatch, "run", own, "model.optim.eps=2", *options) == 0
    (config,) = ran
    assert (config.trainer.devices, config.trainer.seed) == (1, 3)
    assert (config.model.optim.lr, config.model.optim.eps) == (1, 2)
    monkeypatch.setenv("WORLD_SIZE", "8")  # under torchrun it starts nothing
    assert run(monkeypatch, "run", own) == 0 and len(ran) == 2 and len(started) == 1
    assert run(monkeypatch, "run", own, "--nproc-per-node", "8") == 2


def test_completions_know_commands_recipes_and_keys(monkeypatch, capsys):
    try:
        import shtab
    except ImportError:
        assert run(monkeypatch, "completion", "bash") == 2
        assert "pip install 'mqat[completion]'" in capsys.readouterr().err
        return
    assert shtab and run(monkeypatch, "completion", "bash") == 0
    script = capsys.readouterr().out
    assert "model.optim.lr" in script and "qat_llama3_8b_8da4w" in script
    done = subprocess.run(["bash", "-n"], input=script, text=True, env=os.environ)
    assert done.returncode == 0
