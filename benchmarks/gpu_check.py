"""Everything that needs a GPU, in the time of one command, the most important first.

    benchmarks/gpu_check.sh [--out DIR] [--seconds 540] [--parts kernels,doctor] [--resume DIR]

Parts that are not timed run side by side; timed ones run alone. A part has a limit of its own and
never more than what is left; what does not fit is "not begun". `gpu-check.json` in --out is written
anew after each part, `gpu-check.log` has all that the parts said, `kernels-<card>.json` the
benchmark of the kernels. --resume DIR goes on with a run whose files lie there: what is done is
kept, what was not begun comes first, what failed last. `--list` prints the parts.

This file needs the standard library only, because it says what is missing.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
# Finding what is missing, writing results and ending the last part take so much.
_MARGIN_S = 12.0
_SIDE_BY_SIDE = 8
_SAID = 4000
_LOG_BYTES = 12_000_000

_PROBE = """
import importlib.util, json, platform, sys
needed = "torch numpy safetensors psutil cryptography sklearn typer rich pydantic pytest".split()
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit("missing: " + ", ".join(missing) + " (benchmarks/gpu_wheels.sh fills gpu-wheels/)")
import torch
if not torch.cuda.is_available():
    sys.exit("torch sees no GPU here")
optional = "triton liger_kernel onnxruntime tensorrt torchao transformers xdist pytest_timeout"
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "device": torch.cuda.get_device_name(0),
    "present": [n for n in optional.split() if importlib.util.find_spec(n)],
}))
"""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One command.

    Attributes:
        name: By which it is asked for and kept.
        command: Its words; "{seconds}" becomes the whole seconds that it may take, "{out}" the
            folder of results.
        most_s: Its limit.
        least_s: It is not begun with less left.
        alone: Whether it is timed, so that nothing may run beside it.
        gives_json: Whether its output is one JSON object, which is kept as its result.
    """

    name: str
    command: tuple[str, ...]
    most_s: float
    least_s: float = 20.0
    alone: bool = True
    gives_json: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a part.

    Attributes:
        status: "done", "failed", "timeout" or "not begun".
        said: The end of its output, errors included.
        result: The JSON that it gave.
    """

    name: str
    status: str
    code: int | None = None
    seconds: float = 0.0
    said: str = ""
    result: Any = None


def _suanli(*words: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "suanli.cli", *words)


def _tests(
    name: str, file: str, *words: str, most_s: float, processes: int = 1, **changes: Any
) -> Part:
    spread = ("-n", str(processes)) if processes > 1 else ()
    plain = ("-q", "-m", "gpu", "-p", "no:cacheprovider")
    command = (PYTHON, "-m", "pytest", *plain, *spread, f"tests/{file}", *words)
    return Part(name=f"tests-{name}", command=command, most_s=most_s, **changes)


def _kernels(names: str, each: int) -> tuple[str, ...]:
    which = ("--kernels", names) if names else ()
    effort = ("--append", "--most", "12", "--shapes", "1", "--each", str(each))
    limits = ("--budget", "{seconds}", "--out", "{out}")
    return (PYTHON, "-m", "benchmarks.kernels", *which, *effort, *limits)


def _optimize(model: str, goal: str, batch: int) -> Part:
    words = (model, "--for", goal, "--batch", str(batch), "--budget", "70", "--json")
    return Part(
        name=f"optimize-{model}-b{batch}",
        command=_suanli("optimize", *words),
        most_s=130,
        least_s=90,
        gives_json=True,
    )


EXAMPLES = (
    *("vector_add", "reduction", "transpose:padded", "transpose:naive", "matmul", "convolution"),
    *("tensor_core_matmul", "softmax", "histogram", "stencil", "scan"),
)
# Those that a training step or a decoder spends its time in.
FIRST_KERNELS = "cross_entropy,linear_cross_entropy,norm,gate,batch_norm,adamw"


def parts(processes: int) -> list[Part]:
    """All of them, the most important first.

    Args:
        processes: Into how many a long test file is spread; 1 where pytest-xdist is absent.
    """
    checks = [
        Part(
            name=f"check-{name.replace(':', '-')}",
            command=_suanli("kernel", "check", _example(name), "--device", "cuda:0", "--json"),
            most_s=100,
            alone=False,
            gives_json=True,
        )
        for name in EXAMPLES
    ]
    return [
        _tests(
            *("triton", "test_triton_gpu.py", "-k", "not tune"),
            most_s=220,
            processes=processes,
            alone=False,
        ),
        _tests("driver", "test_kernel_driver.py", most_s=120, alone=False),
        *checks,
        Part(
            name="doctor",
            command=_suanli("doctor", "--json", "--refresh"),
            most_s=90,
            least_s=40,
            gives_json=True,
        ),
        Part(name="kernels", command=_kernels(FIRST_KERNELS, 45), most_s=260, least_s=60),
        _tests(
            *("backends", "test_backends_cuda.py"),
            most_s=200,
            processes=processes,
            least_s=40,
            alone=False,
        ),
        _tests("onnxruntime", "test_backends_onnxruntime.py", most_s=90, alone=False),
        _tests("profile", "test_profile_verb.py", most_s=90),
        _tests("ceilings", "test_ceilings.py", most_s=70, least_s=40),
        _tests("tune", "test_triton_gpu.py", "-k", "tune", most_s=120, least_s=40),
        Part(
            name="tune-matmul",
            command=_suanli("kernel", "tune", _example("matmul"), "--budget", "60", "--json"),
            most_s=150,
            least_s=60,
            gives_json=True,
        ),
        _optimize("resnet50", "latency", 1),
        Part(name="kernels-all", command=_kernels("", 60), most_s=1500, least_s=60),
        _optimize("resnet50", "throughput", 64),
        _optimize("bert-base", "latency", 1),
        _optimize("gpt2-small", "latency", 1),
    ]


def _example(name: str) -> str:
    file, _, kernel = name.partition(":")
    return f"examples/kernels/{file}.py" + (f":{kernel}" if kernel else "")


@dataclass(kw_only=True)
class Run:
    """One go at the parts, with its files.

    Attributes:
        out: Where the files lie.
        seconds: For all of it.
        environment: What the probe saw.
        outcomes: By name, those of an earlier run among them.
    """

    out: Path
    seconds: float
    environment: Any = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    _begin: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds that parts may still take."""
        return self.seconds - _MARGIN_S - (time.monotonic() - self._begin)

    def go(self, wanted: Iterable[Part]) -> None:
        """Run them, neighbours that need not be alone side by side."""
        for group in grouped(wanted):
            waiting, running = list(group), list[_Running]()
            while waiting or running:
                while waiting and len(running) < _SIDE_BY_SIDE:
                    part = waiting.pop(0)
                    limit = min(part.most_s, self.left())
                    if limit < part.least_s:
                        self._keep(Outcome(name=part.name, status="not begun"))
                        continue
                    running.append(_Running(part, limit, self.out))
                for one in [r for r in running if r.over()]:
                    running.remove(one)
                    self._keep(one.outcome())
                time.sleep(0.05)

    def _keep(self, outcome: Outcome) -> None:
        if outcome.status == "not begun" and outcome.name in self.outcomes:
            return  # what an earlier run gave stays
        self.outcomes[outcome.name] = outcome
        print(f"{outcome.status:9}  {outcome.seconds:6.1f} s  {outcome.name}", flush=True)
        if outcome.status in ("failed", "timeout"):
            print("    " + "\n    ".join(outcome.said.strip().splitlines()[-6:]), flush=True)
        self.write()

    def write(self) -> None:
        """The results so far, whole or not at all."""
        made = {
            "environment": self.environment,
            "parts": [asdict(outcome) for outcome in self.outcomes.values()],
        }
        temporary = self.out / ".gpu-check.json"
        temporary.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.out / "gpu-check.json")

    def resume(self, folder: Path) -> None:
        """Take over what an earlier run left in a folder."""
        for file in sorted(folder.glob("kernels-*.json")):
            if not (self.out / file.name).exists():
                shutil.copy(file, self.out / file.name)
        known = json.loads((folder / "gpu-check.json").read_text(encoding="utf-8"))
        for entry in known["parts"]:
            if entry["status"] != "not begun":
                self.outcomes[entry["name"]] = Outcome(**entry)


class _Running:
    """A part's process, which is ended with all that it started when its time is over."""

    def __init__(self, part: Part, limit: float, out: Path) -> None:
        self._part, self._out = part, out
        self._begin, self._limit = time.monotonic(), limit
        self._file = out / f".{part.name}.out"
        self._errors = out / f".{part.name}.err"
        # the command is told less than its limit, so that it can end by itself
        values = {"{seconds}": str(int(limit - 10)), "{out}": str(out)}
        words = [values.get(word, word) for word in part.command]
        with self._file.open("wb") as said, self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                words,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=errors,
                start_new_session=True,
            )
        self._late = False

    def over(self) -> bool:
        """Whether it has ended; one that is late is ended."""
        if self._process.poll() is not None:
            return True
        if time.monotonic() - self._begin > self._limit:
            self._late = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            return True
        return False

    def outcome(self) -> Outcome:
        """What became of it; its output goes into the log."""
        code = self._process.returncode
        printed = self._file.read_text(encoding="utf-8", errors="replace")
        errors = self._errors.read_text(encoding="utf-8", errors="replace")
        self._file.unlink()
        self._errors.unlink()
        log = self._out / "gpu-check.log"
        with log.open("a", encoding="utf-8") as file:
            if file.tell() < _LOG_BYTES:
                body = "" if self._part.gives_json else printed
                file.write(f"== {self._part.name} ==\n{body}\n{errors}\n"[-_LOG_BYTES // 8 :])
        result, status = None, "done" if code == 0 else "failed"
        if self._part.gives_json:
            try:
                result = json.loads(printed)
            except ValueError:
                status = "failed"
        said = errors if result is not None else printed + errors
        return Outcome(
            name=self._part.name,
            status="timeout" if self._late else status,
            code=code,
            seconds=round(time.monotonic() - self._begin, 1),
            said=said[-_SAID:],
            result=result,
        )


def grouped(wanted: Iterable[Part]) -> list[list[Part]]:
    """Neighbours that may run side by side together; timed ones by themselves."""
    groups: list[list[Part]] = []
    for part in wanted:
        if not part.alone and groups and not groups[-1][0].alone:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def in_turn(wanted: Sequence[Part], known: dict[str, Outcome]) -> list[Part]:
    """What is left to do: what was never begun, then what failed or was late."""
    fresh = [part for part in wanted if part.name not in known]
    again = [p for p in wanted if p.name in known and known[p.name].status != "done"]
    return [*fresh, *again]


def probe() -> Any:
    """What is here, as JSON.

    Raises:
        SystemExit: A package or the GPU is missing.
    """
    made = subprocess.run(
        [PYTHON, "-c", _PROBE], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if made.returncode:
        sys.exit((made.stderr.strip().splitlines() or ["the probe failed"])[-1])
    return json.loads(made.stdout)


def main(words: Sequence[str] | None = None, look: Callable[[], Any] = probe) -> int:
    """Run the parts; 0 where all that was begun is done."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    default = os.environ.get("OUT") or "benchmarks/results/gpu"
    parser.add_argument("--out", type=Path, default=Path(default), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=540.0, help="for all of it")
    parser.add_argument("--parts", default="", help="names, with commas between; all by default")
    parser.add_argument("--resume", type=Path, help="folder with the files of an earlier run")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    given = parser.parse_args(words)
    if given.list:
        for part in parts(1):
            print(f"{part.name:24} {part.most_s:5.0f} s  {' '.join(part.command[1:])}")
        return 0
    run = Run(out=given.out.resolve(), seconds=given.seconds)
    run.out.mkdir(parents=True, exist_ok=True)
    if given.resume:
        run.resume(given.resume)
    run.environment = look()
    print(json.dumps(run.environment))
    spread = 6 if "xdist" in run.environment.get("present", ()) else 1
    wanted = parts(spread)
    names = [name for name in given.parts.split(",") if name]
    unknown = set(names) - {part.name for part in wanted}
    if unknown:
        sys.exit(f"unknown parts {', '.join(sorted(unknown))}; --list names them")
    wanted = [part for part in wanted if not names or part.name in names]
    run.write()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    os.environ["PYTHONUNBUFFERED"] = "1"
    run.go(in_turn(wanted, run.outcomes))
    begun = [outcome.status for outcome in run.outcomes.values() if outcome.status != "not begun"]
    return 0 if all(status == "done" for status in begun) else 1


if __name__ == "__main__":
    raise SystemExit(main())
