"""Measured training steps on several cards: vTrain (tp, dp, pp in one server) and MPT (sharded)."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.predictor.data import gpu, rows
from benchmarks.predictor.tables import Gpt, gpt_work
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.prediction import ParallelLayout
from suanli.base.work import Work
from suanli.cost.collective_time import Fabric, fabric_of


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One measured step of a layout.

    Attributes:
        work: Of one micro-batch.
        flops: Of the model per step, 6 per parameter and token and attention, for a constant MFU.
        autocast: Whether weights stay in fp32 (None as `predict_parallel` has it); Megatron's are
            narrow, and so are the gradients that its replicas exchange.
    """

    job: str
    group: str
    gpu: GpuSheet
    layout: ParallelLayout
    fabric: Fabric
    work: Work
    seconds: float
    flops: float
    dtype: str
    autocast: bool | None = None


@cache
def _work(sizes: Gpt, batch: int) -> Work:
    return gpt_work(sizes, batch)


@cache
def vtrain_steps() -> tuple[Spread, ...]:
    """Megatron-DeepSpeed GPTs of 1,024 tokens in fp16 on one server of eight A100 SXM4 40GB."""
    card = gpu("A100 SXM4 40GB")
    found = []
    for row in rows("vtrain_a100_single_node.csv"):
        whole, micro, wide, heads, layers, length = (
            int(row[c])
            for c in ("global batch", "micro batch", "hidden size", "attention heads", "# layers",
                      "sequence length")
        )  # fmt: skip
        tp, dp, pp = (int(row[f"{word} parallelism"]) for word in ("tensor", "data", "pipeline"))
        sizes = Gpt(layers=layers, wide=wide, heads=heads, length=length, words=51200,
                    fused_attention=False, dropout=True)  # fmt: skip
        work = _work(sizes, micro)
        layout = ParallelLayout(dp=dp, tp=tp, pp=pp, micro_batches=max(1, whole // (micro * dp)))
        found.append(
            Spread(
                job=f"h{wide} L{layers} b{whole}/{micro} tp{tp} dp{dp} pp{pp}",
                group=f"tp{tp} dp{dp} pp{pp}",
                gpu=card,
                layout=layout,
                fabric=fabric_of(card),
                work=work,
                seconds=float(row["iteration time (ms)"]) * 1e-3,
                flops=_model_flops(sizes, whole),
                dtype="fp16",
                autocast=False,
            )
        )
    return tuple(found)


# llm-foundry's MPT sizes: layers, width, heads (scripts/train/yamls/pretrain).
_MPT = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "760m": (24, 1536, 12),
    "1b": (24, 2048, 16),
    "3b": (32, 2560, 20),
    "7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "70b": (80, 8192, 64),
}
# GPU of the table -> card, and bytes per second of a server, as the tables' titles say.
_MPT_CARDS = {
    "a100_80gb": ("A100 SXM4 80GB", 1600e9 / 8),
    "a100_40gb": ("A100 SXM4 40GB", 1600e9 / 8),
    "h100_80gb": ("H100 SXM5 80GB", 3200e9 / 8),
}
# The same table's rows in bf16 on H100, scripts/train/benchmarking/README.md of llm-foundry
# (Apache-2.0).
_H100 = Path(__file__).with_name("llm_foundry_mpt_h100.csv")


@cache
def mpt_steps() -> tuple[Spread, ...]:
    """MPT with flash attention and FSDP on A100 SXM4, 8 to 128 cards, bf16."""
    return tuple(map(_mpt_step, rows("llm_foundry_mpt.csv")))


@cache
def h100_steps() -> tuple[Spread, ...]:
    """The same on H100 SXM5, 8 to 64 cards; nothing is fitted to them."""
    with _H100.open(encoding="utf-8", newline="") as file:
        return tuple(map(_mpt_step, csv.DictReader(file)))


def _mpt_step(row: dict[str, str]) -> Spread:
    layers, wide, heads = _MPT[row["Model"]]
    name, network = _MPT_CARDS[row["GPU"]]
    card = gpu(name)
    devices, micro, length = (
        int(row["# GPUs"]),
        int(row["MicroBatchSize"]),
        int(row["SeqLen (T)"]),
    )
    sizes = Gpt(layers=layers, wide=wide, heads=heads, length=length, words=50368)
    tokens = int(row["GlobalBatchSize (T)"])
    layout = ParallelLayout(
        dp=devices,
        micro_batches=int(row["GradAccum"]),
        sharded=True,
        recompute=row["Activation Checkpointing"] == "True",
    )
    return Spread(
        job=f"{row['Model']} {length}x{micro} {devices} {row['GPU']}",
        group=f"{devices} x {row['GPU']}",
        gpu=card,
        layout=layout,
        fabric=fabric_of(card, network_bytes_per_s=network),
        work=_work(sizes, micro),
        seconds=tokens / (float(row["Throughput (T/s/GPU)"]) * devices),
        flops=_model_flops(sizes, tokens // length),
        dtype="bf16",
    )


# What is left out -> whether a row is.
MPT_SPLITS: dict[str, Callable[[Spread], bool]] = {
    "16-128 cards, from 8": lambda r: r.layout.devices > 8,
    "8 cards, from 16-128": lambda r: r.layout.devices == 8,
    "A100 40GB, from 80GB": lambda r: "40GB" in r.gpu.name,
    "A100 80GB, from 40GB": lambda r: "80GB" in r.gpu.name,
}


def _model_flops(g: Gpt, samples: int) -> float:
    """6 per parameter and token, 12 * layers * width * length per token for attention."""
    parameters = 12 * g.layers * g.wide**2 + g.words * g.wide
    return samples * g.length * (6.0 * parameters + 12.0 * g.layers * g.wide * g.length)
