"""Torch's SGD, whose fused update also takes parameters that get their first gradient late."""

from typing import Any

import torch


class SGD(torch.optim.SGD):
    """`torch.optim.SGD`; fused, momentum begins as zeros.

    Torch's fused update begins the averages of all parameters at once, and raises where some have
    one already: layers that a model leaves out at random would end a run. It also leaves them
    undefined where the first step of a run in fp16 is passed over. Behind zeros the first gradient
    is the average, as it is in torch's other updates.
    """

    def _init_group(
        self, group: dict[str, Any], params: list[Any], grads: list[Any], averages: list[Any]
    ) -> bool:
        """Torch's way to collect what a step needs; the averages are none without momentum."""
        sparse: bool = super()._init_group(group, params, grads, averages)  # type: ignore[no-untyped-call]
        # the first gradient counts whole, and not by its dampened share, as it would behind zeros
        if group["fused"] and not group["dampening"]:
            for place, average in enumerate(averages):
                if average is None:
                    averages[place] = torch.zeros_like(params[place])
        return sparse
