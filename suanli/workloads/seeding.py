"""Random weights and example inputs from fixed seeds, with values like a trained network's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

WEIGHT_SEED, INPUT_SEED = 20_231, 20_232


@contextmanager
def seeded(seed: int = WEIGHT_SEED) -> Iterator[None]:
    """Draw from `seed` inside the block and leave the caller's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def random_weights(build: Callable[[], nn.Module], probe: torch.Tensor | None = None) -> nn.Module:
    """Build a network from a fixed seed; networks with batch norm get statistics of their own.

    With fresh layers every batch norm is the identity, so a wrong folding would not be seen, and
    with random statistics activations grow or die layer by layer. Here scale and shift are drawn
    around 1 and 0, and the running statistics are those of one probe batch, so that every layer's
    activations keep a scale of about one.

    Args:
        build: Makes the network; draws from torch's generator.
        probe: A batch for the statistics; without one batch norm stays as it is.

    Returns:
        The network in evaluation mode.
    """
    with seeded():
        model = build()
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if norms and probe is not None:
            _spread_norms(norms)
            _take_statistics(model, norms, probe)
    return model.eval()


def _spread_norms(norms: "list[nn.modules.batchnorm._BatchNorm]") -> None:
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.7, 1.3)
            norm.bias.normal_(0.0, 0.2)


def _take_statistics(
    model: nn.Module, norms: "list[nn.modules.batchnorm._BatchNorm]", probe: torch.Tensor
) -> None:
    # one thread, so that the sums do not depend on how many threads the process has
    threads = torch.get_num_threads()
    momenta = [norm.momentum for norm in norms]
    try:
        torch.set_num_threads(1)
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model.train()(probe)
    finally:
        torch.set_num_threads(threads)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.zero_()


def pictures(batch: int, channels: int, side: int, *, seed: int = INPUT_SEED) -> torch.Tensor:
    """Random pictures with large and small structures, each with its own brightness.

    White noise will not do: after the last pooling all of its pictures look alike, so a network's
    logits would hardly differ between them.

    Returns:
        fp32 [batch, channels, side, side], standard deviation about one. The first pictures of a
        larger batch are those of a smaller one.
    """
    result = np.zeros((batch, channels, side, side), dtype=np.float32)
    for grid, strength in ((1, 0.5), (4, 0.7), (16, 0.4), (side, 0.3)):
        draw = np.random.default_rng((seed, grid))
        coarse = draw.standard_normal((batch, channels, grid, grid), dtype=np.float32)
        # squares, not a smooth enlargement, whose rounding would depend on the number of threads
        cell = np.arange(side) * grid // side
        result += np.float32(strength) * coarse[:, :, cell[:, None], cell]
    return torch.from_numpy(result)


def tokens(batch: int, length: int, vocabulary: int, *, seed: int = INPUT_SEED) -> torch.Tensor:
    """Random token numbers, int64 [batch, length]; prefixes agree as with `pictures`."""
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.integers(0, vocabulary, (batch, length), dtype=np.int64))


def values(batch: int, *shape: int, seed: int = INPUT_SEED) -> torch.Tensor:
    """Normal values, fp32 [batch, *shape]; prefixes agree as with `pictures`."""
    draw = np.random.default_rng(seed)
    return torch.from_numpy(draw.standard_normal((batch, *shape), dtype=np.float32))
