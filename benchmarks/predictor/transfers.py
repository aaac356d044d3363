"""Measured all-reduces: NCCL tables of vTrain and of vidur."""

import csv
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from benchmarks.predictor.data import folder, gpu, rows
from suanli.base.gpu_sheet import GpuSheet
from suanli.cost.collective_time import Fabric, collective_s, fabric_of
from suanli.cost.parameters import Parameters


@dataclass(frozen=True, kw_only=True)
class Transfers:
    """One table: times of all-reduces of many sizes in one group of cards."""

    name: str
    gpu: GpuSheet
    devices: int
    fabric: Fabric
    n_bytes: Any
    seconds: Any


@cache
def all_reduces() -> tuple[Transfers, ...]:
    """In one server each: vTrain's four tables (1 MiB to 1 GiB), vidur's three (to 64 MiB)."""
    found = []
    for name, card, devices in (
        ("vtrain A100 x2", "A100 SXM4 40GB", 2),
        ("vtrain A100 x4", "A100 SXM4 40GB", 4),
        ("vtrain A100 x8", "A100 SXM4 40GB", 8),
        ("vtrain V100 x8", "Tesla V100 SXM2 16GB", 8),
    ):
        short = card[:4].lower().replace("tesl", "v100")
        with (folder() / f"vtrain_allreduce_{short}_{devices}gpu.csv").open(
            encoding="utf-8"
        ) as file:
            table = list(csv.reader(file))[1:]
        found.append(
            Transfers(
                name=name,
                gpu=gpu(card),
                devices=devices,
                fabric=fabric_of(gpu(card)),
                n_bytes=np.array([float(row[0]) for row in table]),
                seconds=np.array([float(row[3]) * 1e-9 for row in table]),
            )
        )
    table2 = rows("vidur_net__a100_dgx__all_reduce.csv")
    for devices in (2, 4, 8):
        mine = [
            row
            for row in table2
            if int(row["num_workers"]) == devices == int(row["devices_per_node"])
        ]
        found.append(
            Transfers(
                name=f"vidur A100 x{devices}",
                gpu=gpu("A100 SXM4 80GB"),
                devices=devices,
                fabric=fabric_of(gpu("A100 SXM4 80GB")),
                n_bytes=np.array([float(row["size"]) for row in mine]),
                seconds=np.array(
                    [float(row["time_stats.all_reduce.median"]) * 1e-3 for row in mine]
                ),
            )
        )
    return tuple(found)


def predicted(table: Transfers, p: Parameters) -> Any:
    """Seconds of each row."""
    return np.array(
        [collective_s("all_reduce", b, table.devices, table.fabric, p.links) for b in table.n_bytes]
    )


def textbook(table: Transfers, alpha_s: float = 5e-6) -> Any:
    """Alpha + beta: 2 (n - 1) steps of 5 us, and the bytes at the link's stated rate."""
    n = table.devices
    wire = 2 * (n - 1) / n * table.n_bytes
    return 2 * (n - 1) * alpha_s + wire / table.fabric.inside.bytes_per_s
