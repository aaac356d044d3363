"""Trained weights of workloads: safetensors files, and where the ones made here are kept."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from suanli.base.codec import to_json
from suanli.base.errors import BadInputError
from suanli.base.files import cache_dir, write_atomic
from suanli.workloads.record import TrainingSettings

_FACTS = "facts"  # their name in a file's metadata
_LAYOUT_VERSION = 1  # raised when a built-in network changes, so that old files are not found
# settings that came later count only where they are set, so that older files are found
_LATER = (("betas", [0.9, 0.999]), ("clip_norm", 0.0))


def kept_weights(name: str, settings: TrainingSettings) -> Path:
    """Where weights of a built-in workload, trained with these settings, are kept."""
    settled = {k: v for k, v in to_json(settings).items() if (k, v) not in _LATER}
    recipe = json.dumps([name, _LAYOUT_VERSION, settled], sort_keys=True)
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    return cache_dir() / "weights" / f"{name}-{digest}.safetensors"


def save_weights(model: nn.Module, path: Path, facts: dict[str, str] | None = None) -> None:
    """Write a model's state as fp32 safetensors, whole or not at all.

    Args:
        model: Its parameters and buffers are written.
        path: The file; its folder is made.
        facts: What a person should know of them, such as the accuracy.

    Raises:
        OSError: The file cannot be written.
    """
    state = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
    }
    # as one text: safetensors writes several in any order, and equal weights are to be equal files
    told = {_FACTS: json.dumps(facts, sort_keys=True)} if facts else None
    write_atomic(path, save(state, metadata=told))


def load_weights(model: nn.Module, path: Path, *, ignored: tuple[str, ...] = ()) -> None:
    """Fill a model from a safetensors file; every name and every shape must agree.

    Args:
        model: To be filled.
        path: The file.
        ignored: Names that may stand in the file and are not used.

    Raises:
        BadInputError: The file is absent, damaged or made for another model.
    """
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise BadInputError(f"no weights at {path}") from None
    except (SafetensorError, OSError) as error:
        raise BadInputError(f"{path.name} is no readable safetensors file: {error}") from None
    state = {name: tensor for name, tensor in state.items() if name not in ignored}
    own = model.state_dict()
    if missing := sorted(set(own) - set(state)):
        raise BadInputError(f"{path.name} is for another model: it lacks {missing[0]}")
    if unknown := sorted(set(state) - set(own)):
        raise BadInputError(f"{path.name} is for another model: it has {unknown[0]}")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            theirs, ours = tuple(tensor.shape), tuple(own[name].shape)
            raise BadInputError(f"{path.name} is for another model: {name} is {theirs}, not {ours}")
    with torch.no_grad():
        model.load_state_dict(state)


def weight_facts(path: Path) -> dict[str, str]:
    """What the file says of itself; empty where it says nothing.

    Raises:
        BadInputError: The file is absent or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get(_FACTS, "{}"))
        return {str(name): str(fact) for name, fact in told.items()}
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError) as error:
        raise BadInputError(f"{path.name} is no readable safetensors file: {error}") from None
