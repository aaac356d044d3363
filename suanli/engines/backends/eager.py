"""torch as it is, operator by operator; on a GPU also recorded into CUDA graphs.

Options:
    source: Run the user's own module instead of the exported one: what a person has today.
    autocast: Weights stay fp32 and torch casts before each matrix product.
    cuda_graph: Record the operators once per batch size and replay them without the launches.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch

from suanli.base.errors import SuanliError
from suanli.base.plan import BackendSpec, Plan
from suanli.engines.backend import BuildNote, Runner
from suanli.engines.backends._torch import (
    FlatCall,
    Prepared,
    need_offered,
    prepared_graph,
    prepared_source,
    source_baseline,
)
from suanli.engines.program import Program

_GRAPHS = 8  # recorded batch sizes that are kept; each holds its own buffers
_WARM_UP_CALLS = (
    3  # torch's documentation asks for a few, so that libraries choose before recording
)


class EagerBackend:
    """Keeps nothing but the program: a build writes no file."""

    spec = BackendSpec(
        name="eager",
        install="pip install torch",
        packages=("torch",),
        devices=("cpu", "cuda"),
        precisions={"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16", "fp16")},
        layouts=("contiguous", "channels_last"),
        options={"cuda_graph": (True, False)},
        option_needs={"cuda_graph": ("cuda",)},
        build_s=1.0,
        promise={
            "fp32": 0.95,
            "bf16": 0.4,
            "cuda/fp32": 0.9,
            "cuda/tf32": 0.6,
            "cuda/bf16": 0.4,
            "cuda/fp16": 0.4,
        },
        needs_export=False,
        baselines=(
            source_baseline("eager", "fp32"),
            source_baseline("eager", "bf16"),
            source_baseline("eager", "bf16", autocast=True),
            source_baseline("eager", "fp32", "cuda"),
            source_baseline("eager", "tf32", "cuda"),
            source_baseline("eager", "bf16", "cuda"),
            source_baseline("eager", "fp16", "cuda"),
            source_baseline("eager", "bf16", "cuda", autocast=True),
        ),
    )

    def build(
        self,
        program: Program,
        plan: Plan,
        folder: Path,
        calibration: Sequence[tuple[torch.Tensor, ...]] | None = None,
    ) -> BuildNote:
        """Make sure that the plan can be computed, see `suanli.engines.backend.Backend`.

        Where the model cannot be recorded as a CUDA graph, the plan that comes back goes without.
        """
        need_offered(self.spec, plan, also=("fp16",))
        ready = _prepared(program, plan)
        if not _records(plan):
            return BuildNote(plan=plan)
        runner = ready.runner(program.signature, plan, CudaGraphs(ready.call))
        try:
            runner(program.inputs(program.meta.batch))
        except SuanliError as error:
            without = plan.with_(options={**plan.options, "cuda_graph": False})
            return BuildNote(plan=without, details={"cuda_graph": str(error)})
        return BuildNote(plan=plan)

    def load(self, program: Program, plan: Plan, folder: Path) -> Runner:
        """Prepare the module anew, see `suanli.engines.backend.Backend`."""
        need_offered(self.spec, plan, also=("fp16",))
        ready = _prepared(program, plan)
        if _records(plan):
            return ready.runner(program.signature, plan, CudaGraphs(ready.call))
        return ready.runner(program.signature, plan)


class CudaGraphs:
    """A flat call recorded per set of shapes, and replayed on buffers of its own."""

    def __init__(self, call: FlatCall) -> None:
        self._call = call
        self._recorded: OrderedDict[tuple[torch.Size, ...], _Recording] = OrderedDict()

    def __call__(self, *flat: torch.Tensor) -> list[torch.Tensor]:
        """Replay; gives outputs in memory of their own, because the next replay overwrites."""
        shapes = tuple(tensor.shape for tensor in flat)
        recording = self._recorded.get(shapes)
        if recording is None:
            while len(self._recorded) >= _GRAPHS:
                self._recorded.popitem(last=False)
            recording = self._recorded[shapes] = _Recording(self._call, flat)
        self._recorded.move_to_end(shapes)
        return recording.replay(flat)


class _Recording:
    def __init__(self, call: FlatCall, flat: Sequence[torch.Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in flat]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_CALLS):
                call(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph):
                self._outputs = list(call(*self._inputs))
        except RuntimeError as error:
            line = str(error).strip().splitlines()[0]
            raise SuanliError(
                f"cannot be recorded as a CUDA graph: {line}", next_step="leave out cuda_graph"
            ) from error

    def replay(self, flat: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        for mine, given in zip(self._inputs, flat, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return [output.clone() for output in self._outputs]


def _records(plan: Plan) -> bool:
    """Whether CUDA graphs are used: by default in what is searched, never in what a person has."""
    default = not plan.options.get("source")
    return plan.device.startswith("cuda") and bool(plan.options.get("cuda_graph", default))


def _prepared(program: Program, plan: Plan) -> Prepared:
    if plan.options.get("source"):
        return prepared_source(program, plan)
    return prepared_graph(program, plan)[1]


BACKEND = EagerBackend()
