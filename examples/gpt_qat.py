"""The whole story: train or load, PTQ, QAT, export for TensorRT-LLM, verify.

torchrun --nproc-per-node 8 examples/gpt_qat.py
torchrun --nproc-per-node 8 examples/gpt_qat.py --config my.yaml model.optim.lr=1e-5
"""

from pathlib import Path

from mqat.cli import recipe_config
from mqat.runtime.groups import command_line


def main() -> None:
    """Runs `conf/qat_tiny.yaml` unless told otherwise."""
    with command_line():
        config = recipe_config(Path(__file__).parent.parent / "conf" / "qat_tiny.yaml", __doc__)
        from mqat.training.recipes import run_qat

        run_qat(config)


if __name__ == "__main__":
    main()
