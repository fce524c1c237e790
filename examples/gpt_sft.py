"""Supervised fine-tuning of an unquantized model: the step before quantization.

torchrun --nproc-per-node 8 examples/gpt_sft.py
torchrun --nproc-per-node 8 examples/gpt_sft.py --config my.yaml model.optim.lr=1e-5
"""

from pathlib import Path

from mqat.cli import recipe_config
from mqat.runtime.groups import command_line


def main() -> None:
    """Runs `conf/sft_tiny.yaml` unless told otherwise."""
    with command_line():
        config = recipe_config(Path(__file__).parent.parent / "conf" / "sft_tiny.yaml", __doc__)
        from mqat.training.recipes import run_sft

        run_sft(config)


if __name__ == "__main__":
    main()
