"""`.qnemo`: a TensorRT-LLM directory with the tokenizer's description that NeMo looks for."""

from pathlib import Path

from mqat.errors import UserError

SENTENCEPIECE = "tokenizer.model"

# NeMo finds Hugging Face tokenizers (tokenizer_config.json) by itself; for those, this file would have
# to name a model of the hub or an absolute directory.
_SENTENCEPIECE_YAML = f"""\
library: sentencepiece
type: null
model: {SENTENCEPIECE}
vocab_file: null
merge_file: null
delimiter: null
use_fast: false
sentencepiece_legacy: true
"""


def tokenizer_texts(tokenizer: Path) -> dict[str, str]:
    """Extra files of a `.qnemo`, by name.

    Raises:
        UserError: The checkpoint has no tokenizer that NeMo could find.
    """
    if (tokenizer / SENTENCEPIECE).is_file():
        return {"tokenizer_config.yaml": _SENTENCEPIECE_YAML}
    if not (tokenizer / "tokenizer_config.json").is_file():
        raise UserError(
            f"{tokenizer}: a .qnemo needs the tokenizer, but neither tokenizer_config.json nor "
            f"{SENTENCEPIECE} is there; import the model with its tokenizer, or export a directory."
        )
    return {}
