"""The sizes of models whose weights are not on this machine, from a `config.json` alone."""

from dataclasses import dataclass, field
from pathlib import Path

from mqat.checkpoints.hf_config import decoder_config
from mqat.checkpoints.huggingface import read_json
from mqat.checkpoints.manifest import DESCRIPTION
from mqat.errors import UserError
from mqat.models.decoder import DecoderConfig
from mqat.plan.catalogue import known_model
from mqat.plan.origin import Origin, open_origin


@dataclass
class SizesOnly:
    """Opens models for `make_plan` as far as their sizes are known, and says where these are from.

    Attributes:
        config_json: Of the model that a run starts from, where its path leads nowhere.
        said: A line for each model whose weights were not looked at.
    """

    config_json: Path | None = None
    said: list[str] = field(default_factory=list)

    def __call__(self, path: Path, key: str) -> tuple[DecoderConfig, Origin]:
        """As `origin.open_origin`.

        Raises:
            UserError: Nothing is known of the model; says what to give.
        """
        given = self.config_json if key == "model.restore_from_path" else None
        if path.exists():
            if given is not None:
                raise UserError(
                    f"{key}={path}: is here and describes itself; leave out --model-config {given}."
                )
            if path.is_file() or (path / DESCRIPTION).exists():
                return open_origin(path, key)
        file = given or (path / "config.json" if path.is_dir() else known_model(path))
        if file is None:
            raise UserError(
                f"{key}={path}: is not here, and no recipe brings the sizes of a model of this name; "
                "give its config.json as --model-config."
            )
        if path.is_dir() and not file.is_file():
            return open_origin(path, key)
        said = read_json(file)
        # Weights that are dequantized, where that is built; their layout does not matter here.
        if isinstance(said, dict):
            said = {name: value for name, value in said.items() if name != "quantization_config"}
        self.said.append(f"weights and tokenizer of {path} (sizes: {file})")
        return decoder_config(said), path
