"""The whole story: train or load, PTQ, QAT, and (where a server takes the form) export and verify.

torchrun --nproc-per-node 8 examples/gpt_qat.py
torchrun --nproc-per-node 8 examples/gpt_qat.py --config conf/qat_tiny.yaml
torchrun --nproc-per-node 8 examples/gpt_qat.py --config my.yaml model.optim.lr=1e-5
"""

from pathlib import Path

from mqat.cli import recipe_config
from mqat.runtime.groups import command_line


def main() -> None:
    """Runs `conf/qat_counting.yaml` unless told otherwise."""
    with command_line():
        config = recipe_config(Path(__file__).parent.parent / "conf" / "qat_counting.yaml", __doc__)
        from mqat.training.recipes import run_qat

        run_qat(config)


if __name__ == "__main__":
    main()
