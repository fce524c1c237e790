"""Where a run's weights come from."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from mqat.checkpoints.manifest import DESCRIPTION, read_description
from mqat.checkpoints.random_weights import RandomWeights
from mqat.checkpoints.source import PretrainedSource, open_pretrained
from mqat.config import RunConfig
from mqat.data.packaged import smollm2_gguf
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig

# A path is the directory of an mqat checkpoint.
Origin = PretrainedSource | RandomWeights | Path
# Of a path, and the key that names it in errors: the model's sizes, and where its weights are.
Opener = Callable[[Path, str], tuple[DecoderConfig, Origin]]
PACKAGED = {"smollm2": "SmolLM2-135M-Instruct"}


def read_source(config: RunConfig, opener: Opener | None = None) -> tuple[DecoderConfig, Origin]:
    """The model that is trained; `opener`: as of `make_plan`."""
    settings = config.model
    given = {
        "model.restore_from_path": settings.restore_from_path,
        "model.packaged": settings.packaged,
        "model.architecture": settings.architecture,
    }
    named = [key for key, value in given.items() if value is not None]
    if len(named) != 1:
        raise UserError(
            f"config: exactly one of {', '.join(given)} must be set, found {named or 'none'}."
        )
    if settings.architecture is not None:
        sizes = settings.architecture
        if sizes.head_dim is None and (
            sizes.num_attention_heads < 1 or sizes.hidden_size % sizes.num_attention_heads
        ):
            raise UserError(
                f"model.architecture: hidden_size={sizes.hidden_size} is not a multiple of "
                f"num_attention_heads={sizes.num_attention_heads}; change one, or set head_dim."
            )
        head_dim = sizes.head_dim or sizes.hidden_size // sizes.num_attention_heads
        model = DecoderConfig(**asdict(sizes) | {"head_dim": head_dim})
        return model, RandomWeights(model, config.trainer.seed)
    if settings.packaged is not None and opener is not None:
        return opener(Path(PACKAGED[settings.packaged]), "model.packaged")
    path = smollm2_gguf() if settings.packaged else Path(str(settings.restore_from_path))
    return (opener or open_origin)(path, "model.restore_from_path")


def open_origin(path: Path, key: str) -> tuple[DecoderConfig, Origin]:
    """A model in files; `key` names it in errors."""
    if (path / DESCRIPTION).exists():
        return DecoderConfig.from_dict(read_description(path)["model"]), path
    if not path.exists():
        raise UserError(
            f"{key}={path}: no such file or directory; give a Hugging Face directory, a .gguf file, a "
            "checkpoint of Megatron-LM or NeMo, or one of mqat (conf/ptq_tiny.yaml continues from what "
            "examples/gpt_sft.py writes)."
        )
    source = open_pretrained(path)
    _ = source.tokenizer_source  # refused here where there is none
    return source.config, source
