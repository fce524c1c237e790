"""Frequencies and attention factors equal those of transformers; what is built is described by them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.specs.rope import attention_factor, frequencies
from tests.unit.model_fixtures import MODEL

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}
LONG = {
    "rope_type": "longrope", "original_max_position_embeddings": 512,
    "short_factor": [1.0 + i / 4 for i in range(16)], "long_factor": [3.0 + i for i in range(16)],
}  # fmt: skip
SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 512},
    YARN,
    YARN | {"truncate": False, "beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    YARN | {"attention_factor": 0.5},
    {"rope_type": "yarn", "factor": 8.0},
    LONG,
    LONG | {"attention_factor": 1.5},
]  # fmt: skip


def llama(scaling, **changes):
    return replace(MODEL, rope_scaling=scaling, rope_theta=5000.0, **changes)


@pytest.mark.parametrize("length", [1, 512, 513, 4000])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: (s or {}).get("rope_type", "none"))
def test_they_are_transformers(scaling, length):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = llama(scaling)
    hf = LlamaRotaryEmbedding(LlamaConfig(
        head_dim=model.head_dim, max_position_embeddings=model.max_position_embeddings,
        rope_parameters=(scaling or {"rope_type": "default"}) | {"rope_theta": 5000.0},
    ))  # fmt: skip
    hf(torch.zeros(1), torch.arange(length)[None])  # chooses the frequencies of the length
    assert torch.equal(frequencies(model, length), hf.inv_freq)
    assert attention_factor(model) == pytest.approx(hf.attention_scaling)


@pytest.mark.parametrize("scaling", SCALINGS[1:2] + SCALINGS[4:5])
def test_a_part_of_a_head_is_rotated_as_in_phi3(scaling):
    from transformers import StableLmConfig
    from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding

    sizes = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 2048}
    hf = StableLmRotaryEmbedding(StableLmConfig(
        **sizes, rope_parameters=scaling | {"rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    ))  # fmt: skip
    model = replace(
        MODEL, family="phi3", rotary_fraction=0.5, rope_theta=5000.0, rope_scaling=scaling
    )
    assert torch.equal(frequencies(model), hf.inv_freq) and len(hf.inv_freq) == 8


def built(model, **megatron):
    from mqat.config import ModelConfig
    from mqat.specs.model import build_model

    (chunk,) = build_model(model, ModelConfig(megatron=megatron), {}, torch.float32)
    return chunk


@pytest.mark.parametrize("switch", ["apply_rope_fusion", "fused_single_qkv_rope"])
def test_fused_rotation_is_refused_where_it_would_forget_the_factor(switch, world):
    with pytest.raises(UserError, match=rf"{switch}=true: fused kernels do not multiply"):
        built(llama(YARN), **{switch: True})


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: (s or {}).get("rope_type", "none"))
def test_a_built_model_is_described_by_its_own_scaling_and_no_other(scaling, world):
    from mqat.checkpoints.describe import check_description, describe_model

    model = llama(scaling)
    chunk = built(model)
    assert describe_model([chunk]) == model
    other = {"rope_type": "linear", "factor": 5.0}
    with pytest.raises(UserError, match="rope_scaling"):
        check_description([chunk], llama(other))


def test_megatrons_own_linear_scaling_is_described(world):
    from mqat.checkpoints.describe import describe_model
    from tests.unit.checkpoints.test_describe import own_model

    found = describe_model([own_model(seq_len_interpolation_factor=2.0)])
    assert found.rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("changes", [
    {"rotary_fraction": 0.5}, {"logit_softcap": 30.0}, {"attention_scale": 0.1},
    {"sliding_window": 8, "windowed_layers": (0, 1)},
])  # fmt: skip
def test_what_a_familys_configuration_cannot_say_is_refused(changes):
    with pytest.raises(UserError, match=r"the config\.json of a llama model cannot say that"):
        replace(MODEL, **changes)


@pytest.mark.parametrize("changes", [
    {"sliding_window": 8}, {"windowed_layers": (0,)}, {"sliding_window": 8, "windowed_layers": (1, 0)},
    {"sliding_window": 8, "windowed_layers": (2,)},
])  # fmt: skip
def test_windows_without_layers_and_layers_without_windows_are_refused(changes):
    with pytest.raises(UserError, match="windowed_layers"):
        replace(MODEL, family="qwen3", **changes)


def test_descriptions_with_windows_survive_json():
    model = replace(MODEL, family="qwen3", sliding_window=8, windowed_layers=(1,))
    assert DecoderConfig.from_dict(model.to_dict() | {"windowed_layers": [1]}) == model


@pytest.mark.parametrize(("size", "skip", "found"), [
    (None, None, None), ((6, 0), None, 7), ((6, 0), [1, 0], 7), ((6, 0), [0, 1], None), ((6, 0), 2, 7),
])  # fmt: skip
def test_windows_are_where_megatrons_configuration_has_them(size, skip, found):
    from mqat.specs.window import window_of

    config = SimpleNamespace(window_size=size, window_attn_skip_freq=skip)
    assert window_of(config, 1) == found
    config.window_size = (6, 1)
    with pytest.raises(UserError, match="attention is causal"):
        window_of(SimpleNamespace(window_size=(6, 1), window_attn_skip_freq=None), 1)


def test_attention_that_cannot_do_it_is_refused(world):
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from mqat.config import ModelConfig
    from mqat.specs.backend import SdpaAttention, gpt_layer_spec
    from mqat.specs.gpt import quantize_block_spec
    from mqat.specs.model import transformer_config

    capped = replace(MODEL, family="gemma2", attention_softcap=50.0)
    config = transformer_config(capped, ModelConfig(), torch.float32, spec_has_activation=False)

    def block(model, attention):
        return quantize_block_spec(
            gpt_layer_spec(model.norms, attention, config=config), {}, model=model,
            transformer_config=config, pp_rank=0,
        )  # fmt: skip

    with pytest.raises(UserError, match="is DotProductAttention, which does not cap scores at 50"):
        block(capped, DotProductAttention)
    spec = block(capped, SdpaAttention).layer_specs[0]
    core = spec.submodules.self_attention.submodules.core_attention
    assert core(config, 1, AttnMaskType.causal, "self").softcap == 50.0

    windowed = replace(MODEL, family="qwen3", sliding_window=8, windowed_layers=(1,))
    config = transformer_config(windowed, ModelConfig(), torch.float32)
    config.context_parallel_size = 2
    block(windowed, SdpaAttention)
    with pytest.raises(UserError, match=r"with windows .* must be one of all_gather, a2a"):
        block(windowed, DotProductAttention)
