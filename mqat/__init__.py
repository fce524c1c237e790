"""mqat: quantization-aware training for Megatron-Core.

The names below are loaded when they are first used: `import mqat` starts no CUDA and no process group,
and Megatron-Core is imported only after `initialize` has prepared the device.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mqat.calibration.calibrate import calibrate as calibrate
    from mqat.calibration.weight_recipe import apply_weight_recipe_ as apply_weight_recipe_
    from mqat.checkpoints.describe import describe_model as describe_model
    from mqat.checkpoints.dist_checkpoint import load_checkpoint as load_checkpoint
    from mqat.checkpoints.dist_checkpoint import save_checkpoint as save_checkpoint
    from mqat.config import load_config as load_config
    from mqat.evaluation.verification import record_logits as record_logits
    from mqat.export.export import export_hf as export_hf
    from mqat.export.export import export_trtllm as export_trtllm
    from mqat.models.adapters import Adapters as Adapters
    from mqat.models.decoder import DecoderConfig as DecoderConfig
    from mqat.parallel.add_adapters import add_adapters_ as add_adapters_
    from mqat.parallel.add_adapters import merge_adapters_ as merge_adapters_
    from mqat.parallel.layout import shard_count as shard_count
    from mqat.parallel.low_precision_backward import set_backward_ as set_backward_
    from mqat.parallel.pack_weights import pack_weights_ as pack_weights_
    from mqat.parallel.quantized_step import quantized_step as quantized_step
    from mqat.quant.algorithm import Recipe as Recipe
    from mqat.quant.algorithm import named_scheme as named_scheme
    from mqat.runtime.groups import finalize as finalize
    from mqat.runtime.groups import initialize as initialize
    from mqat.specs.backend import gpt_layer_spec as gpt_layer_spec
    from mqat.specs.gpt import quantize_block_spec as quantize_block_spec
    from mqat.specs.gpt import quantize_layer_spec as quantize_layer_spec
    from mqat.specs.policy import Policy as Policy
    from mqat.verify.verify import verify_export as verify_export

_HOME = {
    "Adapters": "mqat.models.adapters",
    "DecoderConfig": "mqat.models.decoder",
    "Policy": "mqat.specs.policy",
    "Recipe": "mqat.quant.algorithm",
    "add_adapters_": "mqat.parallel.add_adapters",
    "calibrate": "mqat.calibration.calibrate",
    "describe_model": "mqat.checkpoints.describe",
    "export_hf": "mqat.export.export",
    "export_trtllm": "mqat.export.export",
    "finalize": "mqat.runtime.groups",
    "gpt_layer_spec": "mqat.specs.backend",
    "initialize": "mqat.runtime.groups",
    "load_checkpoint": "mqat.checkpoints.dist_checkpoint",
    "load_config": "mqat.config",
    "merge_adapters_": "mqat.parallel.add_adapters",
    "pack_weights_": "mqat.parallel.pack_weights",
    "named_scheme": "mqat.quant.algorithm",
    "apply_weight_recipe_": "mqat.calibration.weight_recipe",
    "record_logits": "mqat.evaluation.verification",
    "quantize_block_spec": "mqat.specs.gpt",
    "quantize_layer_spec": "mqat.specs.gpt",
    "quantized_step": "mqat.parallel.quantized_step",
    "shard_count": "mqat.parallel.layout",
    "set_backward_": "mqat.parallel.low_precision_backward",
    "save_checkpoint": "mqat.checkpoints.dist_checkpoint",
    "verify_export": "mqat.verify.verify",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module 'mqat' has no attribute {name!r}; public: {__all__}.")
    return getattr(import_module(_HOME[name]), name)
