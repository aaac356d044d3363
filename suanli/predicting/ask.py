"""What a person asks of `suanli predict`, checked."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from suanli.base import codec
from suanli.base.errors import BadInputError
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.plan import Plan
from suanli.base.prediction import ParallelLayout, PlanKind

DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8")
_TRAINED = ("fp32", "tf32", "bf16", "fp16")
_PART = re.compile(r"(dp|tp|pp|micro)=([0-9]{1,9})|(sharded|recompute)")
# Bytes per second, one direction, of all adapters of the servers that these cards come in: NVIDIA's
# datasheets of DGX B300 (8 x 800 Gb/s), H100, H200 and B200 (8 x 400 Gb/s), DGX A100 (8 x 200
# Gb/s), DGX-1 with V100 (4 x 100 Gb/s). For all others 100 Gb/s is assumed.
_SERVER_NETWORKS = {"10.3": 800e9, "10.0": 400e9, "9.0": 400e9, "8.0": 200e9, "7.0": 50e9}
_OTHER_NETWORK = 12.5e9
# What a server's network may be said to give, 1e9 bytes per second.
_SLOWEST, _FASTEST = 1e-3, 1e6


@dataclass(frozen=True, kw_only=True)
class Ask:
    """How the workload is to run.

    Attributes:
        training: A training step, or inference.
        batch: Samples in a step, over all devices; None takes a usual one.
        dtype: What products run in.
        plan: "eager", "compiled", or a plan's JSON file, whose precision then holds.
        devices: How many GPUs.
        layout: How they share the step, such as "dp=2,tp=4"; "" searches.
        optimizer: See `suanli.predicting.subject`.
        context: Earlier tokens per sample whose keys and values are kept.
        network_gb_per_s: 1e9 bytes per second of a server's network, one direction; None for the
            usual one of such servers.
    """

    training: bool = False
    batch: int | None = None
    dtype: str = "fp32"
    plan: str = "eager"
    devices: int = 1
    layout: str = ""
    optimizer: str = ""
    context: int = 0
    network_gb_per_s: float | None = None

    def checked(self) -> "Ask":
        """This, with the plan's precision where it is a file.

        Raises:
            BadInputError: Something makes no sense; the message names it.
        """
        asked = self
        for name in ("batch", "devices", "context"):
            value = getattr(self, name)
            if not (value is None and name == "batch") and type(value) is not int:
                raise BadInputError(f"{name} must be a whole number, not {value!r}")
        if self.plan not in ("eager", "compiled"):
            asked = replace(self, dtype=read_plan(self.plan).precision)
        if asked.dtype not in DTYPES:
            raise BadInputError(
                f"unknown dtype {asked.dtype!r}", next_step=f"one of {', '.join(DTYPES)}"
            )
        if asked.training and asked.dtype not in _TRAINED:
            raise BadInputError(f"training in {asked.dtype} is not predicted")
        for name, value, least in (
            ("--batch", asked.batch, 1),
            ("--gpus", asked.devices, 1),
            ("--context", asked.context, 0),
        ):
            if value is not None and not least <= value <= 2**20:
                raise BadInputError(f"{name} must be from {least} to {2**20}, not {value}")
        if asked.training and asked.context:
            raise BadInputError("--context is of inference: training keeps no earlier tokens")
        if asked.optimizer and not asked.training:
            raise BadInputError("--optimizer is of training: give --train")
        rate = asked.network_gb_per_s
        if rate is not None and not _SLOWEST <= rate <= _FASTEST:
            raise BadInputError(f"--network must be from {_SLOWEST:g} to {_FASTEST:g} GB/s")
        return asked

    @property
    def kind(self) -> PlanKind:
        """What the model of time needs to know of the plan."""
        if self.plan in ("eager", "compiled"):
            return "eager" if self.plan == "eager" else "compiled"
        return "eager" if read_plan(self.plan).backend == "eager" else "compiled"

    @property
    def channels_last(self) -> bool | None:
        """How images lie: as the plan's file says; None where there is none."""
        if self.plan in ("eager", "compiled"):
            return None
        return read_plan(self.plan).memory_layout == "channels_last"

    def plan_record(self, device: str) -> Plan:
        """The plan as it is reported."""
        if self.plan in ("eager", "compiled"):
            backend = "eager" if self.plan == "eager" else "inductor"
            return Plan(backend=backend, precision=self.dtype, device=device)  # type: ignore[arg-type]
        return read_plan(self.plan).with_(device=device)

    def network(self, sheet: GpuSheet) -> tuple[float, str]:
        """(bytes per second of a server, where the figure is from)."""
        if self.network_gb_per_s is not None:
            return self.network_gb_per_s * 1e9, f"network of {self.network_gb_per_s:g} GB/s, given"
        usual = _SERVER_NETWORKS.get(sheet.compute_capability)
        if usual is None or (sheet.nvlink_gpus or 0) < 8:
            usual = _OTHER_NETWORK
        return usual, f"network of {usual / 1e9:g} GB/s a server, assumed"


def read_plan(path: str) -> Plan:
    """A plan from its file.

    Raises:
        BadInputError: There is no such file, or it is no plan.
    """
    file = Path(path)
    if not file.is_file():
        raise BadInputError(
            f"--plan takes eager, compiled or a plan's file, not {path!r}",
            next_step="engines keep theirs in plan.json",
        )
    return codec.read(Plan, file)


def parse_layout(text: str) -> ParallelLayout:
    """A layout as it is typed: "dp=2,tp=4,pp=1,micro=8,sharded,recompute", each part optional.

    Raises:
        BadInputError: It is not of that form.
    """
    fields: dict[str, int | bool] = {}
    for part in text.replace(" ", "").split(","):
        found = _PART.fullmatch(part)
        if not found:
            raise BadInputError(
                f"no layout {part!r}", next_step="write dp=2,tp=4,pp=1,micro=8,sharded,recompute"
            )
        if found[3]:
            fields[found[3]] = True
        else:
            fields["micro_batches" if found[1] == "micro" else found[1]] = int(found[2])
    return ParallelLayout(**fields)  # type: ignore[arg-type]
