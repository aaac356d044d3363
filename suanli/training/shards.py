"""The shares of a sharded run in a checkpoint, through torch's distributed checkpoints.

Every process writes its own share as safetensors with its place in the whole tensor, so that any
number of processes can read them, one included. What is not shared (counts, hyper-parameters,
buffers) goes into the checkpoint's `run` part. torch's usual metadata file, a pickle, is neither
written nor read.
"""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from suanli.training.step import Stepper

_KEY = "shards"  # in the `run` part


def is_sharded(run: dict[str, Any]) -> bool:
    """Whether the `run` part of a checkpoint says that its tensors lie in shares."""
    return _KEY in run


def facts_of(stepper: Stepper) -> dict[str, Any]:
    """What belongs to a sharded state and is not shared, for the `run` part."""
    alone: dict[str, dict[str, Any]] = {}
    for name, states in _states(stepper).items():
        alone[name] = {
            key: None if _is_like(value, shape) else _whole(value)
            for key, (value, shape) in states.items()
        }
    groups = [
        {k: _whole(v) for k, v in group.items() if k != "params"}
        for group in stepper.optimizer.param_groups
    ]
    buffers = {n: b.detach().cpu() for n, b in stepper.model.named_buffers()}
    return {_KEY: {"states": alone, "groups": groups, "buffers": buffers}}


def write_shards(folder: Path, stepper: Stepper) -> None:
    """Write the shares; all processes call it together.

    Raises:
        OSError: One of them could not write.
    """
    alone = stepper.replicas.world == 1
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(_tensors(stepper), storage_writer=writer, no_dist=alone)
    except CheckpointException as error:
        raise OSError(0, f"a process could not write its share: {error}") from None


def read_shards(folder: Path, stepper: Stepper, run: dict[str, Any]) -> None:
    """Bring model and optimiser to a sharded state; all processes call it together.

    Args:
        folder: Of the checkpoint.
        stepper: Of any number of processes.
        run: The checkpoint's `run` part.

    Raises:
        RuntimeError: It is the state of another model.
    """
    kept = run[_KEY]
    named = _named(stepper)
    if kept["states"].keys() - named.keys():
        raise RuntimeError(f"no parameter {min(kept['states'].keys() - named.keys())}")
    for name, states in kept["states"].items():
        parameter = named[name]
        stepper.optimizer.state[parameter] = {
            key: torch.zeros_like(parameter) if value is None else value
            for key, value in states.items()
        }
    for group, values in zip(stepper.optimizer.param_groups, kept["groups"], strict=True):
        group.update(values)
    buffers = dict(stepper.model.named_buffers())
    if buffers.keys() != kept["buffers"].keys():
        raise RuntimeError("other buffers")
    tensors = _tensors(stepper)
    reader = HuggingFaceStorageReader(str(folder))
    try:
        load(tensors, storage_reader=reader, no_dist=stepper.replicas.world == 1)
    except CheckpointException as error:
        raise RuntimeError(f"the shares do not fit: {error}") from None
    with torch.no_grad():
        for name, value in kept["buffers"].items():
            buffers[name].copy_(value)
    stepper.forward.take_over()


def _named(stepper: Stepper) -> dict[str, torch.Tensor]:
    return dict(stepper.model.named_parameters())


def _tensors(stepper: Stepper) -> dict[str, torch.Tensor]:
    """Everything that is shared, by name; the tensors themselves, so that reading fills them."""
    found = {f"model/{name}": p.detach() for name, p in _named(stepper).items()}
    for name, states in _states(stepper).items():
        for key, (value, shape) in states.items():
            if _is_like(value, shape):
                found[f"optimizer/{name}/{key}"] = value
    return found


def _states(stepper: Stepper) -> dict[str, dict[str, tuple[Any, torch.Size]]]:
    """Parameter -> name of a state -> the state and the parameter's shape."""
    states = stepper.optimizer.state
    return {
        name: {key: (value, parameter.shape) for key, value in states[parameter].items()}
        for name, parameter in _named(stepper).items()
        if parameter in states
    }


def _is_like(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == shape and value.dim() > 0


def _whole(value: Any) -> Any:
    """A value that is not shared: numbers, texts, and tensors that every process has."""
    if isinstance(value, torch.Tensor) and hasattr(value, "full_tensor"):
        value = value.full_tensor()
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
