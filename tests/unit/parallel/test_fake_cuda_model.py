"""A whole model's step, ranks of TP 2, calibration, recipes and packing on fake CUDA tensors."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from mqat.calibration.clipping import WeightShard
from mqat.calibration.clipping_methods import CLIPPING_METHODS
from mqat.calibration.smoothquant import round_scale, smoothquant_scale
from mqat.errors import UserError
from mqat.kernels import packed_weight
from mqat.kernels.packed_weight import frozen_matmul, pack_weight, packed_matmul
from mqat.quant.algorithm import ALGORITHMS, named_algorithm, named_scheme
from mqat.quant.granularity import PerTensor
from mqat.quant.observers import METHODS, ActivationObserver
from mqat.quant.qparams import frozen_qparams, statistic_of
from mqat.runtime import groups
from mqat.specs.policy import Rule
from tests.unit.fake_cuda import CUDA, Ledger, backward, fake_cuda, install_guard, to_fake_cuda_
from tests.unit.model_fixtures import MODEL
from tests.unit.parallel.test_fake_cuda import SIZE, TOKENS, grad, make_linear, run_step

QUANTIZED = [name for name in ALGORITHMS if name != "null"]


@pytest.fixture(autouse=True)
def _guard(tmp_path_factory):
    install_guard(tmp_path_factory.getbasetemp())


def attention(q, k, v, **_):
    """For `scaled_dot_product_attention`, whose choice of a kernel asks the device."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


@pytest.fixture
def model_on_cuda(world, monkeypatch):
    """`model_on_cuda("int8")`: the tiny model, which `to_fake_cuda_` then moves."""
    from mqat.config import ModelConfig
    from mqat.evaluation import forward
    from mqat.parallel.quantized_module import all_quantizers
    from mqat.specs.model import build_model
    from mqat.specs.policy import Policy

    def make(algorithm, rules=(), kv_cache=None):
        model = replace(MODEL, tie_word_embeddings=not rules)
        layers = Policy(algorithm, None, rules, kv_cache).schemes(model)
        (chunk,) = build_model(model, ModelConfig(), layers, torch.bfloat16)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: CUDA)
        monkeypatch.setattr(forward, "device", lambda: CUDA)
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: 1)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        for quantizer in all_quantizers(chunk):
            quantizer.is_frozen = True
        return chunk

    return make


def microbatch(is_packed=False):
    tokens = torch.zeros(2, 32, dtype=torch.long)
    mask = torch.ones(2, 1, 32, 32, dtype=torch.bool).triu(1) if is_packed else None
    return {
        "tokens": tokens, "labels": tokens, "loss_mask": torch.ones(2, 32), "position_ids": tokens,
        "attention_mask": mask,
    }  # fmt: skip


def step_of(chunk, *, is_packed=False):
    """A step's passes, one microbatch; every parameter has got its gradient."""
    from mqat.evaluation.forward import forward_loss
    from mqat.parallel.quantized_step import quantized_step

    with fake_cuda(), Ledger() as ledger, quantized_step(chunk):
        to_fake_cuda_(chunk)
        output, to_loss = forward_loss(iter([microbatch(is_packed)]), chunk)
        loss, _, reported = to_loss(output)
        gradients = backward(loss, torch.ones_like(loss))
    assert {x.device for x in gradients.values()} == {CUDA}
    assert len(gradients) == len(list(chunk.parameters()))
    assert reported["loss"].device == CUDA
    return ledger.passes


@pytest.mark.parametrize("algorithm", ["null", "int8", "int8_pc_pt", "fp8", "nvfp4", "int4"])
def test_a_models_step_stays_on_the_device_and_waits_for_nothing(model_on_cuda, algorithm):
    passes = step_of(model_on_cuda(algorithm, kv_cache="fp8" if algorithm == "fp8" else None))
    assert len([p for p in passes if p.is_gemm]) >= 3 * 8  # 8 linears


def test_so_does_one_with_quantized_tables_and_packed_documents(model_on_cuda):
    rules = (Rule("embedding.word_embeddings", "int4"), Rule("output_layer", "int8"))
    step_of(model_on_cuda("int8", rules), is_packed=True)


def test_so_does_one_with_learned_scales(model_on_cuda, monkeypatch):
    from mqat.parallel.quantized_module import all_quantizers

    monkeypatch.setattr(torch.autograd, "grad", grad)
    chunk = model_on_cuda("int8")
    for quantizer in all_quantizers(chunk):
        quantizer.learn_("lsq", 1.0)
    step_of(chunk)


@pytest.mark.parametrize("method", METHODS)
def test_calibration_observes_without_waiting(model_on_cuda, method):
    from mqat.evaluation.forward import forward_loss
    from mqat.parallel.quantized_module import quantized_modules

    chunk = model_on_cuda("fp8")
    modules = quantized_modules(chunk).values()
    with fake_cuda(), torch.no_grad(), Ledger():
        to_fake_cuda_(chunk)
        for module in modules:
            module.begin_calibration()
            for kind, quantizer in module.quantizers.items():
                if kind != "weight":
                    quantizer.observer = ActivationObserver(method)
                    to_fake_cuda_(quantizer.observer)
        forward_loss(iter([microbatch()]), chunk)
        for module in modules:
            if "weight" in module.quantizers:
                scheme = module.quantizers["weight"].scheme
                frozen = frozen_qparams(statistic_of(module.weight, scheme), scheme)
                assert frozen["scale"].device == CUDA
            module.end_calibration()


def test_inputs_are_summed_up_and_weights_rounded_without_waiting(model_on_cuda):
    from mqat.calibration.gptq import round_shard
    from mqat.calibration.input_hessian import _empty
    from mqat.parallel.linear import quantized_linears

    chunk = model_on_cuda("int4_awq")
    name, linear = next(iter(quantized_linears(chunk).items()))
    with fake_cuda(), torch.no_grad(), Ledger():
        to_fake_cuda_(chunk)
        _, hessians = _empty({name: linear}, [name])
        x = torch.empty(32, 2, MODEL.hidden_size, dtype=torch.bfloat16, device=CUDA)
        hessians[name].observe_(linear, x, 1)
        matrix = hessians[name].matrix(linear)
        assert matrix.device == CUDA
        scheme = linear.weight_quantizer.scheme
        weight = torch.empty(8, MODEL.hidden_size, device=CUDA)
        frozen = frozen_qparams(statistic_of(weight, scheme), scheme)
        order = torch.argsort(matrix.diagonal(), descending=True)
        rounded = round_shard(weight, frozen, matrix.float(), order, scheme)
        assert rounded.device == CUDA and rounded.shape == weight.shape


def test_a_checkpoint_takes_tensors_as_they_are_on_the_device(model_on_cuda):
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from mqat.parallel.checkpoint import quantizer_sharded_state

    chunk = model_on_cuda("int8")
    with fake_cuda(), torch.no_grad(), Ledger():
        to_fake_cuda_(chunk)
        group = parallel_state.get_data_parallel_group()
        state = {
            "model": chunk.sharded_state_dict(),
            "quantizers": quantizer_sharded_state([chunk], dp_group=group),
        }
        shards = [x for x in nested_values(state) if isinstance(x, ShardedTensor)]
        assert len(shards) > 20 and {x.data.device for x in shards} == {CUDA}


@pytest.fixture
def first_of_two(monkeypatch):
    """The first of two tensor-parallel ranks, whose collectives only compute shapes."""
    from mqat.parallel import quantized_gemm
    from mqat.runtime import cpu

    cpu.install()
    from megatron.core import parallel_state

    monkeypatch.setattr(quantized_gemm, "accumulates", lambda node: True)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    parallel_state.initialize_model_parallel(2, create_gloo_process_groups=False)
    yield
    groups.finalize()


@pytest.mark.parametrize("kind", ["Column", "Row"])
@pytest.mark.parametrize("is_sequence_parallel", [False, True], ids=["tp", "sp"])
@pytest.mark.parametrize("algorithm", ["int8", "fp8_pc_pt", "int4_w_int8_a", "8da4w"])
def test_ranks_of_tp_2_stay_on_the_device(
    first_of_two, monkeypatch, algorithm, is_sequence_parallel, kind
):
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": is_sequence_parallel}
    linear = make_linear(algorithm, kind, **layout)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CUDA)
    is_cut = is_sequence_parallel and kind == "Column"
    features = SIZE // 2 if kind == "Row" else SIZE
    found = run_step(linear, Ledger(), TOKENS // 2 if is_cut else TOKENS, features)
    assert sum(p.flops for p in found.backward) == 2 * 2 * TOKENS * SIZE * SIZE // 2


@pytest.mark.parametrize(
    "algorithm", ["int8", "fp8", "nvfp4", "mxfp8", "nf4", "int4", "w_uint4_asym"]
)
def test_clipping_methods_and_smoothing_wait_for_nothing(algorithm):
    scheme = named_scheme(algorithm).weight
    with fake_cuda(Ledger()):
        weight, amax = torch.empty(64, 512, device=CUDA), torch.empty(512, device=CUDA)
        scale = smoothquant_scale(amax, weight.abs().amax(dim=0), 0.5)
        assert round_scale(scale, "power_of_two").device == CUDA
        statistic = statistic_of(weight, scheme)
        hessian = torch.empty(512, 512, dtype=torch.float64, device=CUDA)
        for method in CLIPPING_METHODS.values():
            try:
                method.check("fc", scheme)
            except UserError:
                continue
            above = statistic.amax().reshape(1) if scheme.has_global_scale else None
            measured = method.measure(WeightShard(weight, statistic, scheme, above, hessian))
            if isinstance(scheme.granularity, PerTensor):
                measured = measured.sum(dim=(1, 2))[:, None, None]
            chosen = method.choose(statistic, measured, scheme)
            assert chosen.shape == statistic.shape and chosen.device == CUDA


@pytest.mark.parametrize("algorithm", QUANTIZED)
def test_packed_weights_multiply_on_the_device(monkeypatch, algorithm):
    # Once per lowering it looks at what it packs.
    monkeypatch.setattr(packed_weight, "pack_nibbles", lambda codes: codes[..., ::2].clone())
    scheme = named_algorithm(algorithm).scheme
    with fake_cuda(Ledger()):
        weight = torch.empty(64, 512, dtype=torch.bfloat16, device=CUDA)
        frozen = frozen_qparams(statistic_of(weight, scheme.weight), scheme.weight)
        packed = pack_weight(weight, frozen["scale"], scheme, frozen.get("zero_point"))
        x = torch.empty(32, 1, 512, dtype=torch.bfloat16, device=CUDA)
        steps = None
        if scheme.input is not None:
            is_static = not scheme.input.is_dynamic
            shape = (1,) if is_static else scheme.input.granularity.scale_shape(x.shape)
            zero = torch.empty(shape, dtype=torch.int32, device=CUDA)
            steps = torch.empty(shape, device=CUDA), zero if scheme.input.is_asymmetric else None
        assert packed_matmul(x, steps, packed).device == CUDA
        if scheme.input is None:
            x.requires_grad_()
            y = frozen_matmul(x, packed)
            assert backward(y, torch.empty_like(y))[x].device == CUDA
