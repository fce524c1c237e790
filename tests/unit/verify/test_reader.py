"""The reader against transformers' Llama with the same fake quantization: another decoder entirely."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mqat.export.export import export_trtllm
from mqat.models.schemes import kv_cache_schemes
from mqat.quant.quantizer import Quantizer
from mqat.verify.agreement import agreement
from mqat.verify.report import Report
from mqat.verify.storage import reload_w8a16
from mqat.verify.verify import compare_logits, open_export, verify_export
from tests.unit.export.checkpoints import (
    BIASED,
    QWEN2,
    TINY,
    UNTIED,
    all_layers,
    tensors_of,
    write_checkpoint,
)
from tests.unit.verify.exports import rewrite

TOKENS = torch.randint(0, TINY.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


def quantized(state, layers, name, x, kind):
    """One operand of a linear on its frozen grid."""
    scheme = layers.get(name)
    operand = getattr(scheme, kind) if scheme else None
    if operand is None:
        return x
    quantizer = Quantizer(operand, tuple(x.shape) if kind == "weight" else None, name)
    prefix = f"quantizers.{name}.{kind}_"
    quantizer.load_({part: state[prefix + part] for part in quantizer.frozen_tensors})
    return quantizer(x)


def cut_evenly(tensor, model, parts):
    """Gate and up, or all."""
    return tensor.chunk(parts)


def qkv_parts(weight, model, parts=3):
    """Query, key, value rows of a fused weight, copied group by group."""
    per_group, d = model.num_attention_heads // model.num_query_groups, model.head_dim
    parts = ([], [], [])
    for group in weight.split((per_group + 2) * d):
        for part, piece in zip(parts, group.split([per_group * d, d, d]), strict=True):
            part.append(piece)
    return [torch.cat(part) for part in parts]


class ServedCache(DynamicCache):
    """transformers' cache, which gets rotated keys, storing codes; arithmetic of its own."""

    def __init__(self, name, scales):
        super().__init__()
        self.name, self.scales = name, scales

    def stored(self, x, scale):
        if self.name == "int8":
            return torch.round(x / scale).clamp(-128, 127) * scale
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale

    def update(self, key, value, layer_idx, *args, **kwargs):
        on_key, on_value = self.scales[layer_idx]
        return super().update(
            self.stored(key, on_key), self.stored(value, on_value), layer_idx, *args, **kwargs
        )


def served_cache(model, layers, state):
    """The cache that the schemes ask for; None: unquantized."""
    caches = kv_cache_schemes(layers)
    if not caches:
        return None
    scales = [
        [state[f"quantizers.{name}.{scheme.scale_of(kind)}_scale"] for kind in ("key", "value")]
        for name, scheme in caches.items()
    ]
    return ServedCache(next(iter(caches.values())).name, scales)


def transformers_logits(model, layers, tokens, *, quantize=True, tp=1):
    """Logits of the checkpoint that `write_checkpoint(..., model, layers)` makes.

    With `tp` > 1, the input of a row-parallel linear is quantized rank by rank, as servers do: that
    makes a difference where a token's step depends on the channels it is taken from.
    """
    state = tensors_of(model, layers)
    layers = layers if quantize else {}
    rope = {"rope_type": "default"} if model.rope_scaling is None else dict(model.rope_scaling)
    config, decoder = FAMILIES[model.family]
    switches = {"attention_bias": "self_attention.linear_qkv", "mlp_bias": "mlp.linear_fc1"}
    biases = {key: linear in model.biases for key, linear in switches.items()}
    hf = decoder(
        config(
            **(biases if model.family == "llama" else {}),
            vocab_size=model.vocab_size, hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size, num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups, head_dim=model.head_dim,
            rms_norm_eps=model.rms_norm_eps, tie_word_embeddings=model.tie_word_embeddings,
            max_position_embeddings=model.max_position_embeddings,
            rope_parameters=rope | {"rope_theta": model.rope_theta},
        )
    ).float().eval()  # fmt: skip

    def on_grid(name, module, args):
        parts = tp if name.endswith(("linear_proj", "linear_fc2")) else 1
        pieces = args[0].chunk(parts, dim=-1)
        return (torch.cat([quantized(state, layers, name, x, "input") for x in pieces], dim=-1),)

    vocab = model.vocab_size
    with torch.no_grad():
        embedding = state["embedding.word_embeddings.weight"][:vocab]
        hf.model.embed_tokens.weight.copy_(embedding)
        head = embedding if model.tie_word_embeddings else state["output_layer.weight"][:vocab]
        hf.lm_head.weight.copy_(head)
        hf.model.norm.weight.copy_(state["decoder.final_layernorm.weight"])
        for index, layer in enumerate(hf.model.layers):
            norms = {"self_attention.linear_qkv": layer.input_layernorm,
                     "mlp.linear_fc1": layer.post_attention_layernorm}  # fmt: skip
            for linear, norm in norms.items():
                norm.weight.copy_(state[f"decoder.layers.{linear}.layer_norm_weight"][index])
            attention, mlp = layer.self_attn, layer.mlp
            owners = {
                "self_attention.linear_qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
                "self_attention.linear_proj": [attention.o_proj],
                "mlp.linear_fc1": [mlp.gate_proj, mlp.up_proj],
                "mlp.linear_fc2": [mlp.down_proj],
            }
            for linear, modules in owners.items():
                name = f"decoder.layers.{index}.{linear}"
                fused = state[f"decoder.layers.{linear}.weight"][index]
                weight = quantized(state, layers, name, fused, "weight")
                if linear == "self_attention.linear_qkv":
                    pieces = qkv_parts(weight, model)
                else:
                    pieces = weight.chunk(len(modules))
                bias = state.get(f"decoder.layers.{linear}.bias")
                for part, (module, piece) in enumerate(zip(modules, pieces, strict=True)):
                    module.weight.copy_(piece)
                    assert (module.bias is None) == (bias is None)
                    if bias is not None:
                        split = qkv_parts if len(modules) == 3 else cut_evenly
                        module.bias.copy_(split(bias[index], model, len(modules))[part])
                    module.register_forward_pre_hook(partial(on_grid, name))
        cache = served_cache(model, layers, state)
        return hf(tokens, past_key_values=cache, use_cache=cache is not None).logits


def served_logits(directory, tokens):
    return open_export(directory).logits(tokens)


def relative(a, b):
    """Root mean square of the difference, against that of the reference."""
    return float((a - b).pow(2).mean().sqrt() / b.pow(2).mean().sqrt())


# No activation has codes, so that nothing flips.
EXACT = ("null", "int4")


def equal_but_for_codes(found, expected, unquantized):
    """Whether only activations on the border of two codes differ, because sums are ordered differently.

    Which codes flip depends on the processor. One changes its own token and what later ones attend to:
    the tokens before it are equal but for float32's rounding (other faults touch every token), and the
    others are far nearer than the unquantized model.
    """
    distances = (found - expected).pow(2).mean(-1).sqrt() / expected.pow(2).mean(-1).sqrt()
    share_of_equal_tokens = float((distances < 1e-5).float().mean())
    return (
        share_of_equal_tokens > 0.05
        and relative(found, expected) < relative(unquantized, expected) / 4
    )


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (4, 2)])
@pytest.mark.parametrize("algorithm", ["null", "int4", "int8", "fp8", "nvfp4", "fp8_pc_pt"])
def test_logits_equal_transformers_with_the_same_quantization(algorithm, tp, pp, exported):
    layers = all_layers(algorithm)
    expected = transformers_logits(TINY, layers, TOKENS, tp=tp)
    served = served_logits(exported(algorithm, tp, pp, "float32"), TOKENS)
    assert served.shape == (2, 40, TINY.vocab_size)
    if algorithm in EXACT:
        assert relative(served, expected) < 1e-5
    if algorithm != "null":
        unquantized = transformers_logits(TINY, layers, TOKENS, quantize=False)
        assert equal_but_for_codes(served, expected, unquantized)
        assert relative(unquantized, expected) > 0.05  # control: it is quantized


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (4, 2)])
def test_weight_only_int8_is_exact_in_the_file_and_quantized_again_by_the_loader(
    tp, pp, exported, monkeypatch
):
    layers = all_layers("int8_wo")
    expected = transformers_logits(TINY, layers, TOKENS)
    directory = exported("int8_wo", tp, pp, "float32")
    served = served_logits(directory, TOKENS)
    unquantized = transformers_logits(TINY, layers, TOKENS, quantize=False)
    # The second rounding costs about as much as the first, and not more.
    assert 1e-3 < relative(served, expected) < 1.5 * relative(unquantized, expected)
    monkeypatch.setattr("mqat.verify.storage.reload_w8a16", torch.Tensor.float)
    assert relative(served_logits(directory, TOKENS), expected) < 1e-5


@pytest.mark.parametrize(
    "model",
    [
        replace(UNTIED, rope_theta=500000.0, rope_scaling=LLAMA3, rms_norm_eps=1e-3),
        replace(UNTIED, num_query_groups=4),
        replace(UNTIED, num_query_groups=1, num_attention_heads=8, head_dim=32),
    ],
)
def test_other_shapes_untied_heads_and_llama3_rope(model, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model, {})
    expected = transformers_logits(model, {}, TOKENS)
    for tp in (1, 4):
        out = tmp_path / str(tp)
        export_trtllm(checkpoint, out, tensor_parallel=tp, dtype="float32")
        assert relative(served_logits(out, TOKENS), expected) < 1e-5


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("algorithm", ["null", "int8", "int4"])
@pytest.mark.parametrize(
    "model", [BIASED, QWEN2, replace(TINY, family="mistral")], ids=["biased", "qwen2", "mistral"]
)
def test_other_families_and_biases(model, algorithm, tp, pp, tmp_path):
    layers = all_layers(algorithm, model)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model, layers)
    out = tmp_path / "out"
    export_trtllm(checkpoint, out, tensor_parallel=tp, pipeline_parallel=pp, dtype="float32")
    expected = transformers_logits(model, layers, TOKENS, tp=tp)
    unquantized = transformers_logits(model, layers, TOKENS, quantize=False)

    def agrees():
        served = served_logits(out, TOKENS)
        if algorithm in EXACT:
            return relative(served, expected) < 1e-5
        return equal_but_for_codes(served, expected, unquantized)

    assert agrees()
    assert verify_export(out, reference=checkpoint).problems == []
    if model.biases:  # control: they matter
        rewrite(out, 0, lambda tensors: [t.zero_() for n, t in tensors.items() if "bias" in n])
        assert not agrees()


def test_llama3_scaling_makes_a_difference():
    """Control for the test above: at this length the scaled frequencies show."""
    scaled = replace(UNTIED, rope_scaling=LLAMA3)
    a, b = (transformers_logits(model, {}, TOKENS) for model in (scaled, UNTIED))
    assert relative(a, b) > 1e-2


@pytest.mark.parametrize("algorithm", ["null", "int8", "int4", "fp8"])
def test_gross_damage_shows_in_the_logits_alone(algorithm, broken):
    directory = broken(algorithm)

    def swap_gate_and_up(tensors):
        for name in [n for n in tensors if ".mlp.fc." in n]:
            other = name.replace(".mlp.fc.", ".mlp.gate.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    reference = served_logits(directory, TOKENS)
    report = verify_export(directory, tokens=TOKENS, reference_logits=reference)
    assert report.ok and report.mean_kl == 0 and report.top1_agreement == 1
    rewrite(directory, 0, swap_gate_and_up)
    report = verify_export(directory, tokens=TOKENS, reference_logits=reference)
    assert any("logits differ from the training model's" in p for p in report.problems)


def test_w8a16_weights_are_quantized_again_as_the_loader_does(exported):
    directory = exported("int8_wo", dtype="float32")
    weight = load_file(directory / "rank0.safetensors")["transformer.layers.0.mlp.proj.weight"]
    row = weight[0].double()
    step = float(row.abs().max()) / 128
    expected = [max(-128, min(127, round(value / step))) * step for value in row.tolist()]

    assert torch.allclose(reload_w8a16(weight)[0].double(), torch.tensor(expected).double())


def test_compare_logits_measures_what_it_says():
    reference = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    report = Report(noise=1e-5)
    compare_logits(report, reference.flip(-1), reference, reference.flip(-1))
    p = torch.softmax(reference, -1)
    q = p.flip(-1)
    assert report.mean_kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
    assert report.top1_agreement == 0 and report.max_abs_difference == 2
    assert report.noise_kl == 0 and report.noise_top1_agreement == 1
    assert not report.ok and "FAILED" in report.headline()
    assert report.to_dict()["ok"] is False


def test_logits_that_are_not_numbers_are_a_problem(broken):
    directory = broken("null")

    def overflow(tensors):
        tensors["lm_head.weight"].fill_(3e38)

    rewrite(directory, 0, overflow)
    report = verify_export(directory, tokens=TOKENS)
    assert report.problems == ["logits hold NaN or infinity"]


@pytest.mark.parametrize("token", [-1, TINY.vocab_size])
def test_tokens_outside_the_vocabulary_are_an_error(token, exported):
    with pytest.raises(ValueError, match="vocab_size=301; tokenize the text with"):
        verify_export(exported("null"), tokens=torch.tensor([[token]]))


def test_reference_logits_of_another_vocabulary_are_an_error(exported):
    with pytest.raises(ValueError, match=r"reference logits have shape \(2, 40, 304\)"):
        verify_export(exported("null"), tokens=TOKENS, reference_logits=torch.zeros(2, 40, 304))


@pytest.mark.parametrize(("noisy", "is_ok"), [(0.0, False), (0.1, False), (1.0, True)])
def test_logits_may_differ_as_far_as_the_model_from_itself_under_noise(noisy, is_ok):
    """The same difference is a chaotic model's own rounding, and a calm one's damage."""
    generator = torch.Generator().manual_seed(0)
    served, one, other = (torch.randn(1, 256, 50, generator=generator) for _ in range(3))
    report = Report(noise=1e-5)
    compare_logits(report, served, served + 0.5 * one, served + noisy * 0.5 * other)
    assert report.ok == is_ok
    assert is_ok or "with noise of the size of rounding" in report.problems[0]


@pytest.mark.parametrize("algorithm", ["null", "int8", "fp8", "nvfp4"])
def test_noise_of_rounding_is_seen_and_small(algorithm, exported):
    """Else every export would pass, or none."""
    decoder = open_export(exported(algorithm))
    plain = decoder.logits(TOKENS)
    assert torch.equal(decoder.logits(TOKENS), plain)
    kl = [agreement(plain, decoder.logits(TOKENS, noise=size)).kl for size in (1e-5, 1e-2)]
    assert 0 < abs(kl[0]) < 0.1 and kl[1] > 4 * kl[0]  # KL 1e-11 to 0.07, with codes of 4 bits
