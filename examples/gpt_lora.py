"""LoRA and QLoRA: PTQ of a frozen model, adapters trained on it, export (also for peft), verify.

torchrun --nproc-per-node 2 examples/gpt_sft.py
torchrun --nproc-per-node 2 examples/gpt_lora.py
torchrun --nproc-per-node 2 examples/gpt_lora.py --config my.yaml model.peft.lora_tuning.adapter_dim=8
"""

from pathlib import Path

from mqat.cli import recipe_config
from mqat.runtime.groups import command_line


def main() -> None:
    """Runs `conf/lora_tiny.yaml` unless told otherwise."""
    with command_line():
        config = recipe_config(Path(__file__).parent.parent / "conf" / "lora_tiny.yaml", __doc__)
        from mqat.training.recipes import run_lora

        run_lora(config)


if __name__ == "__main__":
    main()
