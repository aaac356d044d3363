"""Data-parallel training: each process takes its share of every batch, and gradients are summed.

One all-reduce per step carries the gradients and all that the processes have to agree on: which
parameters have a gradient, the loss, whether anybody was asked to stop, and the first process's
clock, which schedules by time follow. Everything else (data order, weights, optimiser) is the same
in every process by construction and is never sent. Batch norm sees the share of its own process.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from suanli.base import processes
from suanli.base.errors import SuanliError

_LOOK_EVERY_S = 0.1
_LONGEST = 200  # characters of a reason


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What a step's exchange gave.

    Attributes:
        loss: Of the whole batch, a tensor of no dimensions on the device.
        stop: Whether any process was asked to stop.
        seconds: The first process's clock.
    """

    loss: torch.Tensor
    stop: bool
    seconds: float


class Replicas:
    """The processes of a run; by default this one alone."""

    def __init__(self, rank: int = 0, world: int = 1, device: str = "cpu") -> None:
        """Name this process's place."""
        self.rank, self.world, self.device = rank, world, device
        self._told = 0

    @classmethod
    def from_environment(cls, device: str) -> "Replicas":
        """Join the processes that torchrun started; alone where it did not.

        Args:
            device: "cpu", or "cuda:0", in the place of which each process takes its own GPU.

        Raises:
            SuanliError: They do not reach each other.
        """
        world = processes.world()
        if world < 2:
            return cls(device=device)
        if device.startswith("cuda"):
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            try:
                _join("nccl" if device.startswith("cuda") else "gloo")
            except (RuntimeError, ValueError) as error:  # the latter of what the environment lacks
                reason = " ".join(str(error).split())[:_LONGEST]
                raise SuanliError(f"the processes do not reach each other: {reason}") from None
        return cls(rank=dist.get_rank(), world=world, device=device)

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which samples of a batch of so many are this process's."""
        return slice(self.rank, count, self.world)

    def exchange(
        self,
        parameters: Sequence[torch.Tensor],
        loss: torch.Tensor,
        *,
        stop: bool,
        seconds: float,
    ) -> Agreed:
        """Sum gradients and losses over all processes.

        Args:
            parameters: Those that are trained, in the same order everywhere; their `grad` is
                replaced by the sum. One that has none anywhere stays without.
            loss: This process's part of the batch's loss.
            stop: Whether this process was asked to stop.
            seconds: This process's clock.
        """
        has = [float(p.grad is not None) for p in parameters]
        gradients = [
            (p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in parameters
        ]
        flat = torch.cat(gradients)
        dist.all_reduce(flat)
        counts, agreed = self._agreed(has, loss, stop=stop, seconds=seconds)
        place = 0
        for parameter, count in zip(parameters, counts, strict=True):
            size = parameter.numel()
            if count > 0:
                summed = flat[place : place + size].view(parameter.shape)
                # a gradient must lie in memory as its parameter does
                parameter.grad = torch.empty_like(parameter).copy_(summed)
            place += size
        return agreed

    def agree(self, loss: torch.Tensor, *, stop: bool, seconds: float) -> Agreed:
        """Sum the losses and agree on the end, where gradients were summed before."""
        return self._agreed([], loss, stop=stop, seconds=seconds)[1]

    def _agreed(
        self, flags: list[float], loss: torch.Tensor, *, stop: bool, seconds: float
    ) -> tuple[list[float], Agreed]:
        clock = seconds if self.first else 0.0
        small = torch.tensor([*flags, float(stop), clock], device=loss.device, dtype=torch.float64)
        small = torch.cat([small, loss.detach().reshape(1).double()])
        dist.all_reduce(small)
        *counts, asked, first_clock = small[:-1].tolist()
        agreed = Agreed(loss=small[-1].to(loss.dtype), stop=asked > 0, seconds=first_clock)
        return counts, agreed

    def from_first(self, value: float) -> float:
        """The first process's value, in all of them."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, 0)
        return float(tensor)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process; all call it together."""
        if self.world == 1:
            return flag
        tensor = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(float(tensor) > 0)

    def told_by_first(self, make: Callable[[], str], *, limit_s: float) -> str:
        """What the first process makes while the others wait, in all of them.

        They look into the group's store now and then, so that signals reach them and no collective
        call has to last as long.

        Args:
            make: Called in the first process only.
            limit_s: How long the others wait.

        Raises:
            SuanliError: The first process did not make it, or not in time.
        """
        if self.world == 1:
            return make()
        store = dist.distributed_c10d._get_default_store()
        self._told += 1
        key = f"suanli-told-{self._told}"
        if self.first:
            told = "!"
            try:
                text = make()
                told = f"={text}"
            except SuanliError as error:
                told = f"!: {error}"
                raise
            finally:
                store.set(key, told)
            return text
        until = time.monotonic() + limit_s
        try:
            while not store.check([key]):
                if time.monotonic() > until:
                    raise SuanliError(f"the first process said nothing for {limit_s:.0f} s")
                time.sleep(_LOOK_EVERY_S)
            told = store.get(key).decode()
        except RuntimeError:  # the store was in it
            raise SuanliError("the first process is gone") from None
        if not told.startswith("="):
            raise SuanliError(f"the first process failed{told[1:]}")
        return told[1:]

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _join(backend: str) -> None:
    """Make the group of all processes.

    torchrun keeps its store when it starts processes anew, and what the dead ones wrote is still
    there: whoever is early would call at an address where nobody is. So each start has names of its
    own. Of several machines each counts its own starts, and torch's names are left as they are.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        dist.init_process_group(backend)
        return
    store, rank, world = next(rendezvous("env://"))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = PrefixStore(f"suanli-start-{start}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world)


def restarted() -> bool:
    """Whether torchrun started these processes anew after one of them had ended."""
    return processes.starts() > 0
