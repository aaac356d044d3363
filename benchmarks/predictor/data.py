"""The published measurements that the predictor is fitted to and judged by.

They are read where SUANLI_DATA points and never copied. Their origin: NeuSight (sitar-lab), vTrain
(VIA-Research), llm-foundry (mosaicml), pytorch-image-models (huggingface), Zeus (ml-energy), vidur
(microsoft), DeepLearningExamples (NVIDIA), pytorch-gpu-benchmark (ryujaehun).
"""

import csv
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from suanli.base.gpu_sheet import GpuSheet
from suanli.cost.work_kernels import KINDS, ROW_READS, Kernels
from suanli.devices.catalogue import catalogue

# Names in the data -> names in the catalogue.
GPUS = {
    "NVIDIA A100-PCIE-40GB": "A100 PCIe 40GB",
    "NVIDIA_A100-PCIE-40GB": "A100 PCIe 40GB",
    "NVIDIA A100 80GB PCIe": "A100 PCIe 80GB",
    "NVIDIA_A100_80GB_PCIe": "A100 PCIe 80GB",
    "NVIDIA_A100-SXM4-40GB": "A100 SXM4 40GB",
    "A100-SXM4-40GB": "A100 SXM4 40GB",
    "Tesla P100-PCIE-16GB": "Tesla P100 PCIe 16GB",
    "Tesla_P100-PCIE-16GB": "Tesla P100 PCIe 16GB",
    "Tesla T4": "Tesla T4",
    "Tesla_T4": "Tesla T4",
    "Tesla V100-PCIE-32GB": "Tesla V100 PCIe 32GB",
    "Tesla_V100-PCIE-32GB": "Tesla V100 PCIe 32GB",
    "rtx3090": "GeForce RTX 3090",
    "rtx4090": "GeForce RTX 4090",
    "GeForce RTX 2080 Ti": "GeForce RTX 2080 Ti",
    "TITAN RTX": "TITAN RTX",
    "TITAN Xp": "TITAN Xp",
}


def folder() -> Path:
    """Where the measurements lie; without them the program ends with one line."""
    found = Path(os.environ.get("SUANLI_DATA", "")) / "measured"
    if not (os.environ.get("SUANLI_DATA") and found.is_dir()):
        raise SystemExit("set SUANLI_DATA to the folder of the data, with measured/ in it")
    return found


@cache
def sheets() -> dict[str, GpuSheet]:
    """The catalogue by name."""
    return {sheet.name: sheet for sheet in catalogue()}


def gpu(name: str) -> GpuSheet:
    """The card that a data set calls by this name."""
    return sheets()[GPUS.get(name, name)]


def of_chip(card: GpuSheet, chip: str) -> bool:
    """Whether a card carries this chip: "A100" is that of all A100, "3090" that of RTX 3090."""
    return chip in card.name.split()


def rows(name: str) -> list[dict[str, str]]:
    """One file's rows."""
    with (folder() / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(line for line in file))


@dataclass(frozen=True, kw_only=True)
class OperatorSet:
    """Measured single operators of one kind on one card."""

    name: str
    gpu: GpuSheet
    dtype: str
    kernels: Kernels
    seconds: Any


def as_kernels(kind: str, **columns: Any) -> Kernels:
    """Columns of equal kernels; what is not given has the value that means none."""
    length = len(next(iter(columns.values())))
    plain = {
        "operator": np.arange(length, dtype=float),
        "kind": np.full(length, float(KINDS.index(kind))),  # type: ignore[arg-type]
        "moved": np.zeros(length),
        "vector": np.zeros(length),
        "share": np.zeros(length),
        "traffic": np.zeros(length),
        "starts": np.zeros(length),
        "batch": np.zeros(length),
        "m": np.ones(length),
        "n": np.ones(length),
        "k": np.ones(length),
        "row_bytes": np.zeros(length),
        "at_once": np.ones(length),
        "second_read": np.zeros(length),
        "repeat": np.ones(length),
    }
    plain.update({name: np.asarray(value, dtype=float) for name, value in columns.items()})
    return Kernels(columns=plain)


def products(batch: Any, m: Any, n: Any, k: Any, width: float) -> Kernels:
    """Products with operands and results of this many bytes an element."""
    moved = width * batch * (m * k + k * n + m * n)
    return as_kernels("product", batch=batch, m=m, n=n, k=k, moved=moved)


@cache
def neusight_operators() -> tuple[OperatorSet, ...]:
    """fp32 products, softmax and layer norm on five cards (floats are fp32, TF32 off).

    The tables' columns M, N, K are of [M, N] x [N, K], as torch's manual writes a product of
    batches: N is the sum. The times show it: on every card they go in whole tiles along M and K (on
    A100 an M or K of 64 takes as long as one of 128) and never along N, where they only have the
    start of a sum (64 reaches nine tenths of the rate of 256).
    """
    found = []
    for op in ("linear", "bmm", "softmax", "ln"):
        table = rows(f"neusight_{op}.csv")
        for device in sorted({row["Device"] for row in table}):
            mine = [row for row in table if row["Device"] == device]
            columns = {
                c: np.array([float(row[c]) for row in mine])
                for c in (("B", "M", "N", "K") if op in ("linear", "bmm") else ("B", "H"))
            }
            if op in ("linear", "bmm"):
                kernels = products(columns["B"], columns["M"], columns["K"], columns["N"], 4.0)
            else:
                rule = "softmax" if op == "softmax" else "norm"
                kernels = as_kernels(
                    "rows",
                    moved=8.0 * columns["B"] * columns["H"],
                    row_bytes=4.0 * columns["H"],
                    second_read=np.full(len(mine), ROW_READS[rule][0]),
                    at_once=np.full(len(mine), ROW_READS[rule][1]),
                )
            seconds = np.array([float(row["Latency"]) * 1e-3 for row in mine])
            found.append(
                OperatorSet(
                    name=op, gpu=gpu(device), dtype="fp32", kernels=kernels, seconds=seconds
                )
            )
    return tuple(found)


@cache
def vidur_operators() -> tuple[OperatorSet, ...]:
    """fp16 products and sweeps of Llama-2 layers on an A100 SXM4 80GB, by tokens and split."""
    found = []
    card = gpu("A100 SXM4 80GB")
    for model in ("Llama-2-7b", "Llama-2-70b"):
        table = rows(f"vidur_mlp__a100__{model}-hf.csv")
        tokens, tp, heads, kv, wide, inner = (
            np.array([float(row[c]) for row in table])
            for c in (
                "num_tokens",
                "num_tensor_parallel_workers",
                "n_head",
                "n_kv_head",
                "n_embd",
                "n_expanded_embd",
            )
        )
        one = np.ones(len(table))
        sizes = {
            "attn_pre_proj": (wide * (1 + 2 * kv / heads) / tp, wide),
            "attn_post_proj": (wide, wide / tp),
            "mlp_up_proj": (2 * inner / tp, wide),
            "mlp_down_proj": (wide, inner / tp),
        }
        for name, (n, k) in sizes.items():
            found.append(_vidur(card, table, name, products(one, tokens, n, k, 2.0)))
        add = as_kernels("pointwise", moved=2.0 * 3 * tokens * wide)
        found.append(_vidur(card, table, "add", add))
    return tuple(found)


def _vidur(card: GpuSheet, table: list[dict[str, str]], name: str, kernels: Kernels) -> OperatorSet:
    seconds = np.array([float(row[f"time_stats.{name}.median"] or "nan") * 1e-3 for row in table])
    keep = np.isfinite(seconds) & (seconds > 0)
    columns = {key: value[keep] for key, value in kernels.columns.items()}
    kernels = Kernels(columns=columns)
    return OperatorSet(name=name, gpu=card, dtype="fp16", kernels=kernels, seconds=seconds[keep])


@cache
def matmul_ceilings() -> tuple[OperatorSet, ...]:
    """Best measured products (ml-engineering, CC-BY-SA: read here, never stored)."""
    names = {
        "NVIDIA A100 SXM": "A100 SXM4 80GB",
        "NVIDIA GH200 SXM": "GH200 96GB",
        "NVIDIA A100 PCIe": "A100 PCIe 80GB",
        "NVIDIA H100 SXM": "H100 SXM5 80GB",
        "NVIDIA H200 SXM": "H200 SXM 141GB",
        "NVIDIA B200 SXM": "B200 SXM 180GB",
        "NVIDIA B300 SXM": "B300 SXM 288GB",
        "NVIDIA GB200 SXM": "GB200 186GB",
    }
    found = []
    for row in rows("matmul_achieved.csv"):
        card = names.get(row["accelerator"])
        if card not in sheets():
            continue
        m, n, k = (np.array([float(x)]) for x in row["best_shape_mnk"].split("x"))
        width = 2.0 if row["dtype"] == "bf16" else 1.0
        seconds = 2 * m * n * k / (float(row["mamf_tflops"]) * 1e12)
        kernels = products(np.ones(1), m, n, k, width)
        found.append(
            OperatorSet(
                name="ceiling",
                gpu=sheets()[card],
                dtype=row["dtype"],
                kernels=kernels,
                seconds=seconds,
            )
        )
    return tuple(found)
