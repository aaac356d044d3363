"""Work of the optimiser's step, by formula: it touches every parameter once."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from suanli.base.errors import BadInputError
from suanli.base.work import Operator
from suanli.measure.capturing.traffic import dtype_name


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """Operations per element and state tensors per parameter."""

    flops: int
    states: int


# sgd:          p -= lr * g                                                   (2)
# sgd-momentum: b = m * b + g; p -= lr * b                                    (4)
# adam:         m = b1 m + (1 - b1) g (3); v = b2 v + (1 - b2) g^2 (4);
#               p -= s * m / (sqrt(v) * c + eps) (6)        Kingma and Ba 2015, bias as scalars
# adamw:        adam and p *= 1 - lr * decay (1)            Loshchilov and Hutter 2019
_RULES = {
    "sgd": _Rule(flops=2, states=0),
    "sgd-momentum": _Rule(flops=4, states=1),
    "adam": _Rule(flops=13, states=2),
    "adamw": _Rule(flops=14, states=2),
}


def optimizer_step(
    optimizer: str, parameters: Iterable[tuple[str, torch.Tensor]]
) -> list[Operator]:
    """One operator per parameter that has a gradient.

    Reads parameter, gradient and states, writes parameter and states; states have the parameter's
    element type.

    Raises:
        BadInputError: There is no formula for this optimiser.
    """
    rule = _RULES.get(optimizer)
    if rule is None:
        known = ", ".join(sorted(_RULES))
        raise BadInputError(f"no count for optimizer {optimizer!r}", next_step=f"one of {known}")
    operators = []
    for name, parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        shape = tuple(int(n) for n in parameter.shape)
        operators.append(
            Operator(
                name=f"{optimizer}_step",
                phase="optimizer",
                module=name.rpartition(".")[0],
                dtype=dtype_name(parameter.dtype),
                flops=rule.flops * parameter.numel(),
                bytes_read=(2 + rule.states) * size,
                bytes_written=(1 + rule.states) * size,
                parameter_bytes=size,
                input_shapes=(shape,) * (2 + rule.states),
                output_shapes=(shape,) * (1 + rule.states),
            )
        )
    return operators
