"""Time of transfers between devices: alpha-beta, with the price of filling the pipeline.

Textbook: alpha + bytes / beta (Hockney, "The communication challenge for MPP", 1994). Libraries cut
a message into pieces that follow each other around the ring; with the best size of piece the time
is (sqrt(alpha) + sqrt(bytes / beta))**2, and small messages cost the start of the kernels and the
steps around the ring whatever their size.
"""

from dataclasses import dataclass, replace
from math import sqrt

from suanli.base.errors import BadInputError
from suanli.base.gpu_sheet import GpuSheet
from suanli.base.prediction import Collective, Link
from suanli.cost.parameters import LinkParameters

# Without a bridge, cards of a server meet over the bus; servers of eight are the usual ones.
_USUAL_SERVER = 8
# Part of the stated rate that one large copy from card to card reaches. An assumption: between what
# collectives reach (`LinkParameters.share`) and all of it.
_COPY_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """How devices are joined: within a server, and between servers.

    Attributes:
        inside: Between the cards of one server.
        between: Between servers, per card; None where there is one server.
    """

    inside: Link
    between: Link | None = None


def fabric_of(gpu: GpuSheet, *, network_bytes_per_s: float | None = None) -> Fabric:
    """The usual way to join cards of this kind.

    Args:
        gpu: The card.
        network_bytes_per_s: One direction of a server's network, all adapters together; None where
            it is unknown.

    Raises:
        BadInputError: The sheet knows neither NVLink nor PCIe.
    """
    inside = _as_measured(gpu, _inside(gpu))
    if network_bytes_per_s is None:
        return Fabric(inside=inside)
    per_card = network_bytes_per_s / min(inside.devices, _USUAL_SERVER)
    return Fabric(
        inside=inside, between=Link(kind="network", bytes_per_s=per_card, devices=1 << 20)
    )


def _inside(gpu: GpuSheet) -> Link:
    """What joins the cards of a server, by the sheet."""
    cards = gpu.nvlink_gpus or _USUAL_SERVER
    if gpu.nvlink_gb_per_s_both_ways and cards > 2:
        return Link(
            kind="nvlink" if float(gpu.compute_capability) >= 8.0 else "nvlink_mesh",
            bytes_per_s=gpu.nvlink_gb_per_s_both_ways / 2 * 1e9,
            devices=cards,
        )
    if gpu.pcie_bytes_per_s:
        alone = gpu.nvlink_gpus == 1
        devices = 1 if alone else _USUAL_SERVER
        return Link(kind="pcie", bytes_per_s=gpu.pcie_bytes_per_s, devices=devices)
    raise BadInputError(
        f"{gpu.name} has no link in its sheet",
        next_step="add pcie_generation and pcie_lanes to its file",
    )


def _as_measured(gpu: GpuSheet, link: Link) -> Link:
    """The same at the rate that was measured between two cards, where it was.

    In a mesh a copy between two cards takes some of a card's links and collectives take all of
    them, so that there the sheet stays.
    """
    if gpu.link_gb_per_s is None or link.kind == "nvlink_mesh" or link.devices == 1:
        return link
    return replace(link, bytes_per_s=gpu.link_gb_per_s * 1e9 / _COPY_SHARE)


def collective_s(
    kind: Collective,
    n_bytes: float,
    devices: int,
    fabric: Fabric,
    p: LinkParameters,
    *,
    apart: int = 1,
) -> float:
    """Seconds of one collective.

    Args:
        kind: Which.
        n_bytes: Size of the whole vector: what each device ends with after an all-gather, what
            each starts with for all-reduce and reduce-scatter, what is sent for the others.
        devices: How many take part; they fill server after server.
        fabric: How they are joined.
        p: Fitted constants.
        apart: Only every so many-th card takes part; the groups of those between run beside, each
            on adapters of its own.

    Raises:
        BadInputError: More servers are needed and nothing is known of the network between them.
    """
    if devices <= 1 or n_bytes <= 0:
        return 0.0
    server = max(1, fabric.inside.devices // apart)
    if devices <= server:
        return _ring_s(_wire_bytes(kind, n_bytes, devices), devices, fabric.inside, p)
    if fabric.between is None:
        raise BadInputError(
            f"{devices} devices need more than one server, and the network is unknown",
            next_step="say how fast a server's network is",
        )
    servers = -(-devices // server)
    # Inside each server first, then its cards exchange their parts with those of the others.
    part = n_bytes / server
    between = _ring_s(_wire_bytes(kind, part, servers), servers, fabric.between, p)
    if server == 1:
        return between
    inside = _ring_s(_wire_bytes(kind, n_bytes, server), server, fabric.inside, p)
    return max(inside, between) + p.level_share * min(inside, between)


def _wire_bytes(kind: Collective, n_bytes: float, devices: int) -> float:
    """Bytes that each device sends in a ring.

    Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in
    MPICH", 2005.
    """
    part = (devices - 1) / devices
    if kind == "all_reduce":
        return 2.0 * part * n_bytes
    if kind in ("all_gather", "reduce_scatter", "all_to_all"):
        return part * n_bytes
    return n_bytes


def _ring_s(wire_bytes: float, devices: int, link: Link, p: LinkParameters) -> float:
    rate = link.bytes_per_s * link_share(link, devices, p)
    flow_s = wire_bytes / rate
    pipeline_s = (sqrt(p.piece_s) + sqrt(flow_s)) ** 2
    least_s = p.start_s + p.step_s * devices
    if link.kind == "network":
        least_s += p.network_s
    q = p.start_overlap
    return float((least_s**q + pipeline_s**q) ** (1.0 / q))


def link_share(link: Link, devices: int, p: LinkParameters) -> float:
    """Part of a link's rate that collectives reach: through switches less in small groups."""
    lost = p.small_group / devices if link.kind == "nvlink" else 0.0
    return max(0.05, p.share[link.kind] - lost)
