"""Megatron's stock Transformer-Engine specs are taken apart; what cannot be is refused by name.

Transformer Engine needs CUDA to import, so that its classes are stand-ins here, by their names, in specs
that Megatron's own functions make; whether the names are right is read in the sources.
"""

import ast
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mqat.config import ModelConfig
from mqat.errors import UserError
from mqat.models.structure import DENSE_LINEARS, DENSE_NORMS
from tests.unit.model_fixtures import MODEL

NAMES = (
    "TEColumnParallelLinear", "TEDotProductAttention", "TELayerNormColumnParallelLinear", "TENorm",
    "TERowParallelLinear", "TEFusedMLP", "TELinear", "TEColumnParallelGroupedLinear",
    "TERowParallelGroupedLinear",
)  # fmt: skip


@pytest.fixture
def te_spec(world, monkeypatch):
    """Megatron's function for Transformer-Engine layer specs."""
    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.models.gpt import gpt_layer_specs

    for name in NAMES:
        for module in (provider, gpt_layer_specs):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, type(name, (nn.Module,), {}))
    fused_mlp = type("TEFusedMLP", (), {"as_mlp_submodule": classmethod(lambda cls, **_: None)})
    monkeypatch.setattr(gpt_layer_specs, "TEFusedMLP", fused_mlp, raising=False)
    for module in (provider, gpt_layer_specs):
        monkeypatch.setattr(module, "is_te_min_version", lambda *_, **__: True, raising=False)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider, raising=False)
    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec


def computable(spec):
    """The spec with what only Transformer Engine computes replaced by mqat's own."""
    from mqat.specs.backend import SdpaAttention
    from mqat.specs.elementwise import Norm
    from mqat.specs.slots import class_name, spec_slot, with_slots

    slots = {"self_attention.core_attention": SdpaAttention}
    for name in ("self_attention.q_layernorm", "self_attention.k_layernorm"):
        if class_name(spec_slot(spec, name)) == "TENorm":
            slots[name] = Norm
    return with_slots(spec, slots)


def built(model, spec=None):
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.checkpoints.random_weights import RandomWeights
    from mqat.specs.model import build_model

    chunks = build_model(model, ModelConfig(), {}, torch.float32, layer_spec=spec)
    load_pretrained_(chunks, RandomWeights(model, 1, 0.1))
    return chunks


def keys(chunk):
    """Checkpoint keys of the layers, without empty extra states."""
    found = chunk.sharded_state_dict(prefix="")
    return {getattr(entry, "key", name) for name, entry in found.items() if "_extra" not in name}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_stock_spec_gives_the_model_and_the_keys_of_mqats_own(te_spec, family):
    from mqat.evaluation.forward import logits

    model = replace(MODEL, family=family)
    stock = computable(te_spec(qk_layernorm=family == "qwen3"))
    given, own = built(model, stock), built(model)
    assert keys(given[0]) == keys(own[0])
    assert {norm.key for norm in DENSE_NORMS} <= keys(given[0])
    tokens = torch.arange(24).view(2, 12)
    wanted = logits(own, tokens)  # with another SwiGLU, which rounds elsewhere
    assert torch.allclose(logits(given, tokens), wanted, atol=1e-5)
    with torch.no_grad():  # control: the norms are really there
        given[0].decoder.layers[0].input_layernorm.weight.mul_(2)
    assert not torch.allclose(logits(given, tokens), wanted, atol=1e-1)


def test_the_given_spec_is_left_as_it_was(te_spec):
    from mqat.specs.slots import class_name, spec_slot
    from mqat.specs.transformer_engine import adapt_layer_spec

    spec = te_spec()
    apart = adapt_layer_spec(spec, DENSE_LINEARS)
    for norm in DENSE_NORMS:
        assert class_name(spec_slot(spec, norm.name)) == "IdentityOp"
        assert class_name(spec_slot(apart, norm.name)) == "Norm"
    attention = spec_slot(apart, "self_attention.core_attention")
    assert issubclass(attention, spec_slot(spec, "self_attention.core_attention"))
    assert class_name(attention) == "DocumentAttention"
    assert adapt_layer_spec(apart, DENSE_LINEARS) is apart


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_te_op_fuser": True}, "slot mlp holds TEFusedMLP.*use_te_op_fuser=False"),
        ({"num_experts": 4, "moe_grouped_gemm": False}, "slot mlp holds MoELayer.*num_experts=None"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_refused_by_name(te_spec, options, message):
    with pytest.raises(UserError, match=message):
        built(MODEL, te_spec(**options))


def test_linears_that_do_more_are_not_replaced_silently(world):
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    from mqat.specs.backend import gpt_layer_spec
    from mqat.specs.slots import with_slots

    class LoraLinear(RowParallelLinear):
        pass

    spec = with_slots(gpt_layer_spec(), {"mlp.linear_fc2": LoraLinear})
    with pytest.raises(UserError, match=r"mlp\.linear_fc2 holds LoraLinear.*RowParallelLinear"):
        built(MODEL, spec)


def test_without_transformer_engine_its_attention_is_refused(monkeypatch):
    from mqat.specs import transformer_engine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not transformer_engine.is_available()
    with pytest.raises(UserError, match=r"mqat\[te\].*false"):
        transformer_engine.core_attention()


def _classes(source):
    """Class name -> parameters of its constructor, wherever in a module it is defined."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            functions = [x for x in node.body if isinstance(x, ast.FunctionDef)]
            found[node.name] = {
                f.name: [a.arg for a in f.args.args + f.args.kwonlyargs] for f in functions
            }
    return found


def test_the_names_are_megatrons():
    import megatron.core.extensions as extensions

    from mqat.specs.transformer_engine import LINEARS, UNSPLIT

    directory = Path(next(iter(extensions.__path__)))
    classes = _classes((directory / "transformer_engine.py").read_text("utf-8"))
    used = {name for names in LINEARS.values() for name in names if name.startswith("TE")}
    assert used | {"TEDotProductAttention", "TENorm"} <= classes.keys()
    assert {name for name in UNSPLIT if name == "TEFusedMLP"} <= classes.keys()
    assert "pg_collection" in classes["TEDotProductAttention"]["__init__"]


@pytest.mark.skipif(
    "MQAT_TE_WHEEL" not in os.environ,
    reason="set MQAT_TE_WHEEL to a downloaded transformer-engine-cu12 wheel to check its names",
)
def test_the_names_are_transformer_engines():
    def classes(path):
        return _classes(wheel.read(f"transformer_engine/pytorch/{path}").decode())

    with zipfile.ZipFile(os.environ["MQAT_TE_WHEEL"]) as wheel:
        source = wheel.read("transformer_engine/pytorch/module/layernorm_linear.py").decode()
        fused = classes("module/layernorm_linear.py")["LayerNormLinear"]
        attention = classes("attention/dot_product_attention/dot_product_attention.py")
    # The parameters whose names checkpoints of Transformer-Engine models hold.
    assert '"layer_norm_weight"' in source and "self.weight_names" in source
    assert {"eps", "normalization", "zero_centered_gamma"} <= set(fused["__init__"])
    forward = set(attention["DotProductAttention"]["forward"])
    assert {"query_layer", "key_layer", "value_layer", "attention_mask", "qkv_format", "attn_mask_type",
            "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"} <= forward  # fmt: skip
    assert {"cp_group", "cp_comm_type", "softmax_scale"} <= set(
        attention["DotProductAttention"]["__init__"]
    )
