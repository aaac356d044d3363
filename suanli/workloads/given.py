"""Data as a person has it (tensors, a torch data set, a loader) as three parts."""

from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from suanli.base.errors import BadInputError
from suanli.workloads.record import Data, Samples
from suanli.workloads.stream import Stream

_HELD_OUT = 0.1  # of the samples for the search part, and as much for acceptance
_SPLIT_SEED = 20_240_602
_KNOWN = "(inputs, labels), a torch Dataset or DataLoader, Samples or Data"


def as_data(given: Any) -> Data:
    """Three parts of what was given; where only training samples are, a tenth is held out twice.

    Args:
        given: `Data`, the parts of which may be any of these; `Samples`; `(inputs, labels)` as
            tensors; a map-style torch `Dataset`, or a `DataLoader` over one. Data sets are read
            sample by sample (`workloads.stream`), those of tensors excepted.

    Raises:
        BadInputError: It is none of these, or there are too few samples.
    """
    if isinstance(given, Data):
        return replace(
            given,
            train=as_samples(given.train),
            search=as_samples(given.search),
            acceptance=as_samples(given.acceptance),
        )
    samples = as_samples(given)
    count = len(samples)
    held = int(count * _HELD_OUT)
    if held < 1:
        raise BadInputError(
            f"{count} samples are too few to hold some out",
            next_step="give a suanli.workloads.record.Data with its three parts",
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_SPLIT_SEED))
    cuts = (order[2 * held :], order[:held], order[held : 2 * held])
    train, search, acceptance = (samples.part(rows) for rows in cuts)
    return Data(train=train, search=search, acceptance=acceptance)


def as_samples(given: Any) -> Samples:
    """Labelled samples of tensors, a data set or a loader; see `as_data`.

    Raises:
        BadInputError: It is none of these, or there are no samples.
    """
    if isinstance(given, Samples):
        if type(given) is Samples and any(part.requires_grad for part in given.inputs):
            return replace(given, inputs=tuple(part.detach() for part in given.inputs))
        return given
    if isinstance(given, DataLoader):
        return _of_loader(given)
    if isinstance(given, Dataset):
        return _of_dataset(given)
    if isinstance(given, tuple | list) and len(given) == 2:
        return _of_tensors(*given)
    raise BadInputError(f"data cannot be a {type(given).__name__}", next_step=_KNOWN)


def _of_loader(loader: "DataLoader[Any]") -> Samples:
    """The samples of a loader. Batches and their order are the run's own, from its seed.

    Raises:
        BadInputError: The loader does what the run could not do in the same way.
    """
    own: dict[str, Any] = {
        "a sampler of its own": _draws_otherwise(loader.sampler),
        "no batch size": loader.batch_size is None,
        "a collate_fn of its own": loader.collate_fn is not default_collate,
        "a worker_init_fn": loader.worker_init_fn is not None,
    }
    if isinstance(loader.dataset, IterableDataset):
        own = {}  # said below
    if found := [name for name, is_there in own.items() if is_there]:
        raise BadInputError(
            f"the DataLoader has {found[0]}: a run draws its batches itself, so that it can be "
            "gone on with exactly",
            next_step="give the data set, which may do the same in __getitem__",
        )
    return _of_dataset(loader.dataset, workers=loader.num_workers)


def _draws_otherwise(sampler: Any) -> bool:
    """Whether a sampler does not give every sample once an epoch."""
    if type(sampler) is RandomSampler:
        return bool(sampler.replacement) or sampler.num_samples != len(sampler.data_source)
    return type(sampler) is not SequentialSampler


def _of_dataset(dataset: "Dataset[Any]", workers: int | None = None) -> Samples:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise BadInputError(
            f"{type(dataset).__name__} has no length and no indices, so there is no order that "
            "could be gone on with",
            next_step="give a map-style Dataset, with __len__ and __getitem__",
        )
    if len(dataset) == 0:
        raise BadInputError("the data set is empty")
    if type(dataset) is TensorDataset and len(dataset.tensors) > 1:
        return _of_tensors(dataset.tensors[:-1], dataset.tensors[-1])
    return Stream(dataset, workers=workers)


def _of_tensors(inputs: Any, labels: Any) -> Samples:
    many = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    if not all(isinstance(t, torch.Tensor) for t in (*many, labels)):
        raise BadInputError("inputs and labels must be tensors", next_step="torch.as_tensor(array)")
    for number, tensor in enumerate(many):
        if len(tensor) != len(labels):
            raise BadInputError(f"{len(labels)} labels but {len(tensor)} entries of input {number}")
    if len(labels) == 0:
        raise BadInputError("there are no samples")
    # a run takes no gradients of its samples
    return Samples(inputs=tuple(t.detach() for t in many), labels=labels.detach())
