"""A run's configuration: typed sections with NeMo's key names, and the strict loader.

Precedence: `key=value` on the command line over the YAML file over the defaults here. An unknown key
is an error that suggests the nearest one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mqat import experiment_config
from mqat.errors import UserError, nearest_hint
from mqat.experiment_config import ExperimentConfig, contradictions
from mqat.models.decoder import FAMILIES
from mqat.models.structure import DENSE_LINEARS
from mqat.quant.algorithm import Recipe
from mqat.quant.kv_cache import KV_CACHES, KV_SCALES
from mqat.quant.observers import METHODS


@dataclass
class TrainerConfig:
    """How long, on how many processes, in which precision."""

    devices: int | None = None  # processes on a node; null: one, or what torchrun started
    num_nodes: int = 1  # started by torchrun on each of them
    precision: str = "auto"  # auto: bf16 where the device multiplies it natively
    max_steps: int = 100  # optimizer steps of SFT or QAT; 0: none
    val_check_interval: int = 0  # steps between validations; 0: only at the end of a phase
    log_every_n_steps: int = 10  # steps between lines of the log, where the output is no terminal
    limit_val_samples: int | None = None  # held-out sequences to validate on; null: all
    gradient_clip_val: float = 1.0  # largest norm of all gradients together; 0: not clipped
    deterministic: bool = False  # operations that give the same bits every time, or an error
    seed: int = 1234  # of the order of data, random weights, stochastic rounding


@dataclass
class SchedulerConfig:
    """Learning-rate schedule, in optimizer steps."""

    name: str = "CosineAnnealing"  # shape after the warm-up: down to min_lr, or constant
    warmup_steps: int = 0  # over which the rate rises from 0 to its peak
    min_lr: float = 0.0  # the rate at the end of CosineAnnealing


@dataclass
class OptimizerConfig:
    """AdamW, whose state is spread over data-parallel ranks (Megatron's distributed optimizer)."""

    name: str = "adamw"  # others are refused with their reason (`plan.optimizer`)
    lr: float = 1e-5  # peak learning rate
    weight_decay: float = 0.0  # decoupled; not of norms and biases
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # decay of both moments
    eps: float = 1e-8  # added to the root of the second moment
    exp_avg_dtype: str = "float32"  # of first moments; bfloat16: with Transformer Engine, on CUDA
    exp_avg_sq_dtype: str = "float32"  # of second moments, likewise
    optimizer_cpu_offload: bool = False  # refused
    sched: SchedulerConfig = field(default_factory=SchedulerConfig)


@dataclass
class DataConfig:
    """Training and validation files, or the name of a packaged text."""

    train: list[str] = field(default_factory=list)  # files to train on (docs/data.md)
    validation: list[str] = field(default_factory=list)  # files held out: whole documents
    packaged: str | None = None  # instead of files: text that installs from packages
    format: str = "text"  # of the files: text to continue, or sft: questions and answers, chats
    columns: list[str] = field(default_factory=list)  # keys of a record that are read; []: all
    seq_length: int = 512  # tokens of a sequence
    bad_lines: str = "error"  # on a line that cannot be read; skip: it is counted and left out


@dataclass
class ArchitectureConfig:
    """A Llama-shaped model to train from random weights."""

    hidden_size: int = 128  # channels between layers
    intermediate_size: int = 384  # channels inside of an MLP
    num_layers: int = 4  # decoder layers
    num_attention_heads: int = 8  # heads of queries
    num_query_groups: int = 4  # heads of keys and of values
    head_dim: int | None = None  # channels of a head; null: hidden_size / num_attention_heads
    vocab_size: int = 2048  # tokens of the tokenizer, which is trained on the data
    max_position_embeddings: int = 2048  # longest sequence
    tie_word_embeddings: bool = True  # whether the output layer is the embedding


@dataclass
class PretrainConfig:
    """Unquantized training before quantization; needed when starting from random weights."""

    max_steps: int = 0  # optimizer steps; 0: none
    lr: float = 3e-3  # peak learning rate


@dataclass
class LoraConfig:
    """Low-rank adapters: a linear computes W x + alpha / adapter_dim * B A x, and W is frozen."""

    # Patterns of names: of the linear alone, or of all of it, "*.layers.3.*.linear_qkv".
    target_modules: list[str] = field(
        default_factory=lambda: [linear.name.rpartition(".")[2] for linear in DENSE_LINEARS]
    )
    adapter_dim: int = 32  # the rank
    alpha: float | None = None  # null: adapter_dim
    adapter_dropout: float = 0.0  # of an adapter's inputs, in training


@dataclass
class PeftConfig:
    """Parameter-efficient fine-tuning: adapters are trained, everything else is frozen."""

    peft_scheme: str = "lora"  # the only one
    # What is served. false: the model, quantized or not, with the adapters beside it; true: W + B A, and
    # that is what is quantized, in training too.
    merge: bool = False
    lora_tuning: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class ModelConfig:
    """Where the weights come from, how they are split, and how they are trained."""

    restore_from_path: str | None = (
        None  # HF directory, .gguf, Megatron-LM, NeMo or mqat checkpoint
    )
    packaged: str | None = None  # instead of a path: the model that installs from a package
    architecture: ArchitectureConfig | None = None  # instead of a path: random weights
    tensor_model_parallel_size: int = 1  # ranks that share each layer
    pipeline_model_parallel_size: int = 1  # stages that the layers are cut into
    # Model chunks of a stage of an interleaved pipeline; null: one.
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1  # ranks that share each sequence
    sequence_parallel: bool = (
        False  # tokens between the linears are cut over the ranks of a layer, too
    )
    expert_model_parallel_size: int = 1  # of mixtures: ranks that share a layer's experts
    expert_tensor_parallel_size: int | None = (
        None  # of mixtures: ranks that share an expert; null: as TP
    )
    moe_aux_loss_coeff: float = 0.0  # of the load-balancing loss in training (Switch Transformer's)
    # By how much a training step moves the numbers that correct a router's choice, where there are some.
    moe_router_bias_update_rate: float = 0.0
    micro_batch_size: int = 1  # sequences of one forward pass of a data-parallel rank
    global_batch_size: int = 8  # sequences of one optimizer step, over all ranks
    # What is computed again in backward instead of kept: nothing, attention, or layers.
    activations_checkpoint_granularity: str | None = None
    activations_checkpoint_num_layers: int = 1  # with full: layers computed again at once
    cpu_offloading: bool = False  # activations wait in host memory for their backward pass; on CUDA
    chunked_cross_entropy: bool = False  # no float32 [tokens, vocabulary]: some tokens at a time
    transformer_engine: bool = False  # its attention, on CUDA (extra: te)
    # Switches for speed and memory of Megatron's TransformerConfig, such as apply_rope_fusion.
    megatron: dict[str, Any] = field(default_factory=dict)
    # The same of its DistributedDataParallelConfig: overlap_grad_reduce, bucket_size, ...
    ddp: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    peft: PeftConfig | None = None


@dataclass
class OperandConfig:
    """How one operand of a linear is quantized."""

    format: str | None = None  # number format of the codes
    granularity: str | None = (
        None  # who shares a scale: tensor, channel, token, group:<size>, block:<size>
    )
    scale: str = "float32"  # grid of the scales: e8m0 is MX's, e4m3 NVFP4's (under a global one)
    dynamic: bool = False  # scales of every tensor that arrives (inputs and outputs)
    asymmetric: bool = False  # with an integer zero point
    exponent: str = (
        "floor"  # of e8m0: floor (OCP), nearest (compressed-tensors, AITER), ceil (NVIDIA)
    )


@dataclass
class RuleConfig:
    """Linears that match a name pattern, and their algorithm or operands; the first match wins."""

    pattern: str  # names of linears, such as "decoder.layers.0.*" or "*.mlp.linear_fc2"
    algorithm: str | None = None  # as quantization.algorithm; or the operands below
    weight: OperandConfig | None = None  # null: not quantized
    input: OperandConfig | None = None  # null: not quantized
    output: OperandConfig | None = None  # null: not quantized
    # Of the weights: smoothquant, sq_alpha, sq_grid, search_steps, weight_calibrator, rounding.
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass
class DistillConfig:
    """Quantization-aware distillation (QAD): an unquantized model teaches the quantized one."""

    teacher: str | None = None  # as model.restore_from_path; null: the weights that QAT starts from
    divergence: str = "forward_kl"  # forward: KL(teacher || student); reverse: the other way round
    weight: float = 1.0  # share of the divergence; the rest is cross entropy with the text
    temperature: float = 1.0  # that both models' logits are divided by
    top_k: int | None = None  # compare the teacher's likeliest k tokens alone
    hidden_weight: float = 0.0  # of the distance between both models' last hidden states
    offload_teacher: bool = False  # its weights wait in host memory while the student trains


@dataclass
class QuantizationConfig:
    """What is quantized, how scales are found, and when fake quantization starts."""

    algorithm: str | None = (
        "int8"  # of all linears that no rule decides; null: none (docs/quality.md)
    )
    group_size: int | None = None  # weights that share a scale; null: 128, for 8da4w 256
    # Patterns of linears with another algorithm; the first that matches decides.
    rules: list[RuleConfig] = field(default_factory=list)
    kv_cache: str | None = None  # cached keys (after RoPE) and values
    kv_cache_scales: str = "shared"  # one a layer; or separate for keys and values ("hf" only)
    calibrator: str = "max"  # how scales of inputs and caches are found
    percentile: float = 99.9999  # of |x| that calibrator=percentile keeps
    input_headroom: float = (
        1.0  # NVFP4: room of inputs' upper scale above calibrated maxima, a factor
    )
    num_calib_size: int = 16  # sequences to calibrate on
    calib_spread: bool = True  # sequences spread evenly over the data; false: the first of the file
    calib_layers_at_once: int = 0  # layers whose recipes are carried out in one pass; 0: all
    # Operands left out by name, such as "*.linear_fc2.input"; served so, too.
    disabled: list[str] = field(default_factory=list)
    fake_quant_after_n_steps: int = 0  # QAT computes unquantized until then
    inputs_after_n_steps: int | None = None  # the same of inputs; null: with the others
    bit_schedule: list[Any] = field(default_factory=list)  # of weights: [[0, 8], [100, 4]]
    # Under adapters (model.peft): weights are packed as they are loaded, never held in floats. NF4 with
    # double quantization, or groups of 4-bit integers, by the scales of a calibrated checkpoint.
    compress: bool = False
    weight_scales: str = "frozen"  # as calibrated; lsq: trained with the weights
    input_scales: str = (
        "frozen"  # static ones; lsq: trained; pact: only clipped elements train them
    )
    backward: str = "bf16"  # exact; int8, fp8: 8-bit gradient GEMMs, stochastically rounded
    lsq_lr: float | None = None  # learning rate of scales; null: model.optim.lr
    pact_a_lr: float = 0.01  # learning rate of clip values, in units of the input
    pact_a_decay: float = 5e-5  # decoupled weight decay of clip values
    distill: DistillConfig | None = None  # an unquantized model teaches (docs/distillation.md)
    decoder_type: str | None = (
        None  # refused unless it is the model's: NeMo's command lines have it
    )
    # The next five, as far as they are not auto, replace the algorithm's own recipe of the weights.

    smoothquant: Any = "auto"  # true: first move activation outliers into weights (same function)
    sq_alpha: Any = "auto"  # SmoothQuant's strength from 0 to 1; null: searched for every linear
    sq_grid: str = "auto"  # of SmoothQuant's factors; power_of_two: exact to fold; float: finer
    weight_calibrator: str = "auto"  # how weight scales are found; awq: by the output's error
    rounding: str = "auto"  # of weights; gptq: error-compensated, before any training
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

    format: str | None = "trtllm"  # of the directory (docs/export.md); null: none is written
    style: str | None = None  # of quantized tensors in hf; null: compressed-tensors
    decoder_type: str | None = (
        None  # refused unless it is the model's: NeMo's command lines have it
    )
    inference_tensor_parallel: int = 1  # trtllm: ranks that share each layer
    inference_pipeline_parallel: int = 1  # trtllm: stages that the layers are cut into
    dtype: str = "bfloat16"  # of unquantized tensors
    allow_requantization: bool = False  # int8_wo in "trtllm", whose loader rounds a second time
    save_path: str | None = None  # directory of the export; null: <exp_dir>/<format>
    verify: bool = True  # read it back, and compare it with the trained model


@dataclass
class RunConfig:
    """Everything about a run."""

    command: str | None = None  # what `mqat run` does with these settings
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    exp_manager: ExperimentConfig = field(default_factory=ExperimentConfig)


COMMANDS = ("sft", "ptq", "qat", "lora")
# That of the model, unless somebody insists (`plan.make_plan` compares).
_DECODERS = (None, *sorted({name for f in FAMILIES.values() for name in f.decoder_types}))
CHOICES: dict[str, Any] = experiment_config.CHOICES | {
    "command": (None, *COMMANDS),
    "trainer.precision": ("auto", "bf16", "32"),
    "model.optim.sched.name": ("CosineAnnealing", "constant"),
    "model.data.format": ("text", "sft"),
    "model.data.bad_lines": ("error", "skip"),
    "model.data.packaged": (None, "wikipedia", "python_docs", "counting"),
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

MINIMUM = experiment_config.MINIMUM | {
    "quantization.input_headroom": 1,
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


def section(schema: type, key: str) -> type | None:
    """The class of the keys below a key, where that may be null or a list of them, too; or None."""
    hint = get_type_hints(schema)[key]
    kinds = (kind for kind in (hint, *get_args(hint)) if isinstance(kind, type))
    return next((kind for kind in kinds if is_dataclass(kind)), None)


def _check_keys(given: Any, schema: type, path: str) -> None:
    """Refuses former keys with their new name, unknown ones with the nearest known."""
    if not isinstance(given, Mapping):
        return
    known = {f.name: f for f in fields(schema)}
    for key, value in given.items():
        full = f"{path}{key}"
        if full in _RENAMED:
            raise UserError(f"config: {full} is now {_RENAMED[full]}.")
        if key not in known:
            raise UserError(f"config: unknown key {full!r}; {nearest_hint(key, known)}")
        nested = section(schema, key)
        if nested is RuleConfig:
            for index, rule in enumerate(value or ()):
                _check_keys(rule, RuleConfig, f"{full}[{index}].")
        elif nested is not None:
            if value is not None and not isinstance(value, Mapping):
                first = fields(nested)[0].name
                raise UserError(
                    f"config: {full}={value!r} is a section, not a value; set its keys, such as "
                    f"{full}.{first}."
                )
            _check_keys(value, nested, f"{full}.")


def _lookup(config: RunConfig, dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def _check_values(config: RunConfig) -> None:
    for key, choices in CHOICES.items():
        value = _lookup(config, key)
        if value not in choices:
            allowed = ", ".join("null" if choice is None else choice for choice in choices)
            raise UserError(f"config: {key}={value!r} is not one of: {allowed}.")
    for key, minimum in MINIMUM.items():
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
    trainer = config.trainer
    for wrong in contradictions(
        config.exp_manager,
        max_steps=trainer.max_steps,
        val_check_interval=trainer.val_check_interval,
    ):
        raise UserError(f"config: {wrong}")
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
    if config.model.peft is not None:
        _check_peft(config.model.peft)


def _check_peft(peft: PeftConfig) -> None:
    lora = peft.lora_tuning
    rules = {
        "peft_scheme": (peft.peft_scheme, peft.peft_scheme == "lora", "lora"),
        "lora_tuning.adapter_dim": (lora.adapter_dim, lora.adapter_dim > 0, "at least 1"),
        "lora_tuning.alpha": (
            lora.alpha,
            lora.alpha is None or 0 < lora.alpha < math.inf,
            "null, or a number above 0",
        ),
        "lora_tuning.adapter_dropout": (
            lora.adapter_dropout,
            0 <= lora.adapter_dropout < 1 and not (peft.merge and lora.adapter_dropout),
            "a number in [0, 1), and 0 with merge: true, where an adapter has no input of its own",
        ),
        "lora_tuning.target_modules": (
            lora.target_modules,
            len(lora.target_modules) > 0,
            "patterns of names, at least one",
        ),
    }
    for key, (value, is_right, rule) in rules.items():
        if not is_right:
            raise UserError(f"config: model.peft.{key}={value} must be {rule}.")


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
            where = " ".join(str(error).split())
            raise UserError(f"config file {path}: not valid YAML: {where}") from error
    for override in overrides:
        if "=" not in override:
            raise UserError(f"argument {override!r}: expected section.key=value.")
    try:
        layers.append(OmegaConf.from_dotlist(list(overrides)))
        for layer in layers:
            _check_keys(OmegaConf.to_container(layer, resolve=True), RunConfig, "")
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
