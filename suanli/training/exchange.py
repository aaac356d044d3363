"""What the trials of one search share, as files: first weights, a few samples, traces."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from suanli.base import codec
from suanli.training.recipe import Recipe, Tensors
from suanli.training.verify import Trace
from suanli.workloads.record import Samples, TrainingSettings

_PROBE = 64  # samples that the evaluation mode is checked on


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What stands beside the tensors.

    Attributes:
        settings: Hyper-parameters of the run.
        seed: Of the run.
        check_steps: Steps that are held against the reference.
        total_steps: Steps of the run.
        trained: Names of the parameters that are trained.
        streamed: Whether the samples of the run are read from a data set.
        prune: Kind of pruning, or "": a recipe that is made anew from its reference has none.
    """

    settings: TrainingSettings
    seed: int
    check_steps: int
    total_steps: int
    trained: tuple[str, ...]
    streamed: bool = False
    prune: str = ""


class Exchange:
    """A folder with what trials need."""

    def __init__(self, folder: Path) -> None:
        """Open a folder that `write` made."""
        self.folder = folder

    @classmethod
    def write(
        cls, folder: Path, model: nn.Module, recipe: Recipe, train: Samples, facts: Facts
    ) -> "Exchange":
        """Write the start of a run.

        Args:
            folder: Made here.
            model: At its start, on the CPU.
            recipe: What is trained.
            train: All training samples; the first whole batches of them are kept.
            facts: What stands beside the tensors.

        Raises:
            OSError: The disk has no room.
        """
        folder.mkdir(parents=True, exist_ok=True)
        state = {n: t.detach().contiguous().clone() for n, t in model.state_dict().items()}
        save_file(state, folder / "start.safetensors")
        count = min(len(train), recipe.settings.batch * max(8, 2 * facts.check_steps))
        if count > recipe.settings.batch:
            count -= count % recipe.settings.batch  # whole batches, so that steps are alike
        kept = train.part(slice(0, count)).head(count)
        assert kept.labels is not None
        tensors = {f"input{i}": part for i, part in enumerate(kept.inputs)}
        tensors["labels"] = kept.labels
        samples = {n: t.contiguous().clone() for n, t in tensors.items()}
        save_file(samples, folder / "samples.safetensors")
        (folder / "facts.json").write_text(codec.dumps(facts), encoding="utf-8")
        return cls(folder)

    @property
    def facts(self) -> Facts:
        """What stands beside the tensors."""
        return codec.read(Facts, self.folder / "facts.json")

    def model(self, recipe: Recipe) -> nn.Module:
        """A fresh model at the run's start, on the CPU."""
        model = recipe.workload.make_model()
        model.load_state_dict(load_file(self.folder / "start.safetensors"))
        trained = set(self.facts.trained)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        return model

    def samples(self) -> Samples:
        """The kept training samples."""
        tensors = load_file(self.folder / "samples.safetensors")
        labels = tensors.pop("labels")
        inputs = tuple(tensors[f"input{i}"] for i in range(len(tensors)))
        return Samples(inputs=inputs, labels=labels)

    def probe(self) -> Tensors:
        """Inputs for the check in evaluation mode."""
        return tuple(part[-_PROBE:] for part in self.samples().inputs)

    def put_trace(self, name: str, trace: Trace, note: str = "") -> None:
        """Keep a trace; the order of its entries is kept too."""
        save_file(dict(trace), self.folder / f"{name}.safetensors")
        facts = {"order": list(trace), "note": note}
        (self.folder / f"{name}.json").write_text(json.dumps(facts), encoding="utf-8")

    def trace(self, name: str) -> Trace:
        """A trace that was kept; its tensors are read when they are looked at."""
        order = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))["order"]
        return _KeptTrace(self.folder / f"{name}.safetensors", order)

    def note(self, name: str) -> str:
        """What was noted with a trace."""
        data = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        return str(data["note"])

    def has(self, name: str) -> bool:
        """Whether a trace is there."""
        return (self.folder / f"{name}.json").exists()


class _KeptTrace(Mapping[str, torch.Tensor]):
    """A trace on disk: several of a large model would not fit into memory together."""

    def __init__(self, path: Path, order: list[str]) -> None:
        self._path, self._order = path, order

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
