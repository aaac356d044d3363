"""Labelled samples: judging a finished plan by them, and steering what int8 puts back."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from suanli.base.signature import Signature
from suanli.base.trial import Quality
from suanli.engines.backend import Judge, Run
from suanli.engines.quantize import relative_error
from suanli.engines.verification import read_outputs, read_samples
from suanli.measure.quality import accuracy_ok, paired_quality, ranking_agreement_ok

_JUDGED_SAMPLES = 512  # of the search part: every variant of a graph is run on all of them
_CHUNK = 32
_STEER = 0.5  # of the budget: what int8 may cost on the search part before operators go back
_FAR = 0.3  # relative error that counts as half a harmed sample, see `label_judge`

Flags = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Labelled samples of one part, with eager fp32's outputs on them.

    Attributes:
        samples: File of the samples.
        reference: File of eager fp32's outputs on them.
        metric: "accuracy" or "ranking_agreement".
        classes: Names of the classes.
    """

    samples: Path
    reference: Path
    metric: str
    classes: tuple[str, ...] = ()

    def quality(self, outputs: Path, budget: float) -> Quality:
        """Judge a plan's outputs beside eager fp32's.

        Args:
            outputs: File that a host's `predict` wrote, of all samples or of the first ones.
            budget: Largest drop, as a fraction.
        """
        after = read_outputs(outputs)
        before = read_outputs(self.reference)[: len(after)]
        labels = read_samples(self.samples).labels
        labels = labels[: len(after)] if labels is not None else None
        was, now = _flags(self.metric, before.numpy(), after.numpy(), labels)
        if self.metric == "ranking_agreement":
            return paired_quality(was, now, budget=budget, metric=self.metric)
        assert labels is not None
        return paired_quality(
            was,
            now,
            budget=budget,
            labels=labels.numpy(),
            class_names=self.classes or None,
            metric=self.metric,
        )

    def as_json(self) -> dict[str, Any]:
        """For another process, see `from_json`."""
        paths = {"samples": str(self.samples), "reference": str(self.reference)}
        return {**paths, "metric": self.metric, "classes": list(self.classes)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """What `as_json` wrote."""
        return cls(
            samples=Path(data["samples"]),
            reference=Path(data["reference"]),
            metric=data["metric"],
            classes=tuple(data["classes"]),
        )


def label_judge(labelled: Labelled, signature: Signature, budget: float) -> Judge:
    """Steer int8 by labels: operators go back that cost right answers.

    The harm is the share of samples that were right in eager fp32 and are wrong now. While no
    answer changes it says nothing of which operator is to blame, so the relative error of the
    outputs counts beside it: half a sample where it is `_FAR`. The wish is half the budget, because
    the acceptance part holds the upper limit of the drop against the whole of it.

    Args:
        labelled: The search part; never the acceptance part.
        signature: The model's.
        budget: Largest drop, as a fraction.
    """
    samples = read_samples(labelled.samples)
    n = min(len(samples), _JUDGED_SAMPLES)
    labels = samples.labels[:n] if samples.labels is not None else None
    before = read_outputs(labelled.reference)[:n].numpy()
    inputs = [tensor[:n].numpy() for tensor in samples.inputs]

    def harm(run: Run) -> float:
        after = _outputs(run, inputs, signature)
        was, now = _flags(labelled.metric, before, after, labels)
        error = min(2.0, relative_error([after], [before]) / _FAR)
        return (float((was & ~now).sum()) + 0.5 * error) / n

    digest = hashlib.sha256(f"{labelled.metric} {budget} {n}".encode())
    for array in (*inputs, before, *([labels.numpy()] if labels is not None else [])):
        digest.update(np.ascontiguousarray(array).tobytes())
    allowed = int(_STEER * budget * n + 1e-9)
    return Judge(harm=harm, wish=(allowed + 0.5) / n, key=digest.hexdigest())


def _outputs(run: Run, inputs: Sequence[NDArray[Any]], signature: Signature) -> NDArray[Any]:
    """The first output on all samples, [n, ...]; the last batch is filled up where it must be."""
    n = len(inputs[0])
    size = min(_CHUNK, signature.max_batch) if signature.dynamic else signature.max_batch
    parts = []
    for start in range(0, n, size):
        batch = [array[start : start + size] for array in inputs]
        if not signature.dynamic:
            batch = [np.resize(part, (size, *part.shape[1:])) for part in batch]
        parts.append(run(batch)[0][: n - start])
    return np.concatenate(parts).astype(np.float32, copy=False)


def _flags(
    metric: str, before: NDArray[Any], after: NDArray[Any], labels: torch.Tensor | None
) -> tuple[Flags, Flags]:
    """Per sample, whether eager fp32 was right and whether the candidate is; [n] each."""
    if metric == "ranking_agreement":
        now = ranking_agreement_ok(after, before)
        return np.ones_like(now), now
    assert labels is not None
    classes = labels.numpy()
    return accuracy_ok(before, classes), accuracy_ok(after, classes)
