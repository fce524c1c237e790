"""The export commands as users run them: imported models, trained ones, one process and several."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mqat.data.packaged import python_docs_documents
from mqat.data.tokenizer import train_small_tokenizer
from mqat.verify.verify import verify_export
from tests.distributed.ranks import run_ranks
from tests.distributed.test_import import family
from tests.launch import mqat, torchrun

WORKER = Path(__file__).with_name("worker.py")


def contents(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir()}


@pytest.fixture(
    scope="module", params=["llama-untied", pytest.param("qwen2", marks=pytest.mark.slow)]
)
def imported(request, tmp_path_factory):
    """A Hugging Face directory in bfloat16 and the checkpoint imported from it."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("imported")
    model = family(request.param, {
        "vocab_size": 301, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }).bfloat16()  # fmt: skip
    for parameter in model.parameters():
        if parameter.dim() == 1:  # transformers starts with biases of zero
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.generation_config.eos_token_id = [3, 5]
    model.save_pretrained(root / "hf")
    train_small_tokenizer(python_docs_documents()[:2], 300).save_pretrained(root / "hf")
    done = mqat("import", root / "hf", "--out", root / "checkpoint", "--tensor-parallel", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def test_an_imported_model_comes_out_bit_for_bit(imported, tmp_path):
    out = tmp_path / "out"
    done = mqat("export", imported / "checkpoint", "--format", "hf", "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (load_file(path / "model.safetensors") for path in (imported / "hf", out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [3, 5]
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(contents(out))
    (again := tmp_path / "again").mkdir()
    shutil.copytree(out, again / "hf")
    done = mqat("import", again / "hf", "--out", again / "checkpoint")
    assert done.returncode == 0, done.stderr[-3000:]
    done = mqat("verify", out, "--reference", again / "checkpoint", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["compared_with_checkpoint"]
    assert report["mean_kl"] < 1e-8  # sums of float32 in another order: 2e-9


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same quantized model from two training layouts."""
    root = tmp_path_factory.mktemp("trained")
    for name, processes, options in (("one", 1, []), ("two", 2, ["--tp", "2", "--sp"])):
        jobs = root / f"{name}.json"
        jobs.write_text(json.dumps([[str(root / name), *options]]))
        done = run_ranks(processes, WORKER, jobs)
        assert done.returncode == 0, done.stderr[-4000:]
    return root


def test_bytes_do_not_depend_on_the_training_layout_or_on_how_many_write(trained, tmp_path):
    written = {}
    for layout in ("one", "two"):
        out = tmp_path / layout
        done = mqat("export", trained / layout / "ptq", "--format", "hf", "--out", out,
                    "--max-shard-gb", 0.0002)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        written[layout] = contents(out)
    out = tmp_path / "together"
    done = torchrun(2, "mqat.cli", "export", trained / "two" / "ptq", "--format", "hf", "--out", out,
                    "--max-shard-gb", 0.0002)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert written["one"] == written["two"] == contents(out)
    assert sum(name.endswith(".safetensors") for name in written["one"]) > 2
    report = verify_export(out, reference=trained / "one" / "ptq", tokens=torch.arange(16)[None])
    assert report.problems == [] and report.compared_with_checkpoint
    table = mqat("inspect", out).stdout
    assert "model.layers.3.mlp.down_proj" in table and "int8 per channel" in table


def test_a_damaged_directory_has_status_1_and_names_the_tensor(imported, tmp_path):
    checkpoint, out = imported / "checkpoint", tmp_path / "out"
    assert mqat("export", checkpoint, "--format", "hf", "--out", out).returncode == 0
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-6] ^= 1
    (out / "model.safetensors").write_bytes(data)
    done = mqat("verify", out, "--reference", checkpoint)
    assert done.returncode == 1 and "model.norm.weight is not the checkpoint's" in done.stdout


def test_options_that_do_not_belong_together_are_one_line(trained, tmp_path):
    done = mqat("export", trained / "one" / "ptq", "--format", "hf", "--inference-tp", 2,
                "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 2 and "servers split the weights themselves" in done.stderr
    assert "Traceback" not in done.stderr
