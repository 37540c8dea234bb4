"""Check a Trainer for what the callbacks do not support, before training begins."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_calibft.callback.lightning_package import Callback, LightningModule, lightning_of
from lightning_calibft.callback.trainer_data import is_model_parallel
from lightning_calibft.checkpoint.state import is_folded
from lightning_calibft.head.find import HeadNotFoundError, find_head
from lightning_calibft.head.offset import attached_heads


def check_trainer(trainer: Any, model: LightningModule) -> None:
    """Refuse a Trainer or module that would lead to a wrong gamma or to none.

    Raises:
        TypeError: If the Trainer is not one of Lightning, or the module is not a LightningModule of the same package.
        RuntimeError: If the strategy shards the weights in a way that is not supported.
    """
    lightning = lightning_of(trainer)
    if not isinstance(model, lightning.LightningModule):
        raise TypeError(
            f"Expected a LightningModule of `{lightning.__name__}`, like the Trainer, but got a"
            f" {type(model).__module__}.{type(model).__name__}. Derive it from `{lightning.__name__}.LightningModule`:"
            " the classes of `lightning.pytorch` and those of `pytorch_lightning` do not mix."
        )
    strategies = lightning.strategies
    if isinstance(trainer.strategy, (strategies.DeepSpeedStrategy, strategies.FSDPStrategy)):
        raise RuntimeError(
            f"{type(trainer.strategy).__name__} is not supported: it flattens the weights. Use DDP, or shard the module"
            " with `torch.distributed.fsdp.fully_shard` in its `configure_model` and use ModelParallelStrategy. Or"
            " train without the callback and call `lightning_calibft.calibrate(model, loader)` on the consolidated"
            " model."
        )


def check_launcher(trainer: Any, model: LightningModule, head: str | None) -> None:
    """Refuse a module whose original, in the process that started this one, would not get gamma.

    Raises:
        RuntimeError: If the Trainer spawned or forked this process and the module has no calibration.
    """
    # Private in Lightning, which has no other way to ask whether the user's code runs in another process.
    launchers = lightning_of(trainer).strategies.launchers
    if not isinstance(trainer.strategy.launcher, launchers._MultiProcessingLauncher) or attached_heads(model):
        return
    with suppress(HeadNotFoundError):  # a head that is built later, in this process only, loses its weights anyway
        find_head(model, head)
        raise RuntimeError(
            "With a strategy that spawns or forks processes, the Trainer brings the trained weights back into the"
            " original module, which would silently lose gamma. Call `lightning_calibft.attach(model)` before"
            " `fit`, or use the strategy 'ddp'."
        )


def check_estimator_of_parts(trainer: Any, estimator: object) -> None:
    """Refuse an estimator that also runs the model with other weights, if the model is sharded over processes.

    Raises:
        ValueError: If the strategy is ``ModelParallelStrategy``.
    """
    if is_model_parallel(trainer):
        name = estimator if isinstance(estimator, str) else type(estimator).__name__
        raise ValueError(
            "Expected argument `estimator` to use the fine-tuned model alone with ModelParallelStrategy, but got"
            f" {name!r}, which also runs it with other weights. A sharded model can be neither copied nor changed."
            " Choose another estimator, such as 'alg', or calibrate the consolidated model after training."
        )


def check_sharded_checkpoints(trainer: Any, refresh_on_validation: bool) -> None:
    """Refuse sharded checkpoints that would have to be calibrated after they are written.

    Raises:
        ValueError: If the strategy is ``ModelParallelStrategy`` and no validation finds gamma before checkpoints are
            written.
    """
    if not is_model_parallel(trainer) or not trainer.checkpoint_callbacks:
        return
    if not refresh_on_validation or not trainer.enable_validation:
        got = "True without validation data" if refresh_on_validation else "False"
        raise ValueError(
            "Expected argument `refresh_on_validation` to be True with ModelParallelStrategy, so that checkpoints have"
            f" their gamma when they are written, but got {got}: sharded files cannot be calibrated later. Pass"
            " `refresh_on_validation=True` with validation data, or `source='training_steps'`; or"
            " `calibrate_checkpoints=False`, and call `trainer.save_checkpoint` after the fit."
        )


def check_not_folded(checkpoint: Mapping[str, Any]) -> None:
    """Refuse to resume from a checkpoint that is for inference only.

    Raises:
        ValueError: If gamma is folded into its bias.
    """
    if is_folded(checkpoint):
        raise ValueError(
            "Expected a checkpoint to resume from, but gamma is folded into the bias of this one: training it further"
            " would undo gamma, and calibrating it again would add it twice. Resume from the checkpoint that it was"
            " made from."
        )


def warn_of_uploads(trainer: Any) -> None:
    """Warn if a logger may upload checkpoints as soon as they are saved, when they have no gamma yet."""
    lightning = lightning_of(trainer)
    keeps_all = any(getattr(each, "save_top_k", None) == -1 for each in trainer.checkpoint_callbacks)

    def uploads(logger: Any) -> bool:
        hook = type(logger).after_save_checkpoint
        if hook is lightning.loggers.logger.Logger.after_save_checkpoint:
            return False
        if not hook.__module__.startswith(f"{lightning.__name__}."):
            return True  # a logger of the user may do so
        # Private in Lightning, whose loggers do not say otherwise when they upload.
        mode = getattr(logger, "_log_model", False)
        return mode == "all" or (mode is True and keeps_all)

    if trainer.checkpoint_callbacks and (names := [type(each).__name__ for each in trainer.loggers if uploads(each)]):
        rank_zero_warn(
            f"{' and '.join(names)} may upload checkpoints as soon as they are saved, when they have no gamma yet: only"
            " the files on the disk are calibrated, after the fit. Pass `refresh_on_validation=True` with validation"
            " data, or `source='training_steps'`, so that checkpoints have their gamma when they are saved."
        )


def order_callbacks(trainer: Any, callback: Callback, last: bool = False) -> None:
    """Move ``callback`` behind all others, but before those that save checkpoints, or behind those as well.

    The others run first because averaged weights must be in place. The list is replaced, not changed, because the
    Trainer is iterating over it.
    """
    checkpoint = lightning_of(trainer).callbacks.Checkpoint
    others = [other for other in trainer.callbacks if other is not callback]
    checkpoints = [other for other in others if isinstance(other, checkpoint)]
    others = [other for other in others if other not in checkpoints]
    trainer.callbacks = [*others, *checkpoints, callback] if last else [*others, callback, *checkpoints]


def finish_run(trainer: Any, model: LightningModule, callback: Callback, stage: str) -> None:
    """Do what the Trainer does after the ``teardown`` of ``callback``, which an error that is raised there would skip.

    The run has succeeded: loggers save and upload what they keep until then.
    """
    for other in trainer.callbacks[trainer.callbacks.index(callback) + 1 :]:
        other.teardown(trainer, model, stage=stage)
    model.teardown(stage=stage)
    for logger in trainer.loggers:
        logger.finalize("success")
