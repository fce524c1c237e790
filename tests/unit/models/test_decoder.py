"""What a description writes as config.json is read back as the same; what cannot be said is refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mqat.checkpoints.hf_config import decoder_config
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig

PLAIN = DecoderConfig(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_layers=3, num_attention_heads=4,
    num_query_groups=2, head_dim=16, rms_norm_eps=1e-6,
)  # fmt: skip
MIXTRAL = replace(
    PLAIN, family="mixtral", num_experts=4, experts_per_token=2, expert_intermediate_size=96
)
EVERY = {"sliding_window": 6, "windowed_layers": (0, 1, 2)}
LONG = {
    "rope_type": "longrope", "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "model",
    [
        replace(MIXTRAL, **EVERY),
        replace(MIXTRAL, family="qwen3_moe", **EVERY),
        replace(PLAIN, family="gemma2", tie_word_embeddings=True),
        replace(PLAIN, family="gemma3_text", tie_word_embeddings=True, rope_theta=1e6),
        replace(PLAIN, family="gemma3_text", tie_word_embeddings=True, windowed_rope_theta=100.0,
                sliding_window=6, windowed_layers=(1,), rope_scaling=LINEAR),
        replace(PLAIN, family="phi3", rope_scaling=LONG),
    ],
    ids=lambda model: model.family,
)  # fmt: skip
def test_windows_bases_and_layers_are_read_back_as_written(model):
    written = json.loads(json.dumps(model.to_hf("float32")))
    assert decoder_config(written) == model


def test_a_model_of_alternating_windows_without_any_says_so_for_each_layer():
    from transformers import Gemma2Config

    written = replace(PLAIN, family="gemma2").to_hf("float32")
    assert Gemma2Config(**written).layer_types == ["full_attention"] * 3


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (MIXTRAL, {"normalizes_expert_weights": False}, "every mixtral model"),
        (PLAIN, {"family": "gemma2", "attention_scale": 0.3}, "must be a whole number"),
        (PLAIN, {"family": "gemma3_text", "sliding_window": 6, "windowed_layers": (1,),
                 "windowed_rope_theta": 100.0, "rope_scaling": LONG}, "'longrope': its factor"),
        (PLAIN, {"family": "gemma3_text", "sliding_window": 6, "windowed_layers": (1,),
                 "rope_scaling": LINEAR}, "state their base"),
    ],
)  # fmt: skip
def test_what_config_json_or_attention_cannot_say_is_refused(model, changes, message):
    with pytest.raises(UserError, match=message):
        replace(model, **changes)


def test_phi3_takes_the_one_scaling_that_transformers_has_for_it():
    written = replace(PLAIN, family="phi3").to_hf("float32")
    with pytest.raises(UserError, match=r"rope_type 'linear' is none .* 'phi3'; .*longrope"):
        decoder_config(written | {"rope_scaling": LINEAR})


@pytest.mark.parametrize("own", [{}, {"attention_factor": 1.5}])
def test_phi3s_scaling_is_written_as_transformers_4_reads_it(own):
    """Its class there wants three keys; what else a description has stands beside them."""
    scaling = LONG | {"short_factor": [1.0] * (PLAIN.head_dim // 2)}
    scaling |= {"long_factor": [2.0] * (PLAIN.head_dim // 2)} | own
    model = replace(PLAIN, family="phi3", rope_scaling=scaling)
    written = model.to_hf("float32")
    factors = {key: scaling[key] for key in ("short_factor", "long_factor")}
    assert written["rope_scaling"] == {"type": "longrope", **factors, **own}
    assert written["original_max_position_embeddings"] == 32
    assert decoder_config(written) == model


def test_experts_that_are_chosen_in_another_way_are_refused(world):
    from mqat.config import ModelConfig
    from mqat.specs.config_check import config_differences
    from mqat.specs.model import transformer_config

    config = transformer_config(MIXTRAL, ModelConfig(), torch.float32)
    for kind, refused in (("aux_loss", False), (["seq_aux_loss"], False), ("sinkhorn", True)):
        config.moe_router_load_balancing_type = kind
        assert bool(list(config_differences(config, MIXTRAL))) == refused


@pytest.mark.parametrize(
    ("family", "keys"),
    [("chatglm", ("padded_vocab_size", "seq_length")), ("gpt2", ("vocab_size", "n_positions"))],
)
def test_verify_reads_sizes_in_the_words_of_a_family(family, keys, tmp_path, monkeypatch):
    from mqat.cli import verify
    from mqat.data import sample
    from mqat.models.decoder import FAMILIES

    own = {
        "chatglm": {"rotary_fraction": 0.5, "rms_norm_eps": 1e-5},
        "gpt2": {"num_query_groups": 4, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    }
    model = replace(PLAIN, family=family, biases=FAMILIES[family].biased, **own[family])
    written = model.to_hf("float32")
    assert [written[key] for key in keys] == [97, 2048]
    (tmp_path / "config.json").write_text(json.dumps(written))
    asked = {}

    def sampled(directory, **sizes):
        asked.update(sizes)

    monkeypatch.setattr(sample, "sample_tokens", sampled)
    verify._verified(tmp_path, SimpleNamespace(text=None, reference=None))
    assert asked == {"vocab_size": 97, "longest": 2048}
