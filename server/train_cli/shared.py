"""The options that every task of `multilora train` has, said once; `trains` adds them to a task's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from lora_runtime.train.settings import (
    BaseBits,
    DataFiles,
    DeviceChoice,
    Init,
    LoraChoices,
    Optimisation,
    Optimizer,
    Precision,
    RunSettings,
    Schedule,
    TrainSettings,
)
from lora_runtime.train.tasks.options import TaskOptions
from server.train_cli.publishing import publish_hints, publish_options
from server.train_cli.running import TrainCommand, run_command
from server.train_cli.searching import search_options

Made = TypeVar("Made")

DATA, LORA, TRAINING, OUTPUT = "Data", "LoRA", "Training", "Output"


def _data(text: str, *flags: str) -> Any:
    return typer.Option(*flags, help=text, rich_help_panel=DATA)


def _lora(text: str, *flags: str) -> Any:
    return typer.Option(*flags, help=text, rich_help_panel=LORA)


def _training(text: str, *flags: str) -> Any:
    return typer.Option(*flags, help=text, rich_help_panel=TRAINING)


def _output(text: str, *flags: str) -> Any:
    return typer.Option(*flags, help=text, rich_help_panel=OUTPUT)


@dataclass(frozen=True, slots=True)
class Shared:
    """What the shared options say."""

    base: str
    data: DataFiles
    run: RunSettings
    lora: LoraChoices
    optim: Optimisation

    def settings(self, task: TaskOptions) -> TrainSettings:
        return TrainSettings(self.base, task, self.data, self.run, self.lora, self.optim)


def shared(
    base: Annotated[str, typer.Option(help="The base model: a folder, or a name on the hub.")],
    train: Annotated[Path, typer.Option(help="Training rows.")],
    out: Annotated[Path, typer.Option(help="The adapter folder to write.")],
    valid: Annotated[Path | None, typer.Option(help="Validation rows. Default: a part of the training rows.")] = None,
    valid_share: Annotated[float, _data("The part held out when --valid is not given.")] = 0.1,
    max_length: Annotated[int, _data("Tokens of a row, special ones included; longer ones are cut.")] = 128,
    rank: Annotated[int, _lora("Rank of every adapted site.")] = 16,
    alpha: Annotated[float | None, _lora("LoRA alpha; scaling is alpha / rank. Default: twice the rank.")] = None,
    dropout: Annotated[float, _lora("Dropout before A.")] = 0.05,
    target_modules: Annotated[
        str, _lora("Endings of module paths, comma-separated; auto: every attention and MLP linear.")
    ] = "auto",
    rslora: Annotated[bool, _lora("Scaling alpha / sqrt(rank).", "--rslora")] = False,
    dora: Annotated[bool, _lora("Train a magnitude for each row as well (DoRA).", "--dora")] = False,
    init: Annotated[
        Init, _lora("How A and B begin; pissa and olora are written as plain LoRA of twice the rank.")
    ] = Init.DEFAULT,
    learning_rate: Annotated[float, _training("Peak learning rate.")] = 1e-3,
    scheduler: Annotated[Schedule, _training("The learning rate after the warm-up.")] = Schedule.LINEAR,
    warmup_ratio: Annotated[float, _training("The part of all steps that warms up.")] = 0.1,
    optimizer: Annotated[Optimizer, _training("What updates the parameters.")] = Optimizer.ADAMW,
    loraplus_ratio: Annotated[
        float | None, _training("Learning rate of B over that of A (LoRA+). Default: the same.")
    ] = None,
    weight_decay: Annotated[float, _training("Weight decay.")] = 0.01,
    loss: Annotated[
        str, _training("cross-entropy, focal, label-smoothing, weighted, or module:function of your own.")
    ] = "cross-entropy",
    epochs: Annotated[int, _training("Passes over the training rows.")] = 10,
    batch_size: Annotated[int, _training("Rows of a forward pass, in each process.")] = 16,
    gradient_accumulation: Annotated[int, _training("Forward passes of a step.")] = 1,
    gradient_checkpointing: Annotated[
        bool, _training("Compute activations twice instead of keeping them.", "--gradient-checkpointing")
    ] = False,
    precision: Annotated[Precision, _training("Of the frozen weights and of products.")] = Precision.FP32,
    quantize: Annotated[BaseBits, _training("Keep the base in fewer bits (QLoRA; needs CUDA).")] = BaseBits.NONE,
    eval_steps: Annotated[int | None, _training("Steps between validation passes. Default: an epoch.")] = None,
    patience: Annotated[
        int | None, _training("Validation passes without a better one until it stops. Default: never.")
    ] = None,
    device: Annotated[DeviceChoice, _training("Where to train.")] = DeviceChoice.AUTO,
    seed: Annotated[int, _training("Of the split, the head, A, the order and dropout.")] = 0,
    threads: Annotated[int | None, _training("CPU threads. Default: as many as torch takes.")] = None,
    overwrite: Annotated[bool, _output("Replace an adapter that is in the folder.", "--overwrite")] = False,
    resume: Annotated[bool, _output("Go on with the interrupted run of this folder.", "--resume")] = False,
    report: Annotated[bool, _output("Write report.md and report.png beside the adapter.")] = True,
    tensorboard: Annotated[Path | None, _output("Folder for TensorBoard's files.")] = None,
) -> Shared:
    """From the values of the options; raises InvalidRequest."""
    targets = tuple(name.strip() for name in target_modules.split(",") if name.strip())
    return Shared(
        base,
        DataFiles(train, valid, valid_share, max_length),
        RunSettings(out, seed, threads, overwrite, resume, tensorboard=tensorboard, report=report),
        LoraChoices(rank, alpha, dropout, None if targets == ("auto",) else targets, rslora, dora, init),
        Optimisation(
            learning_rate=learning_rate,
            schedule=scheduler,
            warmup_ratio=warmup_ratio,
            optimizer=optimizer,
            loraplus_ratio=loraplus_ratio,
            weight_decay=weight_decay,
            epochs=epochs,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            gradient_checkpointing=gradient_checkpointing,
            precision=precision,
            quantize=quantize,
            patience=patience,
            eval_steps=eval_steps,
            loss=loss,
            device=device,
        ),
    )


def trains(
    app: typer.Typer, name: str, *, without: tuple[str, ...] = (), **defaults: Any
) -> Callable[[Callable[..., TaskOptions]], None]:
    """Make a command of a function from a task's own options to `TaskOptions`; `defaults` are of shared options."""

    def decorate(own: Callable[..., TaskOptions]) -> None:
        common = {key: value for key, value in inspect.signature(shared).parameters.items() if key not in without}
        later = {**inspect.signature(search_options).parameters, **inspect.signature(publish_options).parameters}
        hints = publish_hints()
        for function in (shared, search_options, own):
            hints |= get_type_hints(function, include_extras=True)

        def command(**values: Any) -> None:
            def made() -> TrainCommand:
                settings = _call(shared, values).settings(_call(own, values))
                return TrainCommand(settings, _call(search_options, values), _call(publish_options, values))

            run_command(made)

        changed = (value.replace(default=defaults.get(key, value.default)) for key, value in common.items())
        ordered = _in_panels((*changed, *inspect.signature(own).parameters.values()))
        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[parameter.name])
            for parameter in (*ordered, *later.values())
        ]
        command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess] - PEP 362
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__doc__ = own.__doc__
        app.command(name, no_args_is_help=True)(command)

    return decorate


def _call(function: Callable[..., Made], values: Mapping[str, Any]) -> Made:
    """With those of the values that it takes."""
    return function(**{key: values[key] for key in inspect.signature(function).parameters if key in values})


def _in_panels(parameters: tuple[inspect.Parameter, ...]) -> list[inspect.Parameter]:
    """A task's own options are about its data: before the first of the shared ones that are not."""
    names = [parameter.name for parameter in parameters]
    num_shared, at = names.index("tensorboard") + 1, names.index("rank")
    return [*parameters[:at], *parameters[num_shared:], *parameters[at:num_shared]]
