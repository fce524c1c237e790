"""What users type, end to end, and what they see when the input is bad."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.device import environment
from tests.launch import ROOT, mqat, torchrun

SFT, PTQ, QAT, GENERATE = (
    ROOT / "examples" / f"gpt_{name}.py" for name in ("sft", "ptq", "qat", "generate")
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A few steps of gpt_sft.py on one process."""
    run = tmp_path_factory.mktemp("sft")
    done = torchrun(1, SFT, "trainer.max_steps=4", f"exp_manager.exp_dir={run}")
    assert done.returncode == 0, done.stderr[-3000:]
    return run


@pytest.mark.slow
def test_qat_story_on_eight_processes(tmp_path):
    done = torchrun(
        8,
        QAT,
        "--config",
        ROOT / "conf" / "qat_tiny.yaml",
        "trainer.max_steps=3",
        "model.pretrain.max_steps=6",
        f"exp_manager.exp_dir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"bf16", "bf16_finetuned", "ptq", "qat"} <= summary["ppl"].keys()
    assert summary["export"]["verified"] and summary["export"]["compared_with_checkpoint"]
    assert len(list((tmp_path / "trtllm").glob("rank*.safetensors"))) == 4
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [s["phase"] for s in steps] == ["pretrain"] * 6 + ["baseline"] * 3 + ["qat"] * 3
    assert all(s["tokens_per_second"] > 0 for s in steps)
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_loop_of_ones_own_trains_exports_and_is_verified(tmp_path):
    done = torchrun(2, ROOT / "examples" / "own_loop.py", "--steps", 30, "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "verified, 1 file of weights, every tensor equal to the checkpoint" in done.stdout
    before, after = map(float, re.findall(r"(\d+\.\d+)", done.stdout)[:2])
    assert after < before < 5.6  # nats a byte, of which there are 256


def test_ptq_then_generate_from_a_trained_checkpoint(trained, tmp_path):
    done = torchrun(
        1, PTQ, f"model.restore_from_path={trained}/checkpoint", f"exp_manager.exp_dir={tmp_path}",
        "exp_manager.quality_report=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "<svg" in (tmp_path / "quality" / "quality.html").read_text()
    report = tmp_path / "report"
    text = tmp_path / "text.txt"
    text.write_text("The def statement defines a function. " * 50, encoding="utf-8")
    done = mqat(
        "report", tmp_path / "checkpoint", "--text", text, "--out", report, "--seq-length", 64
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((report / "quality.json").read_text())["linears"]
    done = torchrun(2, GENERATE, tmp_path / "checkpoint", "The", "--tokens", 3,
                    "--tensor-parallel", 2)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("The")


def _chat_lines(count: int) -> list[str]:
    lines = []
    for number in range(count):
        question, answer = f"What is {number} plus {number}?", f"It is {2 * number}."
        turns = [("user", question), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in turns]
        either = {"input": question, "output": answer}, {"messages": messages}
        lines.append(json.dumps(either[number % 2]))
    return lines


def test_sft_on_answers_of_a_jsonl_file(tmp_path):
    data, run = tmp_path / "chat.jsonl", tmp_path / "run"
    data.write_text("\n".join(_chat_lines(400)) + "\n", encoding="utf-8")
    done = torchrun(
        2, SFT, "trainer.max_steps=12", "model.tensor_model_parallel_size=2",
        "model.data.packaged=null", "model.data.format=sft", f"model.data.train=[{data}]",
        f"model.data.validation=[{data}]", f"exp_manager.exp_dir={run}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    loss = json.loads((run / "summary.json").read_text())["loss"]
    assert loss["bf16_finetuned"] < 0.8 * loss["bf16"]
    assert "800 documents" in done.stdout  # both files


@pytest.mark.slow
def test_a_bad_line_names_file_and_line_or_is_counted(tmp_path):
    data = tmp_path / "chat.jsonl"
    lines = _chat_lines(200)
    lines[16] = '{"input": "no answer"}'
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = [
        "trainer.max_steps=1", "model.data.packaged=null", "model.data.format=sft",
        f"model.data.train=[{data}]",
        f"model.data.validation=[{data}]", f"exp_manager.exp_dir={tmp_path}/run",
    ]  # fmt: skip
    done = torchrun(2, SFT, *settings)
    assert done.returncode != 0 and f"{data}:17" in done.stderr
    done = torchrun(2, SFT, *settings, "model.data.bad_lines=skip")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 bad lines skipped" in done.stdout  # in both files


def test_export_verify_eval_and_inspect_commands(trained, tmp_path):
    checkpoint, out, text = trained / "checkpoint", tmp_path / "served", tmp_path / "text.txt"
    text.write_text("The def statement defines a function. " * 200, encoding="utf-8")
    assert mqat("export", checkpoint, "--out", out, "--inference-tp", 2).returncode == 0
    done = mqat("verify", out, "--reference", checkpoint, "--text", text, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["top1_agreement"] > 0.9
    losses = []
    for arguments in ([checkpoint], [out], [checkpoint, "--precision", "bf16"]):
        done = mqat("eval", *arguments, "--text", text, "--seq-length", 64, "--json")
        found = json.loads(done.stdout)
        losses.append(found["loss"])
        assert found["tokens"] % 64  # those after the last full window count too
    done = mqat("eval", out, "--text", text, "--seq-length", 64, "--stride", 16)
    assert f"over {found['tokens']} tokens" in done.stdout
    texts = []
    for model in (checkpoint, out):
        done = mqat(
            "generate", model, "The def", "A", "--max-tokens", 6, "--stop", "never comes", "--json"
        )
        *answers, speed = map(json.loads, done.stdout.splitlines())
        texts.append([answer["tokens"] for answer in answers])
        assert speed["speed"]["decode_tokens"] > 0, done.stderr
    assert [len(tokens) for tokens in texts[0]] == [6, 6] and texts[0] == texts[1]
    done = mqat(
        "generate", out, "The def", "--max-tokens", 6, "--stop", "never comes", "--no-cache"
    )
    assert "prompt 1; none of 'never comes' came" in done.stderr and "tokens/s" in done.stderr
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-2)  # the export is bf16
    assert losses[2] != losses[0]
    done = mqat("eval", out, "--text", text, "--precision", "bf16")
    assert done.returncode == 2 and "this is an export" in done.stderr
    assert "unquantized" in mqat("inspect", checkpoint).stdout
    done = mqat("report", checkpoint, "--text", text, "--out", tmp_path / "q", "--seq-length", 64)
    assert "error: quality report: nothing of this model is quantized" in done.stderr
    (out / "rank1.safetensors").unlink()
    assert mqat("verify", out).returncode == 1


@pytest.mark.parametrize(
    ("processes", "arguments", "message"),
    [
        (3, [], "world size 3 is not a multiple of tensor_model_parallel_size=2"),
        (1, ["trainer.max_step=3"], "did you mean 'max_steps'"),
        (1, ["model.restore_from_path=nowhere", "model.architecture=null",
             "model.tensor_model_parallel_size=1", "model.pipeline_model_parallel_size=1"],
         "nowhere: no such file or directory"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_a_status(processes, arguments, message, tmp_path):
    done = torchrun(processes, QAT, f"exp_manager.exp_dir={tmp_path}/run", *arguments)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1 and message in done.stderr
    assert "Traceback" not in done.stderr.split("error: ")[1].split("\n")[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", r"the file is empty", marks=pytest.mark.slow),
        (b"caf\xe9 au lait", r"text.txt:1: not UTF-8"),
    ],
)
def test_bad_text_stops_every_rank(tmp_path, content, message):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    done = torchrun(
        2, SFT, f"exp_manager.exp_dir={tmp_path}/run", "model.data.packaged=null",
        f"model.data.train=[{text}]", f"model.data.validation=[{text}]",
    )  # fmt: skip
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.slow
def test_the_command_starts_its_processes_and_nothing_follows_their_one_line(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("four tokens")
    done = subprocess.run(
        [
            sys.executable, "-m", "mqat.cli", "sft", "--config", str(ROOT / "conf" / "sft_tiny.yaml"),
            "--nproc-per-node", "2", f"exp_manager.exp_dir={tmp_path}/run", "model.data.packaged=null",
            f"model.data.train=[{text}]", f"model.data.validation=[{text}]",
        ],
        env=environment(1) | {"PYTHONPATH": str(ROOT)},
        check=False, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: 1 documents have")


@pytest.mark.slow
def test_a_full_disk_ends_all_ranks_and_leaves_no_checkpoint(tmp_path):
    done = torchrun(
        2, SFT, "trainer.max_steps=2", "exp_manager.checkpoint_interval=1",
        "model.tensor_model_parallel_size=2", f"exp_manager.exp_dir={tmp_path}",
        timeout=120, file_bytes=1 << 20,
    )  # fmt: skip
    assert done.returncode != 0
    assert "step_00000001: writing the checkpoint failed: rank 0" in done.stderr
    assert done.stderr.count("\nerror: ") == 1
    assert list((tmp_path / "checkpoints" / "sft").iterdir()) == []


@pytest.mark.slow
def test_training_ended_at_random_goes_on_to_the_same_losses(tmp_path):
    variables = environment(1) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def command(run: str) -> list[str]:
        return [
            sys.executable, str(SFT), "trainer.max_steps=8", "exp_manager.checkpoint_interval=1",
            "trainer.limit_val_samples=4", f"exp_manager.exp_dir={tmp_path / run}",
        ]  # fmt: skip

    def finish(run: str) -> str:
        done = subprocess.run(
            command(run), env=variables, check=True, capture_output=True, text=True, timeout=200
        )
        return done.stdout

    def steps(run: str) -> list[dict]:
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def checkpoints() -> set[str]:
        return {path.name for path in (tmp_path / "killed").glob("checkpoints/sft/step_*")}

    finish("whole")
    moment = random.Random(0)
    for number in (signal.SIGKILL, signal.SIGTERM):
        before, start = checkpoints(), time.monotonic()
        with (tmp_path / "said").open("wb") as said:  # no pipe: writers may outlive a killed rank
            process = subprocess.Popen(
                command("killed"), env=variables, stdout=subprocess.DEVNULL, stderr=said
            )
        while len(checkpoints() - before) < 1:
            assert time.monotonic() - start < 200 and process.poll() is None
            time.sleep(0.02)
        time.sleep(moment.uniform(0.0, 1.0))  # within a step or while the next one is written
        process.send_signal(number)
        process.wait()
    # The last one was asked, not killed: it finished its step, saved, and said so.
    words = "interrupted by SIGTERM: sft ended after step (\\d) of 8 and saved"
    (step,) = re.findall(words, (tmp_path / "said").read_text())
    assert process.returncode == 128 + signal.SIGTERM
    assert max(checkpoints()) == f"step_{int(step):08d}" and len(checkpoints()) == 2  # keep_last
    assert "resumed from" in finish("killed")  # it went on, it did not start over
    losses = {run: [(s["step"], s["loss"]) for s in steps(run)] for run in ("killed", "whole")}
    assert losses["killed"] == losses["whole"]  # each step once, in order


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "CosineAnnealing"])
def test_a_finished_run_goes_on_for_more_steps(tmp_path, schedule):
    def train(run: str, steps: int, *arguments: str) -> list[dict]:
        done = torchrun(
            1, SFT, f"trainer.max_steps={steps}", f"exp_manager.exp_dir={tmp_path / run}",
            "exp_manager.resume_if_exists=true", f"model.optim.sched.name={schedule}",
            "model.optim.sched.warmup_steps=0", "trainer.limit_val_samples=4", *arguments,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    whole = train("whole", 6)
    train("longer", 3)
    longer = train("longer", 6, "exp_manager.resume_changes=[trainer.max_steps]")
    assert [s["step"] for s in longer] == [1, 2, 3, 4, 5, 6]
    assert [s["lr"] for s in longer[3:]] == [s["lr"] for s in whole[3:]]
    same = [a["loss"] == b["loss"] for a, b in zip(longer, whole, strict=True)]
    if schedule == "constant":
        assert all(same)
    else:  # control: the first steps had the shorter cosine
        assert longer[1]["lr"] != whole[1]["lr"] and not same[-1]
