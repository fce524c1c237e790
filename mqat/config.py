"""A run's configuration: typed sections with NeMo's key names, and the strict loader.

Precedence: `key=value` on the command line over the YAML file over the defaults here. An unknown key
is an error that suggests the nearest one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mqat.errors import UserError, nearest_hint
from mqat.models.decoder import FAMILIES
from mqat.quant.algorithm import Recipe
from mqat.quant.kv_cache import KV_CACHES, KV_SCALES
from mqat.quant.observers import METHODS


@dataclass
class TrainerConfig:
    """How long, on how many processes, in which precision."""

    devices: int | None = None  # processes per node; None: whatever torchrun started
    num_nodes: int = 1
    precision: str = "auto"  # bf16, 32, or auto: bf16 where the device multiplies it natively
    max_steps: int = 100
    val_check_interval: int = 0  # steps; 0: only at the end of a phase
    log_every_n_steps: int = 10  # a line, where the output is no terminal
    limit_val_samples: int | None = None
    gradient_clip_val: float = 1.0
    seed: int = 1234


@dataclass
class SchedulerConfig:
    """Learning-rate schedule, in optimizer steps."""

    name: str = "CosineAnnealing"  # or "constant"
    warmup_steps: int = 0
    min_lr: float = 0.0


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: float = 1e-5
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    sched: SchedulerConfig = field(default_factory=SchedulerConfig)


@dataclass
class DataConfig:
    """Training and validation files, or the name of a packaged text."""

    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    packaged: str | None = None  # "wikipedia" or "python_docs": text that installs from packages
    format: str = "text"  # text or sft
    seq_length: int = 512
    bad_lines: str = "error"  # or "skip": bad lines are counted and left out


@dataclass
class ArchitectureConfig:
    """A Llama-shaped model to train from random weights."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_attention_heads: int = 8
    num_query_groups: int = 4
    head_dim: int | None = None
    vocab_size: int = 2048
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True


@dataclass
class PretrainConfig:
    """Unquantized training before quantization; needed when starting from random weights."""

    max_steps: int = 0
    lr: float = 3e-3


@dataclass
class ModelConfig:
    """Where the weights come from, how they are split, and how they are trained."""

    restore_from_path: str | None = None  # HF directory, .gguf, or mqat checkpoint
    packaged: str | None = None  # "smollm2": the model that installs from a package
    architecture: ArchitectureConfig | None = None
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    # Of mixtures of experts: ranks that share a layer's experts, and each expert (null: as TP; or 1).
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    moe_aux_loss_coeff: float = 0.0  # of the load-balancing loss in training (Switch Transformer's)
    # By how much a training step moves the numbers that correct a router's choice, where there are some.
    moe_router_bias_update_rate: float = 0.0
    micro_batch_size: int = 1
    global_batch_size: int = 8
    activations_checkpoint_granularity: str | None = None  # selective or full
    activations_checkpoint_num_layers: int = 1
    transformer_engine: bool = False  # its attention, on CUDA (extra: te)
    # Switches for speed and memory, by Megatron's names: of TransformerConfig (apply_rope_fusion), and
    # of DistributedDataParallelConfig (overlap_grad_reduce, overlap_param_gather, bucket_size).
    megatron: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)


@dataclass
class OperandConfig:
    """How one operand of a linear is quantized."""

    format: str | None = None  # int2 .. int8, uint2 .. uint8, fp8_e4m3, fp8_e5m2, fp4_e2m1, nf4
    granularity: str | None = None  # tensor, channel, token, group:<size> or block:<size>
    scale: str = "float32"  # or bfloat16, e8m0 (MX), e4m3 (NVFP4: under a global scale)
    dynamic: bool = False  # scales of every tensor that arrives (inputs and outputs)
    asymmetric: bool = False  # with an integer zero point


@dataclass
class RuleConfig:
    """Linears that match a name pattern, and their algorithm or operands; the first match wins."""

    pattern: str
    algorithm: str | None = None
    weight: OperandConfig | None = None
    input: OperandConfig | None = None
    output: OperandConfig | None = None
    recipe: dict[str, Any] = field(default_factory=dict)  # smoothquant ... rounding, as below


@dataclass
class DistillConfig:
    """Quantization-aware distillation (QAD): an unquantized model teaches the quantized one."""

    teacher: str | None = None  # as model.restore_from_path; null: the weights that QAT starts from
    divergence: str = "forward_kl"  # KL(teacher || student); or reverse_kl
    weight: float = 1.0  # share of the divergence; the rest is cross entropy with the text
    temperature: float = 1.0
    top_k: int | None = None  # compare the teacher's likeliest k tokens alone
    hidden_weight: float = 0.0  # of the distance between both models' last hidden states
    offload_teacher: bool = False  # its weights wait in host memory while the student trains


@dataclass
class QuantizationConfig:
    """What is quantized, how scales are found, and when fake quantization starts."""

    algorithm: str | None = "int8"
    group_size: int | None = None  # null: 128, for 8da4w 256
    rules: list[RuleConfig] = field(default_factory=list)
    kv_cache: str | None = None  # int8 or fp8: cached keys (after RoPE) and values
    kv_cache_scales: str = "shared"  # one a layer; or separate for keys and values ("hf" only)
    calibrator: str = "max"  # of inputs and caches: max, percentile, mse or entropy
    percentile: float = 99.9999
    num_calib_size: int = 16  # sequences
    calib_spread: bool = True  # sequences spread evenly over the data; false: the first of the file
    calib_layers_at_once: int = 0  # layers whose recipes are carried out in one pass; 0: all
    disabled: list[str] = field(default_factory=list)  # "*.linear_fc2.input"; served so, too
    fake_quant_after_n_steps: int = 0
    inputs_after_n_steps: int | None = None  # null: with the others
    bit_schedule: list[Any] = field(default_factory=list)  # of weights: [[0, 8], [100, 4]]
    weight_scales: str = "frozen"  # or lsq: trained with the weights
    input_scales: str = "frozen"  # static ones; lsq, or pact: only clipped elements train them
    backward: str = "bf16"  # exact; or int8, fp8: 8-bit gradient GEMMs, stochastically rounded
    lsq_lr: float | None = None  # null: model.optim.lr
    pact_a_lr: float = 0.01  # of clip values, in units of the input
    pact_a_decay: float = 5e-5  # decoupled weight decay of clip values
    distill: DistillConfig | None = None
    decoder_type: str | None = None
    # Recipe of the weights (docs/quality.md); auto: the algorithm's own.
    smoothquant: Any = "auto"  # true: first move activation outliers into weights (same function)
    sq_alpha: Any = "auto"  # SmoothQuant's strength, 0.8; null: searched for every linear
    sq_grid: str = "auto"  # power_of_two: exact to fold; or float: finer, folding rounds
    weight_calibrator: str = "auto"  # max, mse, awq (output error), sawb, four_over_six (nvfp4)
    rounding: str = "auto"  # nearest; or gptq: error-compensated, before any training
    compare_with_finetuned: bool = True  # also train the unquantized model for as many steps

    @property
    def recipe(self) -> dict[str, Any]:
        """The keys of `Recipe` that are chosen here; one that equals a default is a choice, too."""
        keys = {f.name: getattr(self, f.name, "auto") for f in fields(Recipe)}
        return {key: value for key, value in keys.items() if value != "auto"}

    @property
    def weight_rule(self) -> Any:
        """How weight scales are trained (`quant.learned.Rule`); None: they stay as calibrated."""
        return None if self.weight_scales == "frozen" else self.weight_scales

    @property
    def input_rule(self) -> Any:
        """The same for inputs."""
        return None if self.input_scales == "frozen" else self.input_scales


@dataclass
class ExportConfig:
    """The directory for serving; nothing is exported while `format` is null."""

    format: str | None = "trtllm"  # or "hf", "nemo" (`export/exporters.py`)
    style: str | None = None  # of quantized tensors in "hf": compressed-tensors (null) or modelopt
    decoder_type: str | None = None
    inference_tensor_parallel: int = 1
    inference_pipeline_parallel: int = 1
    dtype: str = "bfloat16"
    allow_requantization: bool = False  # int8_wo in "trtllm", whose loader rounds a second time
    save_path: str | None = None  # default: <exp_dir>/<format>
    verify: bool = True


@dataclass
class ExperimentConfig:
    """The run directory and what is written to it."""

    exp_dir: str = "runs/qat"
    # Of an earlier run in exp_dir: go on with it (true), put it aside (false), or (null) go on if it did
    # not come to its end and had the same settings.
    resume_if_exists: bool | None = None
    # Which of `RESUME_CHANGES` a resumed run has other values for than before: files that have moved
    # (with the same content), more steps, another learning rate.
    resume_changes: list[str] = field(default_factory=list)
    checkpoint_interval: int = 0  # steps; 0: by time alone
    checkpoint_minutes: float = 15.0  # a checkpoint at least so often; 0: by steps alone
    keep_last: int = 2  # checkpoints of a phase; older ones are deleted; 0: all are kept
    create_tensorboard_logger: bool = True
    quality_report: bool = False  # of every quantized linear, after calibration
    sample_prompts: list[str] = field(default_factory=list)
    sample_tokens: int = 24

    @property
    def keeps_last_state(self) -> bool:
        """Whether a finished phase leaves its optimizer's state, to go on from with more steps."""
        return bool(self.resume_if_exists) or self.checkpoint_interval > 0


@dataclass
class RunConfig:
    """Everything about a run."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    exp_manager: ExperimentConfig = field(default_factory=ExperimentConfig)


# That of the model, unless somebody insists (`plan.make_plan` compares).
_DECODERS = (None, *sorted({name for f in FAMILIES.values() for name in f.decoder_types}))
_CHOICES = {
    "trainer.precision": ("auto", "bf16", "32"),
    "model.optim.sched.name": ("CosineAnnealing", "constant"),
    "model.data.format": ("text", "sft"),
    "model.data.bad_lines": ("error", "skip"),
    "model.data.packaged": (None, "wikipedia", "python_docs"),
    "model.packaged": (None, "smollm2"),
    "model.activations_checkpoint_granularity": (None, "selective", "full"),
    "quantization.calibrator": METHODS,
    "quantization.kv_cache": (None, *KV_CACHES),
    "quantization.kv_cache_scales": KV_SCALES,
    "quantization.weight_scales": ("frozen", "lsq"),
    "quantization.input_scales": ("frozen", "lsq", "pact"),
    "quantization.backward": ("bf16", "int8", "fp8"),
    "quantization.decoder_type": _DECODERS,
    "export.decoder_type": _DECODERS,
}

# A schedule that is constant may take more `trainer.max_steps` without being told so.
RESUME_CHANGES = (
    "trainer.max_steps", "model.data.train", "model.data.validation", "model.restore_from_path",
    "model.optim.lr", "model.optim.sched.min_lr", "quantization.distill.teacher",
)  # fmt: skip

_MINIMUM = {
    "trainer.max_steps": 0,
    "trainer.num_nodes": 1,
    "trainer.limit_val_samples": 1,
    "trainer.gradient_clip_val": 0,
    "trainer.val_check_interval": 0,
    "trainer.log_every_n_steps": 1,
    "model.optim.lr": 0,
    "model.optim.weight_decay": 0,
    "model.optim.sched.warmup_steps": 0,
    "model.optim.sched.min_lr": 0,
    "model.pretrain.max_steps": 0,
    "model.pretrain.lr": 0,
    "exp_manager.checkpoint_interval": 0,
    "exp_manager.checkpoint_minutes": 0,
    "exp_manager.keep_last": 0,
    "exp_manager.sample_tokens": 0,
    "model.tensor_model_parallel_size": 1,
    "model.pipeline_model_parallel_size": 1,
    "model.context_parallel_size": 1,
    "model.expert_model_parallel_size": 1,
    "model.expert_tensor_parallel_size": 1,
    "model.moe_aux_loss_coeff": 0,
    "model.moe_router_bias_update_rate": 0,
    "model.micro_batch_size": 1,
    "model.global_batch_size": 1,
    "model.data.seq_length": 2,
    "quantization.num_calib_size": 1,
    "quantization.calib_layers_at_once": 0,
    "quantization.group_size": 1,
    "quantization.fake_quant_after_n_steps": 0,
    "quantization.inputs_after_n_steps": 0,
    "quantization.lsq_lr": 0,
    "quantization.pact_a_lr": 0,
    "quantization.pact_a_decay": 0,
    "export.inference_tensor_parallel": 1,
    "export.inference_pipeline_parallel": 1,
}


# Former key -> the present one.
_RENAMED = {
    "quantization.equalize": "quantization.smoothquant",
    "quantization.equalize_alpha": "quantization.sq_alpha",
    "quantization.equalize_grid": "quantization.sq_grid",
}


# Sections that are null unless somebody sets one of their keys.
_OPTIONAL = {"model.architecture": ArchitectureConfig, "quantization.distill": DistillConfig}


def _check_keys(given: Any, schema: Any, path: str) -> None:
    """Refuses former keys with their new name, unknown ones with the nearest known.

    `schema` is a dataclass type or an instance.
    """
    if not isinstance(given, Mapping):
        return
    known = {f.name: f for f in fields(schema)}
    for key, value in given.items():
        full = f"{path}{key}"
        for index, rule in enumerate(value if full == "quantization.rules" and value else ()):
            _check_keys(rule, RuleConfig(""), f"{full}[{index}].")
        if full in _RENAMED:
            raise UserError(f"config: {full} is now {_RENAMED[full]}.")
        if key not in known:
            raise UserError(f"config: unknown key {full!r}; {nearest_hint(key, known)}")
        nested: Any = _OPTIONAL.get(full)
        if isinstance(schema, RuleConfig) and key in ("weight", "input", "output"):
            nested = OperandConfig
        default = getattr(schema, key, None) if not isinstance(schema, type) else None
        if nested is None and is_dataclass(default):
            nested = type(default)
        if nested is not None:
            if value is not None and not isinstance(value, Mapping):
                first = fields(nested)[0].name
                raise UserError(
                    f"config: {full}={value!r} is a section, not a value; set its keys, such as "
                    f"{full}.{first}."
                )
            _check_keys(value, nested(), f"{full}.")


def _lookup(config: RunConfig, dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def _check_values(config: RunConfig) -> None:
    for key, choices in _CHOICES.items():
        value = _lookup(config, key)
        if value not in choices:
            allowed = ", ".join("null" if choice is None else choice for choice in choices)
            raise UserError(f"config: {key}={value!r} is not one of: {allowed}.")
    for key, minimum in _MINIMUM.items():
        value = _lookup(config, key)
        if value is not None and not minimum <= value < math.inf:  # NaN fails both
            raise UserError(f"config: {key}={value} must be a number of at least {minimum}.")
    for key in config.exp_manager.resume_changes:
        if key not in RESUME_CHANGES:
            allowed = ", ".join(RESUME_CHANGES)
            raise UserError(
                f"config: exp_manager.resume_changes: {key!r} is not one of: {allowed}."
            )
    if config.exp_manager.resume_changes and not config.exp_manager.resume_if_exists:
        raise UserError(
            "config: exp_manager.resume_changes needs exp_manager.resume_if_exists=true."
        )
    _check_optimizer(config)
    quantization = config.quantization
    if not 0 < quantization.percentile <= 100:
        raise UserError(
            f"config: quantization.percentile={quantization.percentile} must be in (0, 100]; "
            "99.99 keeps all but one value in 10,000."
        )
    Recipe().with_keys(quantization.recipe, "quantization")
    if quantization.distill is not None:
        _check_distill(quantization.distill)


def _check_distill(distill: DistillConfig) -> None:
    rules = {
        "divergence": (
            distill.divergence in ("forward_kl", "reverse_kl"),
            "forward_kl or reverse_kl",
        ),
        "weight": (
            0 < distill.weight <= 1,
            "a number in (0, 1]; without a divergence, leave out distill",
        ),
        "temperature": (0 < distill.temperature < math.inf, "a number above 0"),
        "top_k": (distill.top_k is None or distill.top_k > 1, "null, or at least 2 tokens"),
        "hidden_weight": (0 <= distill.hidden_weight < math.inf, "a number of at least 0"),
    }
    for key, (is_right, rule) in rules.items():
        if not is_right:
            value = getattr(distill, key)
            raise UserError(f"config: quantization.distill.{key}={value} must be {rule}.")


def _check_optimizer(config: RunConfig) -> None:
    optim = config.model.optim
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise UserError(f"config: model.optim.betas={optim.betas} must be two numbers in [0, 1).")
    phases = {
        "trainer.max_steps": (config.trainer.max_steps, optim.lr),
        "model.pretrain.max_steps": (config.model.pretrain.max_steps, config.model.pretrain.lr),
    }
    for key, (steps, lr) in phases.items():
        if 0 < steps <= optim.sched.warmup_steps:
            raise UserError(
                f"config: model.optim.sched.warmup_steps={optim.sched.warmup_steps} must be below "
                f"{key}={steps}, or the learning rate never reaches its peak."
            )
        if steps and optim.sched.min_lr > lr:
            raise UserError(
                f"config: model.optim.sched.min_lr={optim.sched.min_lr} exceeds the learning rate "
                f"{lr} of {key.removesuffix('.max_steps')}."
            )


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Defaults, then a YAML file, then `section.key=value` overrides.

    Raises:
        UserError: Unreadable file, unknown key, wrong type or value; the message names the key.
    """
    layers: list[Any] = []
    if path is not None:
        try:
            layers.append(OmegaConf.load(path))
        except OSError as error:
            raise UserError(f"config file {path}: {error.strerror or error}.") from error
        except UnicodeDecodeError as error:
            raise UserError(f"config file {path}: {error}.") from error
        except yaml.YAMLError as error:
            raise UserError(f"config file {path}: not valid YAML: {error}") from error
    for override in overrides:
        if "=" not in override:
            raise UserError(f"argument {override!r}: expected section.key=value.")
    try:
        layers.append(OmegaConf.from_dotlist(list(overrides)))
        for layer in layers:
            _check_keys(OmegaConf.to_container(layer, resolve=True), RunConfig(), "")
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), *layers)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        key = getattr(error, "full_key", None)
        raise UserError(f"config: {key}: {message}" if key else f"config: {message}") from error
    assert isinstance(config, RunConfig)
    _check_values(config)
    return config


def config_to_yaml(config: RunConfig) -> str:
    """The resolved configuration, as written to `<exp_dir>/config.yaml`."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))
