"""Run by torchrun: carries out calibration recipes on a tiny model, in each of some layouts.

Arguments: output directory, and a JSON file {layout: {"tp": 2, ...}} of layouts of this world size.
With `experts` the model is a mixture. For every layout there is a `result.json`, and for every recipe
`<recipe>.pt`: all global tensors.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from mqat.checkpoints.random_weights import RandomWeights
from mqat.config import ModelConfig
from mqat.models.decoder import DecoderConfig
from mqat.models.structure import DENSE_LINEARS
from mqat.runtime import groups
from mqat.specs.policy import Policy, Rule
from tests.distributed.worker import EXPERTS, avoid_an_expert

MODEL = DecoderConfig(
    vocab_size=301, hidden_size=128, intermediate_size=256, num_layers=2,
    num_attention_heads=8, num_query_groups=4, head_dim=16, tie_word_embeddings=True,
)  # fmt: skip


def policy(algorithm: str, *, rules: tuple[Rule, ...] = (), **recipe: object) -> Policy:
    """With groups that every layout can cut."""
    return Policy(algorithm, group_size=32, rules=rules, recipe=recipe)


_QKV, _FC2 = DENSE_LINEARS[0].name, DENSE_LINEARS[-1].name
_MIXED = (Rule(f"*.{_FC2}", "int4_awq"), Rule(f"*.{_QKV}", "nvfp4", recipe={"rounding": "gptq"}))
# Name: policy, calibrator of inputs, layers at once.
RECIPES = {
    "smoothquant": (policy("int8", smoothquant=True), "percentile", 0),
    "search": (
        policy("int8", smoothquant=True, sq_alpha=None, sq_grid="float", rounding="gptq"), "mse", 0,
    ),
    "awq": (policy("int4_awq"), "max", 0),
    "gptq": (policy("w_uint4_asym", weight_calibrator="awq", rounding="gptq"), "max", 0),
    "sawb": (
        policy("int4_w_int8_a", smoothquant=True, weight_calibrator="sawb"), "entropy", 1,
    ),
    "tensor": (
        policy("fp8", smoothquant=True, sq_alpha=None, weight_calibrator="mse"), "percentile", 0,
    ),
    "levels": (policy("nvfp4", weight_calibrator="mse", rounding="gptq"), "max", 0),
    "exponents": (
        policy("mxfp4", smoothquant=True, sq_alpha=None, weight_calibrator="awq", rounding="gptq"),
        "max", 0,
    ),
    "blocks": (
        policy("nvfp4", smoothquant=True, sq_alpha=None, sq_grid="float", weight_calibrator="awq"),
        "max", 0,
    ),
    "mixed": (policy("int8", rules=_MIXED), "max", 1),
}  # fmt: skip
# Of a mixture, in which one expert of the first layer sees no token and one of the second a few.
_ATTENTION = Rule("*.self_attention.*", "int8")
EXPERT_RECIPES = {
    "smoothquant": (policy("int8_sq"), "percentile", 0),
    "awq-gptq": (policy("int4_awq", rules=(_ATTENTION,), rounding="gptq"), "max", 0),
    "gptq": (policy("int8", rounding="gptq", weight_calibrator="awq"), "max", 1),
}


def reach_rarely(chunks: list) -> None:
    """Leaves the first expert of the second layer a token of each sequence at most: 16 of 512."""
    from mqat.parallel.quantized_module import unwrapped

    for layer in (layer for chunk in unwrapped(chunks) for layer in chunk.decoder.layers):
        if layer.layer_number == 2:
            router, away = layer.mlp.router, torch.tensor([-1e4, 0.0, 0.0, 0.0])

            def gate(x: torch.Tensor, gating=router.gating, away=away) -> torch.Tensor:
                later = torch.arange(len(x)).view(-1, 1, 1) > 0
                return gating(x) + away * later

            router.gating = gate


@contextmanager
def counting(counts: list[int]) -> Iterator[None]:
    """Counts collectives of numbers (not the agreement on errors) in `counts[0]`."""
    original = dist.all_reduce

    def counted(*args: object, **kwargs: object) -> object:
        counts[0] += 1
        return original(*args, **kwargs)

    dist.all_reduce = counted
    try:
        yield
    finally:
        dist.all_reduce = original


def assembled(state: dict) -> dict[str, torch.Tensor] | None:
    """Global tensors of a sharded state dict, on the first rank; what is replicated must agree.

    Writing a checkpoint would do the same, but starts processes that each import torch.
    """
    apply_factories(state)
    shards: list = []
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor):
            sizes = (1,) * entry.prepend_axis_num + tuple(entry.local_shape)
            where = tuple(slice(o, o + n) for o, n in zip(entry.global_offset, sizes, strict=True))
            shards.append(
                (entry.key, entry.global_shape, where, entry.data.detach().cpu().view(sizes))
            )
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, shards)
    if not groups.is_main():
        return None
    tensors: dict[str, torch.Tensor] = {}
    for key, shape, where, data in (shard for own in gathered for shard in own):
        if key not in tensors:
            tensors[key] = torch.full(shape, torch.nan)
        seen = tensors[key][where]
        assert bool((seen.isnan() | (seen == data)).all()), f"{key}: ranks disagree"
        tensors[key][where] = data.float()
    return tensors


def main() -> None:
    out, layouts = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text("utf-8"))
    for name, layout in layouts.items():
        sizes = {"tensor_parallel": layout.get("tp", 1), "pipeline_parallel": layout.get("pp", 1)}
        groups.initialize(**sizes, expert_parallel=layout.get("ep", 1))
        from megatron.core import parallel_state

        from mqat.calibration.smoothing_pairs import SmoothingPair

        if layout.get("unmerged"):  # wrong: factors of each rank's own experts
            SmoothingPair.expert_ranks = property(lambda pair: None)
        recipes = EXPERT_RECIPES if layout.get("experts") else RECIPES
        result = {recipe: run(out / name / recipe, layout, *how) for recipe, how in recipes.items()}
        if groups.is_main():
            (out / name / "result.json").write_text(json.dumps(result))
        parallel_state.destroy_model_parallel()  # the next layout has other groups of this world
    groups.finalize()


def run(out: Path, layout: dict, asked: Policy, calibrator: str, at_once: int) -> dict:
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate
    from mqat.calibration.weight_recipe import apply_weight_recipe_
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.evaluation.forward import evaluate
    from mqat.parallel.checkpoint import quantizer_sharded_state
    from mqat.specs.model import build_model

    model = EXPERTS if layout.get("experts") else MODEL
    algorithms = asked.resolve(model)
    layers = {name: algorithm.scheme for name, algorithm in algorithms.items()}
    settings = ModelConfig(
        tensor_model_parallel_size=layout.get("tp", 1), sequence_parallel=layout.get("sp", False),
        pipeline_model_parallel_size=layout.get("pp", 1),
        expert_model_parallel_size=layout.get("ep", 1),
    )  # fmt: skip
    dtype = torch.bfloat16 if layout.get("bf16") else torch.float32
    chunks = build_model(model, settings, layers, dtype)
    load_pretrained_(chunks, RandomWeights(model, 1, 0.1))
    if model.num_experts:
        avoid_an_expert(chunks)
        reach_rarely(chunks)
    seed = layout.get("seed", 0)
    tokens = torch.randint(0, 301, (layout.get("batches", 8), 2, 33),
                           generator=torch.Generator().manual_seed(seed))  # fmt: skip
    size, rank = (
        parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank(),
    )  # fmt: skip
    batches = [
        {
            "tokens": t[:, :-1].contiguous(), "labels": t[:, 1:].contiguous(),
            "loss_mask": torch.ones(2, 32), "position_ids": torch.arange(32).expand(2, 32),
            "attention_mask": None,
        }
        for t in tokens
    ][rank::size]  # fmt: skip
    counts, paused = [0], [0]

    def run_batches() -> None:
        before = counts[0]
        evaluate(chunks, [batches])
        paused[0] += counts[0] - before

    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    result = {"unquantized": evaluate(chunks, [batches])[0]}
    qparams, result["idle"] = apply_weight_recipe_(
        chunks, run_batches, {name: algorithm.recipe for name, algorithm in algorithms.items()},
        model=model, calib_layers_at_once=at_once, group=group,
        dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )  # fmt: skip
    result["prepared"] = evaluate(chunks, [batches])[0]
    with counting(counts):
        calibrate(chunks, run_batches, group=group, method=calibrator, weight_qparams=qparams)
    result["collectives"] = counts[0] - paused[0]
    result["quantized"] = evaluate(chunks, [batches])[0]
    state = {"model": [chunk.sharded_state_dict() for chunk in chunks]}
    state["quantizers"] = quantizer_sharded_state(
        chunks, dp_group=parallel_state.get_data_parallel_group()
    )
    tensors = assembled(state)
    if tensors is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, out.with_suffix(".pt"))
    return result


if __name__ == "__main__":
    main()
