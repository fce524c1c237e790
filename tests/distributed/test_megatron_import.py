"""Megatron-Core's own model, saved as Megatron-LM or NeMo do, gives its logits at another layout."""

import json
import shutil
import tarfile

import pytest
import torch
import yaml

from mqat.data.packaged import python_docs_documents
from mqat.data.tokenizer import train_small_tokenizer
from tests.distributed.ranks import run_ranks
from tests.distributed.test_import import WORKER as LOGITS
from tests.distributed.test_import import served
from tests.launch import mqat
from tests.unit.checkpoints.test_training_checkpoints import NEMO1, sentencepiece_model

MEGATRON = LOGITS.with_name("megatron_worker.py")
LIMIT = 1e-4  # float32, other summation order; logits reach beyond 3


def saved(tmp_path, out, tp, pp, *flags):
    """What Megatron saved, with its own logits of some tokens."""
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, tmp_path / "tokens-in.pt")
    files = (out, tmp_path / "tokens-in.pt", tmp_path / "own.pt")
    done = run_ranks(tp * pp, MEGATRON, *files, "--tp", tp, "--pp", pp, *flags, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return tokens, torch.load(tmp_path / "own.pt")


def check(tmp_path, path, tokens, expected, tp, pp):
    found = served(tmp_path, path, tokens, tp, pp)
    assert found.shape == expected.shape
    assert expected.abs().max() > 3
    assert (found - expected).abs().max() <= LIMIT
    assert (found[:, 1:] - expected[:, :-1]).abs().max() > LIMIT  # control


CASES = [
    (2, 1, 1, 1, ("--rope", "--tied")),
    pytest.param(1, 2, 2, 1, ("--layout", "halves", "--norms"), marks=pytest.mark.slow),
    pytest.param(2, 2, 1, 1, ("--layout", "layers", "--biases"), marks=pytest.mark.slow),
    pytest.param(2, 1, 1, 2, ("--tied", "--biases"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("tp", "pp", "to_tp", "to_pp", "flags"), CASES)
def test_a_checkpoint_of_megatron_lm_gives_the_logits_of_its_run(
    tmp_path, tp, pp, to_tp, to_pp, flags
):
    run = tmp_path / "run"
    tokens, expected = saved(tmp_path, run / "iter_0000100", tp, pp, "--args", *flags)
    (run / "latest_checkpointed_iteration.txt").write_text("100")
    tokenizer = run / "iter_0000100" / "tokenizer"
    train_small_tokenizer(python_docs_documents()[:1], 300).save_pretrained(tokenizer)
    check(tmp_path, run, tokens, expected, to_tp, to_pp)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--tied", "--biases"), ("--norms",)])
def test_rank_folders_of_nemo_give_the_logits_of_their_run(tmp_path, flags):
    """Tied with two stages, the last one has a copy of the embedding."""
    unpacked = tmp_path / "unpacked"
    tokens, expected = saved(
        tmp_path, unpacked, 2, 2, "--layout", "ranks", "--prefix", "model.", *flags
    )
    own = {"bias": "--biases" in flags, "qk_layernorm": "--norms" in flags}
    own |= {"share_embeddings_and_output_weights": "--tied" in flags}
    (unpacked / "0123_tokenizer.model").write_bytes(sentencepiece_model())
    config = NEMO1 | own | {"scale_positional_embedding": False}
    (unpacked / "model_config.yaml").write_text(yaml.safe_dump(config))
    with tarfile.open(tmp_path / "model.nemo", "w:") as archive:
        archive.add(unpacked, ".")
    shutil.rmtree(unpacked)
    check(tmp_path, tmp_path / "model.nemo", tokens, expected, 1, 1)


def test_import_takes_a_description_and_a_tokenizer_from_elsewhere(tmp_path):
    tokens, expected = saved(tmp_path, tmp_path / "weights", 1, 1, "--tied")
    described, tokenizer = tmp_path / "hf", tmp_path / "tokenizer"
    described.mkdir()
    config = {
        "model_type": "llama", "vocab_size": 301, "hidden_size": 64, "intermediate_size": 192,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
        "rms_norm_eps": 1e-6, "rope_theta": 5000.0, "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (described / "config.json").write_text(json.dumps(config))
    train_small_tokenizer(python_docs_documents()[:1], 300).save_pretrained(tokenizer)
    out = tmp_path / "checkpoint"
    refused = mqat("import", tmp_path / "weights", "--out", out)
    assert (refused.returncode, out.exists()) == (2, False)
    assert "--config-from HF_DIR" in refused.stderr
    done = mqat("import", tmp_path / "weights", "--out", out, "--config-from", described,
                "--tokenizer", tokenizer)  # fmt: skip
    assert done.returncode == 0, done.stderr
    check(tmp_path, out, tokens, expected[..., :301], 1, 1)
