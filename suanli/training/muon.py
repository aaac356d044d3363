"""Muon: updates of matrices that are made orthogonal, and Nesterov SGD for everything else.

Muon is Keller Jordan's (https://kellerjordan.github.io/posts/muon/): the momentum of a weight
matrix is replaced by the nearest matrix whose singular values are all about one, found by a few
steps of a Newton-Schulz iteration with a quintic polynomial, which are matrix products alone.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from suanli.base.errors import BadInputError

# The quintic's coefficients, from the page above: the slope at zero is as steep as it can be while
# singular values stay within about 0.7 to 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_SMALLEST_NORM = 1e-7


def orthogonalised(matrix: Tensor, steps: int = 3) -> Tensor:
    """A matrix of the same singular vectors whose singular values are near one.

    Args:
        matrix: [M, N].
        steps: Of the iteration; small singular values need more.

    Returns:
        bf16 [M, N].
    """
    x = matrix.to(torch.bfloat16)
    x = x / (x.norm() + _SMALLEST_NORM)  # largest singular value at most one
    turned = x.shape[0] > x.shape[1]
    if turned:
        x = x.T
    for _ in range(steps):
        square = x @ x.T
        x = _A * x + (_B * square + _C * (square @ square)) @ x
    result: Tensor = x.T if turned else x
    return result


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `"muon": True`, Nesterov SGD for the others.

    Filters of a convolution are rows of a matrix [outputs, the rest]. Before each Muon update a
    tensor is scaled to the norm sqrt(outputs), so that its rate means the same at every moment.

    Args:
        groups: Parameter groups as in torch. Options: `muon`, `lr`, `momentum`, `weight_decay`
            (SGD groups only, as torch's SGD has it), `steps` (Muon groups only).
        lr: Rate of groups that give none.
        momentum: Of groups that give none.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float = 0.1, momentum: float = 0.6
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "steps": 3, "muon": False}
        super().__init__(groups, defaults)
        for group in self.param_groups:
            if group["muon"] and any(p.dim() < 2 for p in group["params"]):
                raise BadInputError("Muon updates matrices and filters, not vectors")
            if group["muon"] and group["weight_decay"]:
                raise BadInputError(
                    "a Muon group's norm is fixed: weight decay means nothing there"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; gives what `closure` gives, called before it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if trained and group["muon"]:
                self._muon(trained, group)
            elif trained:
                self._sgd(trained, group)
        return loss

    def _directions(self, trained: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Nesterov's: gradient + momentum * (the updated) buffer."""
        gradients = []
        for parameter in trained:
            gradient = parameter.grad
            assert gradient is not None
            if group["weight_decay"]:
                gradient = gradient.add(parameter, alpha=group["weight_decay"])
            gradients.append(gradient)
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(gradient)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in trained]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        return list(torch._foreach_add(gradients, buffers, alpha=group["momentum"]))

    def _sgd(self, trained: list[Tensor], group: dict[str, Any]) -> None:
        torch._foreach_add_(trained, self._directions(trained, group), alpha=-float(group["lr"]))

    def _muon(self, trained: list[Tensor], group: dict[str, Any]) -> None:
        for parameter, way in zip(trained, self._directions(trained, group), strict=True):
            parameter.mul_(len(parameter) ** 0.5 / (parameter.norm() + _SMALLEST_NORM))
            update = orthogonalised(way.reshape(len(way), -1), group["steps"])
            parameter.sub_(update.view(way.shape).to(parameter.dtype), alpha=float(group["lr"]))


def matrix_parameters(model: nn.Module) -> list[Tensor]:
    """The trained filters of convolutions, which are what Muon is for in image networks."""
    return [
        layer.weight
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d) and layer.weight.requires_grad
    ]
