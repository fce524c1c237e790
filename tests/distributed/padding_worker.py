"""Run by torchrun: calibrates and measures a tiny model on padded conversations, in some layouts.

Arguments: output directory, and a JSON file {layout: {"tp": 2, ...}} of layouts of this world size.
For every layout and every case there are `<case>.pt`, all global tensors, and `<case>.json`, the quality
report. With two data-parallel ranks, the second one's last microbatch is filler only.
"""

import json
import sys
from pathlib import Path

import torch

from mqat.checkpoints.random_weights import RandomWeights
from mqat.config import ModelConfig
from mqat.quant.algorithm import Recipe
from mqat.quant.scheme import LinearScheme
from mqat.runtime import groups
from mqat.specs.policy import Policy
from tests.distributed.recipes_worker import MODEL, assembled
from tests.unit.model_fixtures import epoch, padded_data, without_masks

# Name: algorithm, calibrator of activations, recipe, key/value cache.
CASES = {
    "static": ("int8", "percentile", Recipe(smoothquant=True), "int8"),
    "maxima": ("fp8", "max", Recipe(weight_calibrator="awq", rounding="gptq"), "fp8"),
    "dynamic": ("int8_pc_pt", "max", Recipe(smoothquant=True), None),
}


def main() -> None:
    out, layouts = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text("utf-8"))
    for name, layout in layouts.items():
        sizes = {"tensor_parallel": layout.get("tp", 1), "pipeline_parallel": layout.get("pp", 1)}
        groups.initialize(**sizes)
        from megatron.core import parallel_state

        for case in CASES:
            run(out / name / case, layout, *CASES[case])
        parallel_state.destroy_model_parallel()  # the next layout has other groups of this world
    groups.finalize()


def run(
    out: Path, layout: dict, algorithm: str, calibrator: str, recipe: Recipe, kv_cache: str | None
) -> None:
    from megatron.core import parallel_state

    from mqat.calibration.calibrate import calibrate
    from mqat.calibration.weight_recipe import apply_weight_recipe_
    from mqat.checkpoints.pretrained import load_pretrained_
    from mqat.evaluation.forward import run_layers
    from mqat.evaluation.quality import quality_report
    from mqat.parallel.checkpoint import quantizer_sharded_state
    from mqat.specs.model import build_model

    layers = Policy(algorithm, 32, (), kv_cache).schemes(MODEL)
    settings = ModelConfig(
        tensor_model_parallel_size=layout.get("tp", 1), sequence_parallel=layout.get("sp", False),
        pipeline_model_parallel_size=layout.get("pp", 1),
    )  # fmt: skip
    chunks = build_model(MODEL, settings, layers, torch.float32)
    load_pretrained_(chunks, RandomWeights(MODEL, 1, 0.1))
    steps = epoch(
        padded_data(20, rows=6), global_batch_size=8,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
    )  # fmt: skip
    if layout.get("ignored"):
        steps = without_masks(steps)

    def run_batches() -> None:
        run_layers(chunks, steps)

    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    dp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    linears = [name for name, scheme in layers.items() if isinstance(scheme, LinearScheme)]
    qparams, _ = apply_weight_recipe_(
        chunks, run_batches, dict.fromkeys(linears, recipe),
        model=MODEL, group=group, dp_group=dp_group,
    )  # fmt: skip
    calibrate(chunks, run_batches, group=group, method=calibrator, weight_qparams=qparams)
    report = quality_report(chunks, run_batches, group=group)
    state = {"model": [chunk.sharded_state_dict() for chunk in chunks]}
    state["quantizers"] = quantizer_sharded_state(
        chunks, dp_group=parallel_state.get_data_parallel_group()
    )
    tensors = assembled(state)
    if tensors is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, out.with_suffix(".pt"))
        out.with_suffix(".json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
