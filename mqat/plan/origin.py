"""Where a run's weights come from."""

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


def read_source(config: RunConfig) -> tuple[DecoderConfig, Origin]:
    """The model that is trained."""
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
    path = smollm2_gguf() if settings.packaged else Path(str(settings.restore_from_path))
    return open_origin(path, "model.restore_from_path")


def open_origin(path: Path, key: str) -> tuple[DecoderConfig, PretrainedSource | Path]:
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
