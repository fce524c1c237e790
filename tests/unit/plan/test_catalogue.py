"""Every recipe that is installed with mqat fits its world size; no weights and no data are needed."""

import json
import math
from pathlib import Path

import pytest
import yaml

from mqat.checkpoints.hf_config import decoder_config
from mqat.config import load_config
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.plan.catalogue import DIRECTORY, description, known_model, recipe_file, recipes
from mqat.plan.run import make_plan, memory_estimate
from mqat.plan.sizes import SizesOnly

ROOT = Path(__file__).parents[3]
RECIPES = recipes()
# Of those that do not say it: they run on whatever is there.
WORLD_SIZE = {
    "demo_smollm2": 3, "qat_tiny": 8, "qad_tiny": 8, "qat_experts_int4": 16,
    "qat_counting": 8, "lora_tiny": 2,
}  # fmt: skip
# As published, in billions.
PARAMETERS = {
    "Llama-2-7b-hf": 6.74, "Llama-3.1-8B-Instruct": 8.03, "Llama-3.2-1B": 1.24,
    "Meta-Llama-3-70B": 70.55, "Meta-Llama-3-8B": 8.03, "Mistral-7B-Instruct-v0.3": 7.25,
    "Mixtral-8x7B-Instruct-v0.1": 46.70, "Phi-3-mini-4k-instruct": 3.82, "Qwen2.5-7B-Instruct": 7.62,
    "Qwen3-30B-A3B": 30.53, "Qwen3-8B": 8.19, "SmolLM2-135M-Instruct": 0.135,
}  # fmt: skip
EARLIER_RUN = DecoderConfig(
    hidden_size=128, intermediate_size=384, num_layers=4, num_attention_heads=8, num_query_groups=4,
    head_dim=16, vocab_size=2048, max_position_embeddings=2048,
)  # fmt: skip


class _Opener(SizesOnly):
    """Knows what a run of another recipe leaves, too."""

    def __call__(self, path, key):
        return (EARLIER_RUN, path) if path.parts[0] == "runs" else super().__call__(path, key)


def _plan(name, *overrides, world_size=None):
    config = load_config(RECIPES[name], overrides)
    size = world_size or config.trainer.devices or WORLD_SIZE.get(name, 1)
    return make_plan(config, world_size=size, opener=_Opener())


def test_the_catalogue_is_conf_and_nothing_is_there_twice():
    assert DIRECTORY.resolve() == ROOT / "conf" and len(RECIPES) >= 20
    assert {path.name for path in RECIPES.values()} == {p.name for p in DIRECTORY.glob("*.yaml")}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_world_size(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing is found here
    plan = _plan(name)
    config = plan.config
    assert bool(plan.layers) == (config.command != "sft")
    assert (config.command == "lora") == (config.model.peft is not None)
    assert (config.command == "qat") or not config.quantization.distill
    if config.trainer.devices is not None:
        assert config.exp_manager.exp_dir == f"runs/{name}"
        with pytest.raises(UserError, match=r"world size|devices"):
            _plan(name, world_size=config.trainer.devices + 1)  # control


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_line_of_a_recipe_says_what_it_is_for(name):
    line = description(RECIPES[name])
    assert 40 < len(line) < 110 and line[0].isupper() and line.endswith((".", ")", ";")), line
    text = RECIPES[name].read_text("utf-8")
    assert max(map(len, text.splitlines())) <= 125
    assert next(iter(yaml.safe_load(text))) == "command"


def test_recipes_name_models_whose_sizes_are_known_and_no_sizes_are_left_over():
    stored = {path.stem: path for path in (DIRECTORY / "models").iterdir()}
    assert stored.keys() == PARAMETERS.keys()
    for name, path in stored.items():
        model = decoder_config(json.loads(path.read_text("utf-8")))
        total = sum(math.prod(shape) for shape in model.checkpoint_shapes().values())
        assert total / 1e9 == pytest.approx(PARAMETERS[name], rel=1e-3, abs=0.005), name
    text = " ".join(path.read_text("utf-8") for path in RECIPES.values())
    assert [n for n in stored if f"restore_from_path: {n} " not in text] == [
        "SmolLM2-135M-Instruct"
    ]


def test_a_recipe_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="group_size=128"):
        _plan("qat_llama2_7b_int4_nemo", "model.tensor_model_parallel_size=4")
    with pytest.raises(UserError, match="num_calib_size=100"):
        _plan("ptq_llama3_70b_fp8", "quantization.num_calib_size=100")


def test_ptq_needs_no_optimizer():
    ptq = _plan("ptq_llama3_70b_fp8")
    said = memory_estimate(ptq)["weights, gradients per rank"]
    assert float(said.removesuffix(" GiB")) == pytest.approx(8.8204e9 * 6 / 2**30, abs=0.01)
    assert "weights, gradients, optimizer per rank" in memory_estimate(_plan("sft_llama31_8b"))


def test_a_recipe_is_found_by_name_a_file_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own.yaml"
    own.write_text("command: ptq\n")
    assert recipe_file("own.yaml") == Path("own.yaml")
    assert recipe_file("qat_tiny") == RECIPES["qat_tiny"]
    with pytest.raises(UserError, match=r"own: no such recipe or file"):
        recipe_file("own")
    with pytest.raises(UserError, match=r"did you mean qat_tiny, .*mqat recipes lists them"):
        recipe_file("qat_tinny")


def test_sizes_are_those_of_a_directory_that_is_here_or_are_asked_for(tmp_path):
    said = known_model(Path("Qwen3-8B")).read_text("utf-8")
    (tmp_path / "config.json").write_text(said)
    opener = SizesOnly()
    model, _ = opener(tmp_path, "model.restore_from_path")
    assert model == decoder_config(json.loads(said)) and str(tmp_path) in opener.said[0]
    unknown = Path("nowhere/unknown")
    with pytest.raises(UserError, match=r"unknown: is not here.*--model-config"):
        SizesOnly()(unknown, "model.restore_from_path")
    given = SizesOnly(tmp_path / "config.json")
    assert given(unknown, "model.restore_from_path")[0] == model
    with pytest.raises(UserError, match="teacher=nowhere/unknown: is not here"):
        given(unknown, "quantization.distill.teacher")
    with pytest.raises(UserError, match="leave out --model-config"):
        given(tmp_path, "model.restore_from_path")
    with pytest.raises(UserError, match=r"gone\.json"):
        SizesOnly(tmp_path / "gone.json")(unknown, "model.restore_from_path")


def test_all_that_tensorrt_llm_lacks_for_a_recipe_is_said_at_once():
    changes = ["export.format=trtllm", "export.style=null", "quantization.algorithm=fp8"]
    both = r"2 things do not fit: \(1\) .* in several ways.* \(2\) .*group_size=32"
    with pytest.raises(UserError, match=both):
        _plan("qat_experts_int4", *changes)
