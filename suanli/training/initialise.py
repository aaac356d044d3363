"""Ways to start a convolutional network that shorten its training."""

import torch
from torch import Tensor, nn

from suanli.base.errors import BadInputError


@torch.no_grad()
def dirac(layer: nn.Conv2d) -> None:
    """Let the first filters pass their input channels on unchanged; the others stay.

    Args:
        layer: With at least as many output as input channels, or else only so many pass.
    """
    count = min(layer.weight.shape[:2])
    nn.init.dirac_(layer.weight[:count])


def whitening_filters(images: Tensor, size: int, eps: float = 5e-4) -> Tensor:
    """Filters whose responses to patches of images are uncorrelated, of equal variance.

    Eigenvectors of the patches' covariance over sqrt(eigenvalue + eps), the largest first, and
    behind them the same with the sign turned, for the sake of activations that cut one sign off
    (the first layer of airbench94, arXiv 2404.00498).

    Args:
        images: [N, C, H, W], normalised.
        size: Height and width of a patch.
        eps: Keeps directions without variance from blowing up noise.

    Returns:
        fp32 [2 C size size, C, size, size].
    """
    channels = images.shape[1]
    patches = nn.functional.unfold(images.float(), size)  # [N, C size size, positions]
    rows = patches.transpose(1, 2).reshape(-1, channels * size * size)
    covariance = (rows.T @ rows) / len(rows)
    values, vectors = torch.linalg.eigh(covariance.double())
    filters = (vectors / (values + eps).sqrt()).T.flip(0)
    both = torch.cat([filters, -filters])
    return both.float().reshape(-1, channels, size, size)


@torch.no_grad()
def whiten(layer: nn.Conv2d, images: Tensor, eps: float = 5e-4) -> None:
    """Fill a layer with whitening filters and freeze them; filters beyond their number become zero.

    Args:
        layer: A convolution with a square kernel whose input is the images.
        images: A few thousand, [N, C, H, W].
        eps: See `whitening_filters`.

    Raises:
        BadInputError: The layer has fewer filters than there are.
    """
    filters = whitening_filters(images, layer.kernel_size[0], eps)
    if len(filters) > layer.out_channels:
        raise BadInputError(f"whitening needs {len(filters)} filters, not {layer.out_channels}")
    layer.weight.zero_()
    layer.weight[: len(filters)] = filters.to(layer.weight)
    layer.weight.requires_grad_(False)
