"""From a finished run to its report."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from lora_runtime.train.fitting import Fitted
from lora_runtime.train.private.report import privacy_section
from lora_runtime.train.progress import EvalReport, TrainPlan
from lora_runtime.train.report.run import HistoryPoint, RunReport
from lora_runtime.train.settings import TrainSettings
from lora_runtime.train.task_base import TaskBase
from lora_runtime.train.tasks.api import TrainTask

_PACKAGES = ("multilora", "torch", "transformers", "peft")
_ELSEWHERE = frozenset({"base", "kind", "schema", "privacy"})  # said by the report's other parts, or of no interest


def run_report(
    settings: TrainSettings, task: TrainTask, base: TaskBase, plan: TrainPlan, fitted: Fitted, seconds: float
) -> RunReport:
    """`base.model` has the weights of the best pass."""
    points = {id(report): _point(report) for report in fitted.passes}
    predictions, labels = fitted.predictions
    rows = {"training": plan.num_train_rows, "validation": plan.num_valid_rows}
    if plan.num_truncated_rows:
        rows["longer than the maximum length"] = plan.num_truncated_rows
    if plan.num_skipped_rows:
        rows["left out"] = plan.num_skipped_rows
    return RunReport(
        title=settings.run.out.name,
        base=settings.base_name,
        task=str(task.kind).replace("_", " "),
        settings=_settings(settings, plan),
        rows=rows,
        history=tuple(points.values()),
        best=points[id(fitted.best)],
        selected_by=plan.selection,
        baseline=plan.baseline,
        baseline_of=plan.baseline_of,
        seconds=seconds,
        versions=_versions(),
        label_scores=task.label_scores(predictions, labels),
        confusion=task.confusion(predictions, labels),
        examples=() if fitted.privacy is not None else task.examples(base, predictions, labels),  # they are rows
        sections={} if fitted.privacy is None else {"Privacy": privacy_section(fitted.privacy)},
    )


def _point(report: EvalReport) -> HistoryPoint:
    return HistoryPoint(report.step, report.epoch, report.train_loss, report.valid_loss, report.metrics)


def _settings(settings: TrainSettings, plan: TrainPlan) -> Mapping[str, object]:
    """What was chosen, without the folders of this machine."""
    found: dict[str, object] = {}
    for name, value in settings.decisive().items():
        if name not in _ELSEWHERE and value not in ("None", "{}"):
            found[name] = Path(value).name if name in ("train", "valid") else value
    return {**found, "target_modules": ", ".join(plan.target_modules)}


def _versions() -> Mapping[str, str]:
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            versions[name] = "from its source"
    return versions
