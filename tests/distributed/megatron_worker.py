"""Run by torchrun: saves Megatron-Core's own GPTModel as Megatron-LM and NeMo do, with its logits."""

import argparse
import signal
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812

from mqat.runtime import groups
from mqat.runtime.groups import command_line

ROWS = 384  # of the vocabulary table: 301, padded to a multiple of 128 as in Megatron-LM


def megatron_lm_args(cli: argparse.Namespace) -> argparse.Namespace:
    """What Megatron-LM's parser gives: the model's arguments, and some of the hundreds of others."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    return argparse.Namespace(
        num_layers=4, hidden_size=64, ffn_hidden_size=192, num_attention_heads=4, kv_channels=24,
        group_query_attention=True, num_query_groups=2, max_position_embeddings=128, seq_length=128,
        position_embedding_type="rope", use_rotary_position_embeddings=False, rotary_base=5000,
        rotary_percent=1.0, rotary_interleaved=False, rotary_seq_len_interpolation_factor=None,
        use_rope_scaling=cli.rope, rope_scaling_factor=8.0, normalization="RMSNorm",
        norm_epsilon=1e-6, apply_layernorm_1p=False, swiglu=True, squared_relu=False,
        quick_geglu=False, openai_gelu=False, add_bias_linear=cli.biases, add_qkv_bias=False,
        qk_layernorm=cli.norms, untie_embeddings_and_output_weights=not cli.tied,
        vocab_size=None, padded_vocab_size=ROWS, make_vocab_size_divisible_by=128,
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model="nobody/has-this",
        params_dtype=torch.float32, attention_backend=AttnBackend.auto, num_experts=None,
        model_type=ModelType.encoder_or_decoder, exit_signal=signal.SIGTERM, bert_binary_head=True,
        spec=None, mtp_num_layers=None, window_size=None, multi_latent_attention=False, fp8=None,
        softmax_type="vanilla", no_rope_freq=None, is_hybrid_model=False, rank=0, world_size=2,
        data_path=["/data/text"], lr=3e-4, apply_residual_connection_post_layernorm=False,
        tensor_model_parallel_size=cli.tp, pipeline_model_parallel_size=cli.pp, hidden_dropout=0.1,
    )  # fmt: skip


def build(cli: argparse.Namespace) -> torch.nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=4, hidden_size=64, ffn_hidden_size=192, num_attention_heads=4, kv_channels=24,
        num_query_groups=2, normalization="RMSNorm", layernorm_epsilon=1e-6, gated_linear_unit=True,
        activation_func=F.silu, add_bias_linear=cli.biases, qk_layernorm=cli.norms,
        hidden_dropout=0.0, attention_dropout=0.0, masked_softmax_fusion=False,
        tensor_model_parallel_size=cli.tp, pipeline_model_parallel_size=cli.pp,
        pipeline_dtype=torch.float32, bias_dropout_fusion=False,
    )  # fmt: skip
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=cli.norms),
        vocab_size=ROWS,
        max_sequence_length=128,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=cli.tied,
        position_embedding_type="rope",
        rotary_base=5000,
        rope_scaling=cli.rope,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases, the same on every rank that has them all
                is_cut = getattr(parameter, "tensor_model_parallel", False)
                seed = hash_of(name) + (
                    parallel_state.get_tensor_model_parallel_rank() if is_cut else 0
                )
                generator = torch.Generator().manual_seed(seed)
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            else:
                parameter *= 8  # so that logits are far apart
    return model.eval()


def hash_of(name: str) -> int:
    import zlib

    return zlib.crc32(name.encode())


def save(cli: argparse.Namespace, model: torch.nn.Module) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    metadata = {"non_homogeneous_layers": cli.layout != "stacked"}
    metadata["singleton_local_shards"] = cli.layout == "halves"
    state = {
        f"{kind}{prefix}": model.sharded_state_dict(prefix=prefix + cli.prefix, metadata=metadata)
        for kind, prefix in (("model", ""), ("optimizer", "optimizer.state.exp_avg."))
    }
    rank = torch.distributed.get_rank()
    state["rng_state"] = ShardedObject("rng_state", {"x": rank}, (cli.tp * cli.pp,), (rank,))
    if cli.args:
        state |= {"args": megatron_lm_args(cli), "checkpoint_version": 3.0, "iteration": 100}
    if groups.is_main():
        cli.out.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(cli.out))


def save_ranks(cli: argparse.Namespace, model: torch.nn.Module) -> None:
    """As NeMo 1 without distributed checkpoints: every rank's state dict."""
    from megatron.core import parallel_state

    tensor = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    name = f"mp_rank_{tensor:02d}"
    if cli.pp > 1:
        name = f"tp_rank_{tensor:02d}_pp_rank_{stage:03d}"
    (cli.out / name).mkdir(parents=True)
    state = {f"{cli.prefix}{key}": value for key, value in model.state_dict().items()}
    torch.save(state, cli.out / name / "model_weights.ckpt")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("logits", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--layout", default="stacked")
    parser.add_argument("--prefix", default="")
    for flag in ("tied", "norms", "biases", "rope", "args"):
        parser.add_argument(f"--{flag}", action="store_true")
    cli = parser.parse_args()
    groups.initialize(tensor_parallel=cli.tp, pipeline_parallel=cli.pp)
    from mqat.evaluation.forward import logits

    model = build(cli)
    result = logits([model], torch.load(cli.tokens), ROWS)
    if groups.is_main():
        torch.save(result, cli.logits)
    (save_ranks if cli.layout == "ranks" else save)(cli, model)
    groups.finalize()


if __name__ == "__main__":
    with command_line():
        main()
