"""Post-training quantization: calibrate, export for TensorRT-LLM, verify.

torchrun --nproc-per-node 8 examples/gpt_sft.py      # first: conf/ptq_tiny.yaml quantizes what it writes
torchrun --nproc-per-node 8 examples/gpt_ptq.py
torchrun --nproc-per-node 8 examples/gpt_ptq.py --config my.yaml model.optim.lr=1e-5
"""

from pathlib import Path

from mqat.cli import recipe_config
from mqat.runtime.groups import command_line


def main() -> None:
    """Runs `conf/ptq_tiny.yaml` unless told otherwise."""
    with command_line():
        config = recipe_config(Path(__file__).parent.parent / "conf" / "ptq_tiny.yaml", __doc__)
        from mqat.training.recipes import run_ptq

        run_ptq(config)


if __name__ == "__main__":
    main()
