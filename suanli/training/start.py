"""What a run starts from: the parts of the data, and the model's first weights."""

from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from suanli.base.errors import BadInputError
from suanli.training.chance import seed_all
from suanli.training.recipe import Recipe
from suanli.workloads.record import Samples
from suanli.workloads.stream import Stream, own_generators

_SEEN = 1024  # samples of a data set that a recipe's own start may look at


def held_out_end(train: Samples, fraction: float) -> tuple[Samples, Samples | None]:
    """The training samples, and the end of the set that is held out for validation."""
    if not fraction:
        return train, None
    edge = len(train) - int(len(train) * fraction)
    return train.part(slice(0, edge)), train.part(slice(edge, None))


def starting_point(recipe: Recipe, train: Samples, seed: int) -> nn.Module:
    """The model as a run begins with it, on the CPU.

    A workload that is untrained starts from its layers' own initialisation, drawn from `seed`; one
    with weights starts from those. The recipe's own `start` has the last word. Parameters that the
    model does not train stay as they are; one that trains none, as for inference, trains all.
    """
    workload = recipe.workload
    model = workload.make_model()
    if workload.untrained:
        # children first, so that a network's own rule has the last word over its layers'
        with own_generators(), torch.random.fork_rng(devices=[]):
            seed_all(seed)
            for module in reversed(list(model.modules())):
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
    train_some(model)
    if recipe.start is not None:
        seen = train.head(_SEEN) if isinstance(train, Stream) else train
        recipe.start(model, seen, torch.Generator().manual_seed(seed))
    return model


def train_some(model: nn.Module) -> nn.Module:
    """The model; where it trains no parameter, as one for inference, it trains all from here on."""
    if not any(p.requires_grad for p in model.parameters()):
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    return model


def take_weights(model: nn.Module, path: Path) -> list[str]:
    """Fill a model from the weights of another one, by name; what does not match stays.

    Args:
        model: Its head may have another shape, and parts of it may be new.
        path: A safetensors file, or the folder of a run or of a checkpoint.

    Returns:
        Lines that say what was taken and what was not.

    Raises:
        BadInputError: The file is absent or damaged, or nothing in it matches.
    """
    path = _weights_in(path)
    try:
        given = load_file(path)
    except FileNotFoundError:
        raise BadInputError(f"no weights at {path}") from None
    except (SafetensorError, OSError) as error:
        raise BadInputError(f"{path.name} is no readable safetensors file: {error}") from None
    own = model.state_dict()
    fitting = {n: t for n, t in given.items() if n in own and t.shape == own[n].shape}
    if not fitting:
        raise BadInputError(f"nothing in {path.name} fits the model by name and shape")
    model.load_state_dict(fitting, strict=False)
    lines = [f"{len(fitting)} of {len(own)} tensors taken from {path.name}"]
    shapes = [n for n in given if n in own and n not in fitting]
    if shapes:
        first = shapes[0]
        lines.append(
            f"started anew, as the shape is another: {', '.join(shapes)} "
            f"({list(given[first].shape)} there, {list(own[first].shape)} here)"
        )
    if absent := [n for n in own if n not in given]:
        lines.append(f"started anew, as they are not in it: {', '.join(absent)}")
    if unused := [n for n in given if n not in own]:
        lines.append(f"not used: {', '.join(unused)}")
    return lines


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> int:
    """Stop training the parameters whose names match a shell pattern; gives how many elements.

    Raises:
        BadInputError: A pattern matches nothing, or everything is frozen.
    """
    names = dict(model.named_parameters())
    for pattern in patterns:
        matching = [n for n in names if fnmatchcase(n, pattern)]
        if not matching:
            raise BadInputError(
                f"--freeze {pattern} matches no parameter",
                next_step=f"they are named {', '.join(list(names)[:4])}, …",
            )
        for name in matching:
            names[name].requires_grad_(False)
    if not any(p.requires_grad for p in names.values()):
        raise BadInputError("--freeze leaves nothing to train")
    return sum(p.numel() for p in names.values() if not p.requires_grad)


def frozen_norms(model: nn.Module) -> int:
    """How many batch norms keep running statistics and have parameters none of which is trained."""
    kinds = nn.modules.batchnorm._BatchNorm
    norms = [m for m in model.modules() if isinstance(m, kinds) and m.running_mean is not None]
    own = [list(norm.parameters()) for norm in norms]
    return sum(bool(found) and not any(p.requires_grad for p in found) for found in own)


def _weights_in(path: Path) -> Path:
    """The file of weights in a run's or a checkpoint's folder; a file is itself."""
    for name in ("weights.safetensors", "model.safetensors"):
        if (path / name).is_file():
            return path / name
    if path.is_dir():
        raise BadInputError(f"{path} holds no weights", next_step="give a safetensors file")
    return path
