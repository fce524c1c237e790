"""Checkpoints of Megatron-LM and NeMo are read, or refused in a line; their pickles run no code."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mqat.checkpoints import rank_folders
from mqat.checkpoints.folder import Folder
from mqat.checkpoints.huggingface import HuggingFaceCheckpoint
from mqat.checkpoints.megatron import check_family
from mqat.checkpoints.source import open_pretrained
from mqat.checkpoints.training_words import from_transformer_config
from mqat.data.tokenizer import load_tokenizer, train_small_tokenizer
from mqat.models.decoder import FAMILIES
from mqat.models.hf_keys import hf_shapes
from mqat.models.structure import DENSE_LINEARS, PLAIN_LINEARS, by_name
from mqat.runtime import groups
from tests.distributed import megatron_worker as worker
from tests.unit.checkpoints.malformed_sources import good, write_directory

LAYOUTS = {"stacked": "", "layers": "module.", "halves": "module.", "nemo": "model."}
NEMO1 = {
    "mcore_gpt": True, "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 192, "kv_channels": 24,
    "num_attention_heads": 4, "num_query_groups": 2, "encoder_seq_length": 128, "bias": False,
    "normalization": "rmsnorm", "activation": "fast-swiglu", "layernorm_epsilon": 1e-6,
    "position_embedding_type": "rope", "rotary_base": 5000.0, "rotary_percentage": 1.0,
    "share_embeddings_and_output_weights": False, "qk_layernorm": True,
    "transformer_block_type": "pre_ln", "seq_len_interpolation_factor": None,
    "scale_positional_embedding": True, "mcore_customization_config": {},
    "tokenizer": {"library": "sentencepiece", "model": "nemo:0123_tokenizer.model"},
    "optim": {"lr": 1e-4}, "precision": "bf16",
}  # fmt: skip
NEMO2 = {
    "_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel",
    "config": {
        "_target_": "nemo.collections.llm.gpt.model.llama.Llama31Config8B", "num_layers": 4,
        "hidden_size": 64, "ffn_hidden_size": 192, "num_attention_heads": 4, "num_query_groups": 2,
        "kv_channels": 24, "seq_length": 128, "normalization": "RMSNorm", "layernorm_epsilon": 1e-6,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "gated_linear_unit": True, "position_embedding_type": "rope", "rotary_base": 5000,
        "rotary_percent": 1.0, "share_embeddings_and_output_weights": False, "qk_layernorm": True,
        "scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192,
    },
    "tokenizer": {"pretrained_model_name": "nemo_tokenizer"},
}  # fmt: skip


def options(**changes: Any) -> argparse.Namespace:
    plain = {
        "tp": 1,
        "pp": 1,
        "tied": False,
        "norms": True,
        "biases": False,
        "rope": True,
        "args": True,
    }
    return argparse.Namespace(**{**plain, "layout": "stacked", "prefix": ""} | changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One model of Megatron's, saved in each layout; with the parameters that it had."""
    root = tmp_path_factory.mktemp("megatron")
    groups.initialize()
    model = worker.build(options())
    for layout, prefix in LAYOUTS.items():
        worker.save(
            options(layout=layout, prefix=prefix, out=root / layout, args=layout != "nemo"), model
        )
    worker.save_ranks(options(prefix="model.", out=root / "ranks"), model)
    groups.finalize()
    train_small_tokenizer(["a b c"], 300).save_pretrained(root / "tokenizer")
    shutil.copytree(root / "tokenizer", root / "stacked" / "tokenizer")
    return root, {name: tensor.clone() for name, tensor in model.state_dict().items()
                  if isinstance(tensor, torch.Tensor)}  # fmt: skip


def as_hf(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same parameters under Hugging Face's names, taken apart in lines of this test's own."""
    found = {"model.embed_tokens.weight": state["embedding.word_embeddings.weight"],
             "lm_head.weight": state["output_layer.weight"],
             "model.norm.weight": state["decoder.final_layernorm.weight"]}  # fmt: skip
    for layer in range(4):
        own, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        fused = state[f"{own}self_attention.linear_qkv.weight"].view(
            2, 4, 24, 64
        )  # 2 queries, k, v
        gate, up = state[f"{own}mlp.linear_fc1.weight"].chunk(2)
        found |= {
            f"{hf}self_attn.q_proj.weight": fused[:, :2].reshape(-1, 64),
            f"{hf}self_attn.k_proj.weight": fused[:, 2].reshape(-1, 64),
            f"{hf}self_attn.v_proj.weight": fused[:, 3].reshape(-1, 64),
            f"{hf}self_attn.o_proj.weight": state[f"{own}self_attention.linear_proj.weight"],
            f"{hf}self_attn.q_norm.weight": state[f"{own}self_attention.q_layernorm.weight"],
            f"{hf}self_attn.k_norm.weight": state[f"{own}self_attention.k_layernorm.weight"],
            f"{hf}mlp.gate_proj.weight": gate, f"{hf}mlp.up_proj.weight": up,
            f"{hf}mlp.down_proj.weight": state[f"{own}mlp.linear_fc2.weight"],
            f"{hf}input_layernorm.weight": state[f"{own}input_layernorm.weight"],
            f"{hf}post_attention_layernorm.weight": state[f"{own}pre_mlp_layernorm.weight"],
        }  # fmt: skip
    return found


def check_weights(source: Any, state: dict[str, torch.Tensor]) -> None:
    wanted = as_hf(state)
    assert hf_shapes(source.config) == {name: tuple(t.shape) for name, t in wanted.items()}
    everything = slice(None)
    for name, tensor in wanted.items():
        columns = everything if tensor.dim() > 1 else None
        assert torch.equal(source.read(name, everything, columns), tensor), name
    part = source.read("model.layers.3.self_attn.q_proj.weight", slice(20, 70), slice(8, 40))
    assert torch.equal(part, wanted["model.layers.3.self_attn.q_proj.weight"][20:70, 8:40])


def check_model(source: Any) -> None:
    model = source.config
    assert (model.family, model.vocab_size, model.rms_norm_eps, model.rope_theta) == (
        "qwen3",
        384,
        1e-6,
        5e3,
    )
    assert model.rope_scaling == {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    assert (model.max_position_embeddings, model.tie_word_embeddings, model.head_dim) == (
        128,
        False,
        24,
    )


@pytest.mark.parametrize("layout", ["stacked", "layers", "halves"])
def test_every_layout_of_keys_gives_the_same_weights(saved, layout):
    root, state = saved
    source = open_pretrained(root / layout, tokenizer=root / "tokenizer")
    check_model(source)
    check_weights(source, state)


def test_the_latest_iteration_is_the_one_that_is_named(saved, tmp_path):
    root, _ = saved
    shutil.copytree(root / "stacked", tmp_path / "iter_0000100")
    shutil.copytree(root / "layers", tmp_path / "iter_0000200")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    source = open_pretrained(tmp_path)
    assert source.tokenizer_source == tmp_path / "iter_0000100" / "tokenizer"
    assert load_tokenizer(source.tokenizer_source)("a")["input_ids"]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("300")
    with pytest.raises(ValueError, match="says 300, but there is no iter_0000300"):
        open_pretrained(tmp_path)


def with_args(saved: Any, tmp_path: Path, **changes: Any) -> Path:
    """A copy whose run had other arguments; of value `...`: none of that name."""
    path = tmp_path / "changed"
    shutil.copytree(saved[0] / "stacked", path)
    common = {"args": worker.megatron_lm_args(options())}
    for name, value in changes.items():
        delattr(common["args"], name) if value is ... else setattr(common["args"], name, value)
    torch.save(common, path / "common.pt")
    return path


@pytest.mark.parametrize(("changes", "message"), [
    ({"normalization": "LayerNorm"}, "normalization='LayerNorm', must be 'RMSNorm'"),
    ({"apply_layernorm_1p": True}, "apply_layernorm_1p=True, is not supported"),
    ({"swiglu": False}, "swiglu=False, must be True"),
    ({"squared_relu": True}, "squared_relu=True"),
    ({"num_experts": 8}, "num_experts=8, is not supported"),
    ({"mtp_num_layers": 1}, "mtp_num_layers=1"),
    ({"position_embedding_type": "learned_absolute"}, "must be 'rope'"),
    ({"rotary_percent": 0.5}, "rotary_percent=0.5, must be 1"),
    ({"window_size": (128, 0)}, r"window_size=\(128, 0\)"),
    ({"rotary_seq_len_interpolation_factor": 4}, "rotary_seq_len_interpolation_factor=4"),
    ({"qk_layernorm": False}, "qk_layernorm=False, but its tensors say otherwise"),
    ({"add_bias_linear": True}, "add_bias_linear=True, but its tensors say otherwise"),
    ({"untie_embeddings_and_output_weights": False}, "output_weights=False, but its tensors"),
    ({"num_layers": 5}, "shape .* implies .*different models"),
    ({"ffn_hidden_size": 64}, "linear_fc1.weight' has shape .* implies"),
    ({"hidden_size": ...}, "hidden_size is None, must be an integer.*--config-from"),
    ({"norm_epsilon": ...}, "norm_epsilon is None, must be a positive number"),
])  # fmt: skip
def test_what_args_say_and_nobody_honours_is_refused(saved, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        open_pretrained(with_args(saved, tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_no_field_of_megatrons_configuration_is_forgotten():
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mqat.checkpoints.megatron_config import _ABSENT, _PLAIN
    from mqat.specs.config_check import SIZES, changes_no_result

    compared = {"softmax_scale", "qk_layernorm"}
    rounding = {  # of a training that is over, or of a switch that is refused
        "fp8", "fp4", "use_fused_weighted_squared_relu", "use_inference_optimized_layers",
        "hetereogenous_dist_checkpoint", "mtp_grad_scale_func", "gtp_weight_remat_size",
        "fused_residual_rmsnorm", "use_grouped_gemm_for_shared_expert", "mtp_use_repeated_layer",
        "mtp_detach_heads", "experimental_attention_variant_loss_scale_func",
    }  # fmt: skip
    known = {*_ABSENT, *_PLAIN, *SIZES.values(), *compared, *rounding}
    names = {field.name for field in fields(TransformerConfig) if not changes_no_result(field.name)}
    assert names <= known
    assert len(names & _ABSENT) > 10  # control


class Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_common_state_that_runs_code_is_refused_and_not_run(saved, tmp_path):
    path = with_args(saved, tmp_path, harmless=Runs(tmp_path / "was-run"))
    with pytest.raises(ValueError, match=r"posix.mkdir does not belong .*--config-from HF_DIR"):
        open_pretrained(path)
    assert not (tmp_path / "was-run").exists()
    torch.load(path / "common.pt", weights_only=False)
    assert (tmp_path / "was-run").exists()  # control


def test_weights_without_args_need_a_description(saved, tmp_path):
    root, state = saved
    path = tmp_path / "weights"
    shutil.copytree(root / "nemo", path)
    with pytest.raises(ValueError, match=r"has no args, .*--config-from HF_DIR"):
        open_pretrained(path)
    described = tmp_path / "hf"
    shutil.copytree(root / "tokenizer", described)
    config = open_pretrained(root / "stacked").config.to_hf("bfloat16") | {"vocab_size": 301}
    (described / "config.json").write_text(json.dumps(config))
    source = open_pretrained(path, config_from=described)
    assert source.config.vocab_size == 301  # the rest of the table is padding
    table = source.read("model.embed_tokens.weight", slice(296, None), slice(None))
    assert torch.equal(table, state["embedding.word_embeddings.weight"][296:301])
    assert source.tokenizer_source == described
    (described / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))
    with pytest.raises(ValueError, match=r"linear_fc1.weight' has shape .*hf/config.json implies"):
        open_pretrained(path, config_from=described)
    torch.save({"args": worker.megatron_lm_args(options())}, path / "common.pt")
    with pytest.raises(ValueError, match=r"brings no tokenizer .*--tokenizer DIR"):
        _ = open_pretrained(path).tokenizer_source


@pytest.fixture
def described(saved, tmp_path):
    """Makes a Hugging Face directory that describes the saved model, with changes."""

    def make(**changes: Any) -> Path:
        path = tmp_path / "described"
        path.mkdir()
        config = open_pretrained(saved[0] / "stacked").config.to_hf("bfloat16") | changes
        (path / "config.json").write_text(json.dumps(config))
        return path

    return make


@pytest.mark.parametrize(("changes", "args", "message"), [
    ({"rope_theta": 10000.0}, {}, "rotary_base=5000, but .*config.json says that rotary_base=10000.0"),
    ({"rms_norm_eps": 1e-5}, {}, "norm_epsilon=1e-06, but .*layernorm_epsilon=1e-05"),
    ({"num_attention_heads": 8, "head_dim": 12}, {}, "num_attention_heads=4, but"),
    ({"rope_scaling": None}, {}, "positions are scaled by .*llama3.* says None"),
    ({}, {"use_rope_scaling": False}, "positions are scaled by None, but .*config.json says .*llama3"),
    ({}, {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": 4},
     "scaled by .*'linear', 'factor': 4.0.*, but .*config.json says .*llama3"),
    ({}, {"normalization": "LayerNorm"}, "normalization='LayerNorm', but .* norms are RMSNorm"),
    ({}, {"apply_layernorm_1p": True}, "apply_layernorm_1p=True, but .*gamma=False"),
    ({}, {"squared_relu": True}, "squared_relu=True, but .* the activation is silu"),
    ({}, {"swiglu": False}, "swiglu=False, but .* with a gate"),
])  # fmt: skip
def test_a_description_that_contradicts_the_run_is_refused(
    saved, tmp_path, described, changes, args, message
):
    path = with_args(saved, tmp_path, **args)
    with pytest.raises(ValueError, match=message):
        open_pretrained(path, config_from=described(**changes))


def test_a_description_that_agrees_with_the_run_is_taken(saved, described):
    path = described()
    source = open_pretrained(saved[0] / "stacked", config_from=path)
    check_weights(source, saved[1])
    assert source.config.family == "qwen3"


def test_linear_scaling_of_both_is_taken(saved, tmp_path, described):
    """Megatron-LM interpolates positions by a factor of its own."""
    linear = {"rope_type": "linear", "factor": 4.0}
    interpolated = {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": 4}
    path = with_args(saved, tmp_path, **interpolated)
    assert (
        open_pretrained(path, config_from=described(rope_scaling=linear)).config.rope_scaling
        == linear
    )


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_mixtures_of_experts_are_refused_by_name(family):
    if family.mixture is None:
        check_family(family, "config.json")
        return
    message = f"{family.name} models are not read from checkpoints of Megatron"
    with pytest.raises(ValueError, match=message):
        check_family(family, "config.json")


def test_rope_scaling_is_a_switch():
    with pytest.raises(ValueError, match=r"rope_scaling={'factor': 4.0}, must be true or false"):
        from_transformer_config({"rope_scaling": {"factor": 4.0}}, "run_config.yaml")
    assert from_transformer_config({"rope_scaling": True}, "").rope_scaling is not None


def test_a_hugging_face_directory_with_a_metadata_file_is_one(tmp_path):
    path = write_directory(good("llama"), tmp_path / "model")
    (path / "metadata.json").write_text("{}")
    assert isinstance(open_pretrained(path), HuggingFaceCheckpoint)


@pytest.mark.parametrize("linears", [DENSE_LINEARS, PLAIN_LINEARS], ids=["gated", "plain"])
def test_rows_of_rank_folders_are_those_of_the_mlp(linears):
    """Each rank of a gated one holds its rows of the gate, then of the up projection."""
    gate, up = torch.arange(8.0).view(4, 2), 10 + torch.arange(8.0).view(4, 2)
    both = torch.cat([gate, up])
    in_turns = [torch.cat([gate[r : r + 2], up[r : r + 2]]) for r in (0, 2)]
    ranks = in_turns if linears is DENSE_LINEARS else both.chunk(2)
    name = "model.decoder.layers.0.mlp.linear_fc1.weight"
    found = rank_folders._joined(name, ranks, by_name(linears))
    whole = torch.empty(found.size)
    for chunk in found.chunks:
        start = chunk.offsets[0]
        whole[start : start + chunk.sizes[0]] = chunk.tensor
    assert torch.equal(whole, both)


def test_other_forms_of_checkpoints_are_refused_by_name(saved, tmp_path):
    zarr = tmp_path / "zarr"
    shutil.copytree(saved[0] / "stacked", zarr)
    (zarr / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    with pytest.raises(ValueError, match="in the format 'zarr'; only torch_dist is read"):
        open_pretrained(zarr)
    legacy = tmp_path / "legacy"
    (legacy / "mp_rank_00_000").mkdir(parents=True)
    (legacy / "mp_rank_00_000" / "model_optim_rng.pt").touch()
    with pytest.raises(
        ValueError, match=r"a state dict of each rank; convert .*--ckpt-convert-format"
    ):
        open_pretrained(legacy)
    lost = tmp_path / "lost"
    shutil.copytree(saved[0] / "stacked", lost)
    for file in lost.glob("*.distcp"):
        file.unlink()
    with pytest.raises(ValueError, match=r"distcp is missing"):
        open_pretrained(lost).read("model.norm.weight", slice(None))


def sentencepiece_model() -> bytes:
    import sentencepiece

    trained = io.BytesIO()
    text = ["a quick brown fox jumps over the lazy dog " * 3] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=trained, vocab_size=40, model_type="bpe",
        minloglevel=2,
    )  # fmt: skip
    return trained.getvalue()


def nemo_directory(saved: Any, path: Path, weights: str = "nemo", **changes: Any) -> Path:
    """A NeMo 1 checkpoint, unpacked."""
    if weights == "ranks":
        shutil.copytree(saved[0] / "ranks", path)
    else:
        shutil.copytree(saved[0] / weights, path / "model_weights")
    (path / "model_config.yaml").write_text(yaml.safe_dump(NEMO1 | changes))
    (path / "0123_tokenizer.model").write_bytes(sentencepiece_model())
    return path


def packed(directory: Path, target: Path, mode: str = "w:") -> Path:
    with tarfile.open(target, mode) as archive:
        archive.add(directory, ".")
    return target


@pytest.mark.parametrize("form", ["directory", "tar", "gzip", "ranks"])
def test_nemo_1_is_read_packed_and_unpacked(saved, tmp_path, form):
    path = nemo_directory(saved, tmp_path / "unpacked", "ranks" if form == "ranks" else "nemo")
    if form != "directory":
        path = packed(path, tmp_path / "model.nemo", "w:gz" if form == "gzip" else "w:")
    before = sorted(p.name for p in tmp_path.iterdir())
    source = open_pretrained(path)
    check_model(source)
    check_weights(source, saved[1])
    assert load_tokenizer(source.tokenizer_source)("quick fox")["input_ids"]
    del source
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # nothing unpacked stays


def test_the_byte_level_tokenizer_of_a_nemo_file_is_that_of_its_files(saved, tmp_path):
    trained = train_small_tokenizer(["to be or not to be, that is the question"], 300)
    path = tmp_path / "unpacked"
    said = {"library": "megatron", "type": "GPT2BPETokenizer", "model": None,
            "vocab_file": "nemo:4_vocab.json", "merge_file": "nemo:5_merges.txt"}  # fmt: skip
    nemo_directory(saved, path, tokenizer=said)
    trained.backend_tokenizer.model.save(str(tmp_path))
    (tmp_path / "vocab.json").rename(path / "4_vocab.json")
    (tmp_path / "merges.txt").rename(path / "5_merges.txt")
    source = open_pretrained(packed(path, tmp_path / "model.nemo"))
    found = load_tokenizer(source.tokenizer_source)
    text = "to be, or not? é \n 123"
    assert found(text)["input_ids"] == trained(text)["input_ids"]
    assert found.eos_token == "<|endoftext|>"


@pytest.mark.parametrize(("changes", "message"), [
    ({"mcore_gpt": False}, "mcore_gpt=False, must be True"),
    ({"activation": "gelu"}, "activation='gelu', must be"),
    ({"normalization": "layernorm1p"}, "normalization='LayerNorm', must be 'RMSNorm'"),
    ({"seq_len_interpolation_factor": 8.0}, "seq_len_interpolation_factor=8.0"),
    ({"mcore_customization_config": {"final_logit_softcapping": 30.0}}, "mcore_customization_config="),
    ({"bias": True}, "bias=True, but its tensors say otherwise"),
    ({"qkv_bias": True}, "qkv_bias=True, but its tensors say otherwise"),
    ({"tokenizer": {"library": "sentencepiece", "model": "nemo:none.model"}}, "none.model is missing"),
    ({"tokenizer": {"library": "sentencepiece", "model": "nemo:0123_tokenizer.model",
      "additional_special_tokens": ["<extra>"]}}, "tokenizer.additional_special_tokens="),
])  # fmt: skip
def test_what_a_nemo_config_says_and_nobody_honours_is_refused(saved, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        open_pretrained(nemo_directory(saved, tmp_path / "model", **changes))


def test_nemo_2_is_read(saved, tmp_path):
    shutil.copytree(saved[0] / "layers", tmp_path / "model" / "weights")
    context = tmp_path / "model" / "context"
    shutil.copytree(saved[0] / "tokenizer", context / "nemo_tokenizer")
    (context / "io.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model.yaml: is missing, and context/io.json alone"):
        open_pretrained(tmp_path / "model")
    (context / "model.yaml").write_text(yaml.safe_dump(NEMO2))
    source = open_pretrained(tmp_path / "model")
    check_model(source)
    check_weights(source, saved[1])
    assert source.tokenizer_source == context / "nemo_tokenizer"
    (context / "model.yaml").write_text("config: !!python/object/apply:os.mkdir [was-run]")
    with pytest.raises(ValueError, match="cannot be read as plain YAML"):
        open_pretrained(tmp_path / "model")


def test_megatron_bridge_is_read(saved, tmp_path):
    shutil.copytree(saved[0] / "layers", tmp_path / "iter_0000007")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    rope = {"scale_factor": None, "rope_scaling": True, "rope_scaling_factor": 8.0}
    said = {"model": NEMO2["config"] | rope, "train": {}}
    (tmp_path / "iter_0000007" / "run_config.yaml").write_text(yaml.safe_dump(said))
    source = open_pretrained(tmp_path)
    check_model(source)
    check_weights(source, saved[1])


def member(name: str, **more: Any) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    for key, value in more.items():
        setattr(found, key, value)
    return found


@pytest.mark.parametrize(("bad", "message"), [
    (member("../out.yaml"), r"'../out.yaml' leaves the archive"),
    (member("/etc/out.yaml"), "'/etc/out.yaml' leaves the archive"),
    (member("a/../../out"), "leaves the archive"),
    (member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "'link' is no plain file"),
    (member("hard", type=tarfile.LNKTYPE, linkname="model_config.yaml"), "'hard' is no plain file"),
    (member("pipe", type=tarfile.FIFOTYPE), "'pipe' is no plain file"),
    (member("model_config.yaml"), "is there twice"),
])  # fmt: skip
def test_archives_with_anything_but_files_of_their_own_are_refused(tmp_path, bad, message):
    path = tmp_path / "model.nemo"
    with tarfile.open(path, "w:") as archive:
        archive.addfile(member("model_config.yaml"))
        archive.addfile(bad)
    with pytest.raises(ValueError, match=f"not a complete tar archive .*{message}"):
        open_pretrained(path)


def test_damaged_and_inflated_archives_are_refused(saved, tmp_path):
    path = packed(nemo_directory(saved, tmp_path / "unpacked"), tmp_path / "model.nemo")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"not a complete tar archive|is missing"):
        open_pretrained(path)
    path.write_bytes(b"no archive at all" * 100)
    with pytest.raises(ValueError, match="not a complete tar archive"):
        open_pretrained(path)
    path.write_bytes(gzip.compress(bytes(1 << 25)))
    with pytest.raises(ValueError, match="unpacks to more than 32 times its size"):
        open_pretrained(path)
    assert [p.name for p in tmp_path.glob(".mqat*")] == []


def test_a_folder_gives_no_files_from_outside(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_text("x")
    folder = Folder(tmp_path / "inside")
    for name in ("../secret", str(tmp_path / "secret")):
        with pytest.raises(ValueError, match="is missing"):
            folder.read(name)
