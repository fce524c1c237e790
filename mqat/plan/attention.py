"""Which models Transformer Engine's attention computes."""

from mqat.config import ModelConfig
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig


def check_attention(settings: ModelConfig, model: DecoderConfig) -> None:
    """Refuses Transformer Engine where scores are capped."""
    cap = model.attention_softcap
    if settings.transformer_engine and cap is not None:
        raise UserError(
            f"model.transformer_engine=true: its attention does not cap scores at {cap:g}, as this "
            f"{model.family} model's are; set it to false."
        )
