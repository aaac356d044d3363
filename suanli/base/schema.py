"""Writes the JSON Schemas of the verbs from the records: `python -m suanli.base.schema`."""

import json
from pathlib import Path

from suanli.base import codec
from suanli.base.kernel_results import KernelCheckResult, KernelExplainResult, KernelTuneResult
from suanli.base.plan import Plan
from suanli.base.predict_results import CatalogueResult, ChooseResult, PredictResult
from suanli.base.profile_results import ProfileResult
from suanli.base.queue_results import QueueResult
from suanli.base.results import (
    DoctorResult,
    ErrorResult,
    ExportResult,
    OptimizeResult,
    ReportResult,
    RunResult,
    SchemaName,
    TrustResult,
    UiResult,
    WorkloadsResult,
)
from suanli.base.train_plan import TrainPlan
from suanli.base.train_results import TrainResult

FOLDER = Path(__file__).with_name("schemas")
VERSION = 1
RECORDS: dict[str, type] = {
    "choose": ChooseResult,
    "gpus": CatalogueResult,
    "doctor": DoctorResult,
    "error": ErrorResult,
    "kernel-check": KernelCheckResult,
    "kernel-explain": KernelExplainResult,
    "kernel-tune": KernelTuneResult,
    "export": ExportResult,
    "optimize": OptimizeResult,
    "plan": Plan,
    "predict": PredictResult,
    "profile": ProfileResult,
    "queue": QueueResult,
    "report": ReportResult,
    "run": RunResult,
    "train": TrainResult,
    "train-plan": TrainPlan,
    "trust": TrustResult,
    "ui": UiResult,
    "workloads": WorkloadsResult,
}


def name(verb: str) -> SchemaName:
    """The `schema` entry of a verb's result."""
    return SchemaName(name=f"suanli.{verb}", version=VERSION)


def text(verb: str) -> str:
    """The schema of a verb as it stands in its file."""
    body = codec.schema(RECORDS[verb])
    return json.dumps({"title": f"suanli {verb}", **body}, indent=1, sort_keys=True) + "\n"


def main() -> None:
    """Write all the files."""
    for verb in RECORDS:
        (FOLDER / f"{verb}.json").write_text(text(verb), encoding="utf-8")


if __name__ == "__main__":
    main()
