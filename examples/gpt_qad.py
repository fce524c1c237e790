"""QAT with the unquantized model as teacher (QAD): PTQ, distillation, export, verify.

torchrun --nproc-per-node 8 examples/gpt_qad.py
torchrun --nproc-per-node 8 examples/gpt_qad.py --config my.yaml model.optim.lr=1e-5
"""

from pathlib import Path

from mqat.cli import recipe_config
from mqat.runtime.groups import command_line


def main() -> None:
    """Runs `conf/qad_tiny.yaml` unless told otherwise."""
    with command_line():
        config = recipe_config(Path(__file__).parent.parent / "conf" / "qad_tiny.yaml", __doc__)
        from mqat.training.recipes import run_qat

        run_qat(config)


if __name__ == "__main__":
    main()
