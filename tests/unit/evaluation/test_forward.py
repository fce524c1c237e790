"""Which tokens a model's modules take for real while microbatches run."""

import torch

from tests.unit.model_fixtures import epoch, microbatches, padded_data


def test_modules_know_the_real_tokens_of_each_microbatch_and_forget_them(calibrated):
    from mqat.evaluation.forward import evaluate, run_layers
    from mqat.parallel.quantized_module import quantized_modules
    from mqat.training.step import forward_backward

    chunks = calibrated("int8")
    seen = []
    modules = quantized_modules(chunks)
    last = modules["decoder.layers.1.mlp.linear_fc2"]
    last.register_forward_pre_hook(lambda module, _: seen.append(module.token_mask))
    (step,) = epoch(padded_data(20, rows=2))
    for run in (run_layers, evaluate):
        run(chunks, [step])
        assert torch.equal(torch.stack(seen), torch.stack([m["token_mask"] for m in step]))
        assert all(module.token_mask is None for module in modules.values())
        seen.clear()
    forward_backward(chunks, step)  # nothing is watched in training
    assert seen == [None, None]


def test_an_interleaved_pipeline_gets_whole_rounds_of_microbatches(monkeypatch):
    from mqat.evaluation import forward

    monkeypatch.setattr(forward.parallel_state, "get_pipeline_model_parallel_world_size", lambda: 2)
    sizes = {"experts": 1}
    monkeypatch.setattr(
        forward.parallel_state, "get_expert_model_parallel_world_size", lambda: sizes["experts"]
    )
    own = microbatches(3)
    filled = forward._filled_up(["chunk", "chunk"], own, own, 1)
    assert len(filled) == 4 and all(a is b for a, b in zip(filled, own, strict=False))
    assert not filled[3]["token_mask"].any() and filled[3]["token_mask"].shape == (2, 32)
    assert forward._filled_up(["chunk"], own, own, 1) is own
    assert forward._filled_up(["chunk", "chunk"], [], [], 1) == []
    alone = forward._filled_up(["chunk"], own[1::2], own, 2)
    sizes["experts"] = 2  # the other context-parallel rank has two
    assert len(alone) == 1 and len(forward._filled_up(["chunk"], own[1::2], own, 2)) == 2
