"""What a run asks for that this machine cannot do; looked at before anything is started."""

from importlib.util import find_spec

import torch

from mqat.config import RunConfig
from mqat.errors import UserError
from mqat.plan.optimizer import check_optimizer


def check_run_options(config: RunConfig) -> None:
    """Refuses loggers without their packages, optimizers that cannot be sharded, and what needs CUDA.

    Raises:
        UserError: Names the key, what is missing and what to do.
    """
    manager, model = config.exp_manager, config.model
    check_optimizer(model.optim)
    wanted = {"wandb": manager.create_wandb_logger, "mlflow": manager.create_mlflow_logger}
    for package, is_wanted in wanted.items():
        if is_wanted and find_spec(package) is None:
            raise UserError(
                f"config: exp_manager.create_{package}_logger=true: the package {package!r} is not "
                f"installed; install it with pip install 'mqat[{package}]', or leave it out."
            )
    draws = manager.create_tensorboard_logger or manager.create_wandb_logger
    if manager.histogram_every_n_steps and not draws:
        raise UserError(
            f"config: exp_manager.histogram_every_n_steps={manager.histogram_every_n_steps}: only "
            "TensorBoard and Weights & Biases draw histograms; set "
            "exp_manager.create_tensorboard_logger=true, or leave it out."
        )
    if model.cpu_offloading and not torch.cuda.is_available():
        raise UserError(
            "config: model.cpu_offloading=true moves activations from a GPU to host memory, and there "
            "is no GPU here; leave it out, or save memory with "
            "model.activations_checkpoint_granularity=full."
        )
    if model.chunked_cross_entropy and model.megatron.get("cross_entropy_loss_fusion"):
        raise UserError(
            "config: model.chunked_cross_entropy=true and model.megatron.cross_entropy_loss_fusion=true "
            "are two ways to compute one loss; leave one of them out."
        )
