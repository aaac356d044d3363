"""A job as a line for a cluster's own scheduler: Suanli does not grow one."""

import shlex
from pathlib import Path

from suanli.base.errors import BadInputError
from suanli.base.queue_results import Job, Need
from suanli.jobs import command as commands

SCHEDULERS = ("slurm", "kubernetes")
_GRACE_S = 60  # between SIGTERM and the end; a run saves within half of it
_ROOM = 1.25  # on top of what a job is expected to need
_TIME_ROOM = 2.0
_IMAGE = "IMAGE"  # the person's own, with suanli in it


def line_for(scheduler: str, job: Job) -> str:
    """What to type, or to give to `kubectl`, so that a cluster runs the job and resumes it.

    Args:
        scheduler: One of `SCHEDULERS`.
        job: With its needs; a GPU is asked for unless the CPU was.

    Raises:
        BadInputError: There is no such scheduler.
    """
    if scheduler not in SCHEDULERS:
        raise BadInputError(
            f"unknown scheduler {scheduler!r}", next_step=f"one of {', '.join(SCHEDULERS)}"
        )
    return _slurm(job) if scheduler == "slurm" else _kubernetes(job)


def _shell(job: Job) -> str:
    """The command for `sh`, which resumes a run that was begun."""
    line = shlex.join(("suanli", *job.command))
    if not job.out:
        return line
    begun = shlex.quote(str(Path(job.out) / "run.json"))
    return f"{line} $(test -f {begun} && echo --resume)"


def _name(job: Job) -> str:
    """Letters, digits and hyphens, as Kubernetes wants names (RFC 1123)."""
    words = commands.out_of(job.command) or job.words
    text = "".join(c if c.isascii() and c.isalnum() else "-" for c in words)
    return f"suanli-{text.strip('-').lower()[:40]}".strip("-")


def _need(job: Job) -> Need:
    known = [need for need in job.needs if need.memory_bytes or need.seconds]
    gpu = [need for need in known if need.device.startswith("cuda")]
    return (gpu or known or [Need(device="cpu")])[0]


def _gpus(job: Job) -> int:
    return 0 if job.wanted == "cpu" else 1


def _megabytes(job: Job) -> int | None:
    """Of the host's memory, which is not what a job needs of a GPU's."""
    known = [n.memory_bytes for n in job.needs if n.source == "given" or n.device == "cpu"]
    memory = next((bytes_ for bytes_ in known if bytes_ is not None), None)
    return None if memory is None else max(1, int(_ROOM * memory / 2**20))


def _slurm(job: Job) -> str:
    need, parts = (
        _need(job),
        ["sbatch", f"--job-name={_name(job)}", "--requeue", "--open-mode=append"],
    )
    parts.append(f"--signal=B:TERM@{_GRACE_S}")
    if _gpus(job):
        parts.append(f"--gres=gpu:{_gpus(job)}")
    megabytes = _megabytes(job)
    if megabytes is not None:
        parts.append(f"--mem={megabytes}M")
    if need.seconds is not None:
        parts.append(f"--time={max(1, round(_TIME_ROOM * need.seconds / 60) + 1)}")
    # exec: the signal goes to the command itself
    return " ".join([*parts, f"--wrap={shlex.quote('exec ' + _shell(job))}"])


def _kubernetes(job: Job) -> str:
    limits = []
    megabytes = _megabytes(job)
    if megabytes is not None:
        limits.append(f"memory: {megabytes}Mi")
    if _gpus(job):
        limits.append(f"nvidia.com/gpu: {_gpus(job)}")
    lines = [
        "apiVersion: batch/v1",
        "kind: Job",
        f"metadata: {{name: {_name(job)}}}",
        "spec:",
        "  backoffLimit: 3",
        "  template:",
        "    spec:",
        "      restartPolicy: OnFailure",
        f"      terminationGracePeriodSeconds: {_GRACE_S}",
        "      containers:",
        "        - name: suanli",
        f"          image: {_IMAGE}",
        f"          command: [sh, -c, {_quoted('exec ' + _shell(job))}]",
    ]
    if limits:
        lines.append(f"          resources: {{limits: {{{', '.join(limits)}}}}}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """A text in YAML's single quotes."""
    return "'" + text.replace("'", "''") + "'"
