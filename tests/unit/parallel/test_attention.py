"""Quantized caches inside a real Megatron model of one process."""

import pytest
import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.quant.kv_cache import kv_cache_scheme
from mqat.specs.policy import Policy
from tests.unit.model_fixtures import MODEL, microbatches, switch_off


class Groups:
    tp = None


class Inner(torch.nn.Module):
    """Core attention that only remembers what it was given."""

    def __init__(self, **kwargs):
        super().__init__()
        self.kwargs, self.seen = kwargs, None

    def forward(self, query, key, value, mask, *, attn_mask_type):
        self.seen = (query, key, value, mask, attn_mask_type)
        return key + value


@pytest.fixture
def attention(world):
    from mqat.parallel.attention import KvCacheAttention

    def make(name="int8", scales="shared"):
        return KvCacheAttention(
            attention=Inner, quantized_name="x", scheme=kv_cache_scheme(name, scales), config="c",
            pg_collection=Groups, layer_number=3,
        )  # fmt: skip

    return make


def test_arguments_reach_the_attention_inside(attention):
    module = attention()
    assert module.attention.kwargs == {"config": "c", "pg_collection": Groups, "layer_number": 3}
    query, key, value = torch.randn(3, 4, 2, 1, 8)
    module(query, key, value, None, attn_mask_type="causal")
    assert module.attention.seen == (query, key, value, None, "causal")  # not calibrated: as it is
    assert not module.state_dict()  # checkpoints keep Megatron's own keys


def test_one_scale_is_the_maximum_of_both_and_two_are_their_own(attention):
    key, value = torch.tensor([4.0, -12.7]), torch.tensor([0.013, 1.27])
    for scales, steps in (("shared", [0.1]), ("separate", [0.1, 0.01])):
        module = attention("int8", scales)
        for quantizer in module.quantizers.values():
            quantizer.start_observing()
        module(key, key, value, None, attn_mask_type=None)
        for quantizer in module.quantizers.values():
            quantizer.freeze_(quantizer.observer.amax())
        found = [quantizer.scale.item() for quantizer in module.quantizers.values()]
        assert found == pytest.approx(steps)
        module(key, key, value, None, attn_mask_type=None)
        query, seen_key, seen_value, *_ = module.attention.seen
        assert query is key  # queries are not cached
        assert seen_key.tolist() == pytest.approx([4.0, -12.7])
        expected = [0.0, 1.3] if scales == "shared" else [0.01, 1.27]
        assert seen_value.tolist() == pytest.approx(expected)


def test_gradients_pass_where_nothing_is_clipped(attention):
    module = attention("int8")
    module.quantizers["kv"].freeze_(torch.tensor([1.27]))
    key = torch.tensor([0.5, 1.2, 5.0, -5.0], requires_grad=True)
    value = torch.tensor([9.0, 0.1, 0.2, 0.3], requires_grad=True)
    module(key, key, value, None, attn_mask_type=None).sum().backward()
    assert key.grad.tolist() == [1, 1, 0, 0] and value.grad.tolist() == [0, 1, 1, 1]


@pytest.fixture
def built(world):
    """`built("fp8")`: a tiny model with calibrated caches, and what its attention is given."""

    def make(kv_cache, algorithm="null", method="max", scales="shared", recompute=None):
        from megatron.core import parallel_state

        from mqat.calibration.calibrate import calibrate
        from mqat.checkpoints.pretrained import load_pretrained_
        from mqat.config import ModelConfig
        from mqat.evaluation.forward import evaluate
        from mqat.parallel.attention import KvCacheAttention
        from mqat.specs.model import build_model
        from mqat.training.optimizer import wrap_for_training

        layers = Policy(algorithm, 64, (), kv_cache, scales).schemes(MODEL)
        settings = ModelConfig(activations_checkpoint_granularity=recompute)
        chunks = build_model(MODEL, settings, layers, torch.float32)
        load_pretrained_(chunks, RandomWeights(MODEL, 1, 0.1))
        chunks = wrap_for_training(chunks)
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        calibrate(chunks, lambda: evaluate(chunks, [microbatches()]), group=group, method=method)
        seen = {}
        for module in chunks[0].modules():
            if isinstance(module, KvCacheAttention):

                def remember(inner, args, name=module.quantized_name):
                    seen[name] = [x.detach() for x in args[1:3]]

                module.attention.register_forward_pre_hook(remember)
        return chunks, seen

    return make


def levels(tensors):
    return [int(x.unique().numel()) for x in tensors]


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize(("kv_cache", "most"), [("int8", 256), ("fp8", 254)])
def test_keys_and_values_lie_on_the_grid_before_and_after_a_step(built, kv_cache, most, recompute):
    from mqat.config import OptimizerConfig
    from mqat.evaluation.forward import evaluate
    from mqat.parallel.quantized_module import all_quantizers
    from mqat.training.optimizer import build_optimizer
    from mqat.training.step import forward_backward

    chunks, seen = built(kv_cache, recompute=recompute)
    quantized = evaluate(chunks, [microbatches()])
    assert len(seen) == MODEL.num_layers
    scales = [q.scale.clone() for q in all_quantizers(chunks)]
    for tensors in seen.values():
        assert max(levels(tensors)) <= most
    optimizer, _ = build_optimizer(chunks, OptimizerConfig(lr=1e-3), max_steps=5, clip_grad=1.0)
    for _ in range(2):
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(chunks, microbatches())
        optimizer.step()
    after = evaluate(chunks, [microbatches()])
    assert after[0] < quantized[0]
    for tensors in seen.values():
        assert max(levels(tensors)) <= most
    assert all(torch.equal(q.scale, s) for q, s in zip(all_quantizers(chunks), scales, strict=True))
    switch_off(chunks)
    off = evaluate(chunks, [microbatches()])
    assert off != after
    for tensors in seen.values():  # control: keys themselves take thousands of values
        assert min(levels(tensors)) > 4 * most


def test_what_is_calibrated_is_the_largest_key_after_rope_or_value(built):
    from mqat.evaluation.forward import evaluate
    from mqat.parallel.quantized_module import quantized_modules

    chunks, seen = built("fp8", scales="separate")
    switch_off(chunks)
    largest: dict[str, torch.Tensor] = {}
    for one in microbatches():
        evaluate(chunks, [[one]])
        for name, tensors in seen.items():
            found = torch.stack([x.abs().max() for x in tensors])
            largest[name] = torch.maximum(largest.get(name, torch.zeros(2)), found)
    assert len(seen) == MODEL.num_layers
    for name, module in quantized_modules(chunks).items():
        if name in seen:
            steps = torch.cat([q.scale for q in module.quantizers.values()])
            # Scales are rounded up to bfloat16, at most 2**-7; GEMMs of calibration sum otherwise.
            ratio = steps * 448 / largest[name]
            assert (ratio > 1 - 1e-5).all() and (ratio < 1 + 2**-7 + 1e-5).all()


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_every_observer_calibrates_caches(built, method):
    from mqat.parallel.quantized_module import all_quantizers

    chunks, _ = built("int8", method=method)
    assert all(q.is_frozen and 0 < q.scale.item() < 1 for q in all_quantizers(chunks))


def test_caches_and_linears_are_calibrated_with_one_collective(built, monkeypatch):
    from mqat.calibration import calibrate as calibration

    calls = []
    monkeypatch.setattr(calibration, "all_reduce_fused_", lambda t, *_: calls.append(len(t)))
    built("fp8", "int8")
    built(None, "int8")
    assert len(calls) == 2 and calls[0] == calls[1] + MODEL.num_layers
