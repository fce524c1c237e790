"""The section `exp_manager`: what is logged, kept and stopped; names are NeMo's where it has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class EarlyStoppingConfig:
    """A phase ends when its validation loss has stopped falling."""

    monitor: str = "val_loss"  # what is watched
    mode: str = "min"  # less of it is better
    min_delta: float = 0.001  # nats a token: what counts as falling
    patience: int = 10  # validations without that


@dataclass
class CheckpointCallbackConfig:
    """Which validated states are kept besides the newest ones."""

    monitor: str = "val_loss"  # what is watched
    mode: str = "min"  # less of it is better
    save_top_k: int = 0  # those of lowest validation loss; a phase then ends with the best one


@dataclass
class WandbConfig:
    """Of Weights & Biases."""

    project: str | None = None  # null: that of its settings
    name: str | None = None  # null: that of the run directory
    entity: str | None = None  # user or team; null: that of its settings
    group: str | None = None  # runs that belong together
    tags: list[str] = field(default_factory=list)  # words to find the run by
    offline: bool = False  # written below the run directory, to be sent by `wandb sync`


@dataclass
class MlflowConfig:
    """Of MLflow."""

    experiment_name: str = "mqat"  # made if there is none
    tracking_uri: str | None = (
        None  # null: MLFLOW_TRACKING_URI, else mlflow.db in the run directory
    )
    run_name: str | None = None  # null: that of the run directory
    tags: dict[str, str] = field(default_factory=dict)  # to find the run by


@dataclass
class ProfileConfig:
    """A window of steps under torch's profiler, in every training phase."""

    start_step: int = 0  # the first step of the window, counted from 1; 0: none
    end_step: int = 0  # the last
    ranks: list[int] = field(default_factory=lambda: [0])  # whose steps
    with_stack: bool = False  # lines of Python, too
    profile_memory: bool = False  # what allocates it, too


@dataclass
class ExperimentConfig:
    """The run directory and what is written to it."""

    exp_dir: str = "runs/qat"  # the run directory
    # Of an earlier run in exp_dir: go on with it (true), put it aside (false), or (null) go on if it did
    # not come to its end and had the same settings.
    resume_if_exists: bool | None = None
    # Keys that a resumed run has other values for than before: files that have moved
    # (with the same content), more steps, another learning rate.
    resume_changes: list[str] = field(default_factory=list)
    checkpoint_interval: int = 0  # steps between checkpoints; 0: by time alone
    checkpoint_minutes: float = 15.0  # between checkpoints, at most; 0: by steps alone
    keep_last: int = 2  # checkpoints of a phase; older ones are deleted; 0: all are kept
    checkpoint_callback_params: CheckpointCallbackConfig = field(
        default_factory=CheckpointCallbackConfig
    )
    create_early_stopping_callback: bool = False  # a phase ends early
    early_stopping_callback_params: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    create_tensorboard_logger: bool = True  # events in <exp_dir>/tensorboard
    create_wandb_logger: bool = False  # extra: wandb
    wandb_logger_kwargs: WandbConfig = field(default_factory=WandbConfig)
    create_mlflow_logger: bool = False  # extra: mlflow
    mlflow_logger_kwargs: MlflowConfig = field(default_factory=MlflowConfig)
    histogram_every_n_steps: int = 0  # of gradients, by powers of two; 0: never
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    # Pages in <exp_dir>/quality of every quantized linear, after calibration and after QAT.
    quality_report: bool = False
    sample_prompts: list[str] = field(default_factory=list)  # each model continues them greedily
    sample_tokens: int = 24  # of a continuation

    @property
    def keeps_last_state(self) -> bool:
        """Whether a finished phase leaves its optimizer's state, to go on from with more steps."""
        return bool(self.resume_if_exists) or self.checkpoint_interval > 0


CHOICES: dict[str, tuple[str, ...]] = {
    "exp_manager.checkpoint_callback_params.monitor": ("val_loss",),
    "exp_manager.checkpoint_callback_params.mode": ("min",),
    "exp_manager.early_stopping_callback_params.monitor": ("val_loss",),
    "exp_manager.early_stopping_callback_params.mode": ("min",),
}

MINIMUM = {
    "exp_manager.checkpoint_interval": 0,
    "exp_manager.checkpoint_minutes": 0,
    "exp_manager.keep_last": 0,
    "exp_manager.checkpoint_callback_params.save_top_k": 0,
    "exp_manager.early_stopping_callback_params.min_delta": 0,
    "exp_manager.early_stopping_callback_params.patience": 1,
    "exp_manager.histogram_every_n_steps": 0,
    "exp_manager.profile.start_step": 0,
    "exp_manager.profile.end_step": 0,
    "exp_manager.sample_tokens": 0,
}


def contradictions(
    manager: ExperimentConfig, *, max_steps: int, val_check_interval: int
) -> Iterator[str]:
    """What cannot be done as configured, each as the rest of a message after `config: `."""
    top_k = manager.checkpoint_callback_params.save_top_k
    for key, value in {
        "exp_manager.checkpoint_callback_params.save_top_k": top_k,
        "exp_manager.create_early_stopping_callback": manager.create_early_stopping_callback,
    }.items():
        if value and not 0 < val_check_interval <= max_steps:
            yield (
                f"{key}={value} goes by the losses of validations: trainer.val_check_interval="
                f"{val_check_interval} must be at least 1 and at most trainer.max_steps={max_steps}."
            )
    window = manager.profile
    if (window.start_step > 0) != (window.end_step > 0) or window.end_step < window.start_step:
        yield (
            f"exp_manager.profile.start_step={window.start_step} and end_step={window.end_step}: the "
            "first and the last step of a window, counted from 1; both 0: none."
        )
    if window.start_step > max_steps:
        yield (
            f"exp_manager.profile.start_step={window.start_step} is never reached: "
            f"trainer.max_steps={max_steps}."
        )
