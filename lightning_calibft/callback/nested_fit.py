"""Run fits inside the user's fit without leaving a trace in it."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

from tqdm.auto import tqdm
from typing_extensions import override

from lightning_calibft.callback.lightning_package import (
    Callback,
    LightningCallback,
    LightningModule,
    Trainer,
    lightning_of,
)


def fit_nested(
    trainer: Any,
    module: LightningModule,
    loaders: Any,
    share: float,
    limits: dict[str, Any],
    accumulate_grad_batches: int,
    callbacks: list[Callback],
) -> None:
    """Fit with those settings of the user's Trainer that shape the training. Nothing is saved or logged.

    Args:
        trainer: The user's Trainer. Its training has ended.
        module: The module to train, a copy of the user's.
        loaders: The training data.
        share: The share of the user's training samples that ``loaders`` has.
        limits: The arguments ``max_epochs`` and ``max_steps`` of the Trainer.
        accumulate_grad_batches: The value at the start of the user's fit.
        callbacks: The callbacks of this fit.

    Raises:
        KeyboardInterrupt: If the fit was interrupted.
    """
    lightning, device, limit = lightning_of(trainer), trainer.strategy.root_device, trainer.limit_train_batches
    environments = import_module(f"{lightning.__name__}.plugins.environments")  # not imported by the package
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        nested = lightning.Trainer(
            # On SLURM, Lightning would resume from a file of the user's job and save this fit over it.
            default_root_dir=folder,
            plugins=[environments.LightningEnvironment()],
            **limits,
            accelerator={"cuda": "gpu"}.get(device.type, device.type),
            devices=[device.index or 0] if device.type == "cuda" else 1,
            precision=trainer.precision,
            accumulate_grad_batches=accumulate_grad_batches,
            gradient_clip_val=trainer.gradient_clip_val,
            gradient_clip_algorithm=trainer.gradient_clip_algorithm,
            limit_train_batches=max(1, round(limit * share)) if isinstance(limit, int) else limit,
            limit_val_batches=trainer.limit_val_batches if _watches_validation(trainer) else 0,
            check_val_every_n_epoch=trainer.check_val_every_n_epoch,
            callbacks=callbacks,
            logger=lightning.loggers.logger.DummyLogger(),  # for modules that use `self.logger`
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=0,
        )
        try:
            nested.fit(module, **_data(trainer, loaders))
        except SystemExit:
            if nested.interrupted:  # Lightning would exit the process, but the user's Trainer has to end first
                raise KeyboardInterrupt from None
            raise


def _data(trainer: Any, loaders: Any) -> dict[str, Any]:
    if trainer.datamodule is None:
        return {"train_dataloaders": loaders, "val_dataloaders": trainer.val_dataloaders}
    datamodule = copy.copy(trainer.datamodule)  # for its transfer hooks
    datamodule.train_dataloader = lambda: loaders
    for hook in ("prepare_data", "setup", "teardown"):  # it is set up already
        setattr(datamodule, hook, no_op)
    return {"datamodule": datamodule}


class Progress(LightningCallback):
    """Shows the progress of several fits in one bar.

    Args:
        bar: The bar, which counts training batches.
        remaining: Number of fits that remain, including this one.
    """

    def __init__(self, bar: tqdm[Any], remaining: int) -> None:
        self._bar = bar
        self._remaining = remaining

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = trainer.max_steps * trainer.accumulate_grad_batches
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            batches = int(trainer.max_epochs * trainer.num_training_batches)
        self._bar.total = self._bar.n + self._remaining * batches
        self._bar.refresh()

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self._bar.update()


def copy_of(module: LightningModule) -> LightningModule:
    """Copy a module without its Trainer.

    Raises:
        TypeError: If the module cannot be copied.
    """
    try:
        trainer = module.trainer
    except RuntimeError:  # it has no Trainer
        trainer = None
    module.trainer = None
    try:
        copied = copy.deepcopy(module)
        with suppress(ValueError):  # it is not compiled
            # The compiled steps of a copy would still run the original.
            lightning_of(module).utilities.compile.to_uncompiled(copied)
        return copied
    except Exception as error:  # its attributes can raise anything
        raise TypeError(
            f"Expected a module that `copy.deepcopy` can copy for the estimator 'pcv', which fine-tunes copies of it,"
            f" but {type(module).__name__} gives {error!r}. Choose another `estimator`."
        ) from error
    finally:
        module.trainer = trainer


def _watches_validation(trainer: Trainer) -> bool:
    return any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs)


def no_op(*_: Any, **__: Any) -> None:
    """Replace a hook that has already run."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning logs for each new Trainer, such as its devices."""
    # Once both packages are imported, each may log under the name of the other.
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
