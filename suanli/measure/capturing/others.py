"""What every operator that is no matrix product costs: views, copies, pointwise, reductions.

One operation per element is the convention: of the output for pointwise operators, of the input
for reductions. Operators that pass over their data several times count each arithmetic pass of the
textbook formula. None of these figures enters the speed of light: a fused implementation hides
them behind the products.
"""

from collections.abc import Iterable
from math import log2, prod
from typing import Any

import torch


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names are ATen's without namespace and overload, in-place marks ("add_") stripped.
_FREE = _names(
    """_unsafe_view unsafe_split unsafe_split_with_sizes unsafe_chunk
    as_strided _reshape_alias detach alias lift lift_fresh empty empty_like
    empty_strided new_empty new_empty_strided empty_permuted resize resize_as set is_same_size
    view_as_real view_as_complex _conj _neg_view sym_size sym_stride sym_numel sym_storage_offset
    _assert_async _assert_scalar _assert_tensor_metadata _has_same_storage_numel"""
)
_MOVES = _names(
    """clone copy _to_copy to_dtype contiguous cat stack index_select index gather embedding
    _embedding_bag _embedding_bag_forward_only constant_pad_nd reflection_pad1d reflection_pad2d
    reflection_pad3d replication_pad1d replication_pad2d replication_pad3d _pad_circular repeat roll
    flip rot90 zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full fill zero
    scalar_tensor arange eye tril triu tril_indices triu_indices linspace slice_scatter
    select_scatter diagonal_scatter as_strided_scatter scatter index_copy index_put masked_select
    nonzero pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im upsample_nearest1d
    upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d slice_backward select_backward diagonal_backward unfold_backward
    view_copy permute_copy transpose_copy expand_copy unsqueeze_copy squeeze_copy slice_copy
    t_copy split_copy split_with_sizes_copy select_copy as_strided_copy _reshape_copy
    repeat_interleave take complex real imag unbind_copy block_diag one_hot
    constant_pad reflection_pad2d_backward replication_pad2d_backward _weight_int8pack
    native_channel_shuffle _pack_padded_sequence _pad_packed_sequence masked_scatter
    masked_scatter_backward"""
)
_BY_INPUT = _names(
    """sum mean amax amin max min argmax argmin any all prod norm linalg_vector_norm var std
    var_mean std_mean logsumexp cumsum cumprod cummax cummin logcumsumexp topk sort argsort msort
    median nanmedian mode kthvalue histc bincount unique _unique2 unique_consecutive unique_dim
    searchsorted bucketize adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d
    adaptive_max_pool2d adaptive_max_pool3d trace nansum count_nonzero aminmax
    embedding_dense_backward
    _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward avg_pool2d_backward
    avg_pool3d_backward max_pool2d_with_indices_backward max_pool3d_with_indices_backward
    adaptive_max_pool2d_backward index_add scatter_add scatter_reduce index_reduce
    upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward
    nll_loss_forward nll_loss2d_forward nll_loss_backward nll_loss2d_backward
    max_unpool2d isin diff"""
)
_BY_OUTPUT = _names(
    """native_dropout native_dropout_backward bernoulli rand randn rand_like randn_like normal
    uniform randint randint_like randperm random exponential multinomial log_sigmoid_forward
    rrelu_with_noise glu glu_backward _fused_dropout erfinv logit_backward
    fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask
    quantize_per_tensor quantize_per_channel dequantize dequantize_per_tensor
    dequantize_per_channel quantize_per_token dequantize_per_token choose_qparams
    _prelu_kernel _prelu_kernel_backward masked_fill _euclidean_dist cross
    mse_loss mse_loss_backward smooth_l1_loss smooth_l1_loss_backward huber_loss
    huber_loss_backward binary_cross_entropy binary_cross_entropy_backward
    binary_cross_entropy_with_logits hardtanh_backward softplus_backward softshrink_backward
    hardshrink_backward elu_backward leaky_relu_backward hardswish_backward hardsigmoid_backward
    floor_divide mish_backward log_sigmoid_backward rrelu_with_noise_backward silu_backward"""
)
# Passes over the elements of the input: sums, differences, exponentials, products.
_PASSES = {
    "_softmax": 5,
    "_safe_softmax": 5,
    "_log_softmax": 5,
    "_softmax_backward_data": 4,
    "_log_softmax_backward_data": 4,
    "native_layer_norm": 7,
    "native_layer_norm_backward": 11,
    "_fused_rms_norm": 4,
    "_fused_rms_norm_backward": 8,
    "native_group_norm": 7,
    "native_group_norm_backward": 11,
    "native_batch_norm": 7,
    "_native_batch_norm_legit": 7,
    "_native_batch_norm_legit_functional": 7,
    "_batch_norm_with_update": 7,
    "_native_batch_norm_legit_no_training": 2,
    "cudnn_batch_norm": 7,
    "native_batch_norm_backward": 11,
    "batch_norm_backward": 11,
    "cudnn_batch_norm_backward": 11,
    "upsample_linear1d": 4,
    "upsample_bilinear2d": 8,
    "upsample_bicubic2d": 32,
    "_upsample_bilinear2d_aa": 8,
    "_upsample_bicubic2d_aa": 32,
    "upsample_trilinear3d": 16,
    "upsample_linear1d_backward": 4,
    "upsample_bilinear2d_backward": 8,
    "upsample_bicubic2d_backward": 32,
    "grid_sampler_2d": 8,
    "grid_sampler_3d": 16,
    "grid_sampler_2d_backward": 16,
    "_weight_norm_interface": 4,
    "_weight_norm_interface_backward": 8,
    "_thnn_fused_lstm_cell": 3,
    "_thnn_fused_lstm_cell_backward_impl": 6,
    "_thnn_fused_gru_cell": 3,
    "_thnn_fused_gru_cell_backward": 6,
}
_BY_OUTPUT_PASSES = {"upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d"}
_POOLS = {"avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices"}
_POOLS |= {"max_pool3d_with_indices", "max_pool2d", "mkldnn_max_pool2d", "quantized_max_pool2d"}
# Operators that take rows of their first input and leave the rest of it alone.
TAKES_ROWS = {"embedding", "index_select", "index", "gather", "_embedding_bag", "take"}
TAKES_ROWS |= {"_embedding_bag_forward_only"}
# Scales and shifts that a plan folds into the convolution before them.
FOLDED = {name for name in _PASSES if "batch_norm" in name}
# Bookkeeping of torch itself, which no one wrote and nothing runs.
UNSEEN = {"detach", "alias", "lift", "lift_fresh", "empty", "empty_like", "empty_strided"}
UNSEEN |= {"new_empty", "new_empty_strided", "empty_permuted", "set", "resize"}
# In-place operators that overwrite their target without reading it.
OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_"}


# The tag is younger than the oldest torch that is supported.
_REDUCTION = getattr(torch.Tag, "reduction", None)


def base_name(func: torch._ops.OpOverload) -> str:
    """ATen name without namespace, overload and in-place mark: "add" for `aten::add_.Tensor`."""
    name = func._schema.name.partition("::")[2]
    return name.removesuffix("_") if name.endswith("_") and not name.endswith("__") else name


def is_free(func: torch._ops.OpOverload, name: str) -> bool:
    """Whether the operator moves no data: views, allocation, questions about shapes."""
    return bool(func.is_view) or name in _FREE


def known(func: torch._ops.OpOverload, name: str) -> bool:
    """Whether there is a count for the operator, so that it need not be taken apart."""
    return (
        is_free(func, name)
        or name in _MOVES
        or name in _BY_INPUT
        or name in _BY_OUTPUT
        or name in _PASSES
        or name in _POOLS
        or name in _LIBRARY
        or torch.Tag.pointwise in func.tags
        or _REDUCTION in func.tags
    )


def operations(
    func: torch._ops.OpOverload, name: str, arguments: dict[str, Any], outputs: list[torch.Tensor]
) -> int | None:
    """Operations of one call, or None where no rule covers the operator.

    Args:
        func: The operator.
        name: Its `base_name`.
        arguments: Its arguments by the schema's names.
        outputs: The tensors that it made.
    """
    out_elements = max((out.numel() for out in outputs), default=0)
    in_elements = max((x.numel() for x in _tensors(arguments.values())), default=0)
    if is_free(func, name) or name in _MOVES:
        return 0
    if name in _LIBRARY:
        return _LIBRARY[name](arguments, out_elements)
    if name in _POOLS:
        return out_elements * prod(int(k) for k in _as_list(arguments["kernel_size"]))
    if name in _PASSES:
        return _passes(name, arguments, in_elements, out_elements)
    by_input = name in _BY_INPUT or _REDUCTION in func.tags
    if by_input or name in _BY_OUTPUT or torch.Tag.pointwise in func.tags:
        return in_elements if by_input else out_elements
    return None


def _passes(name: str, arguments: dict[str, Any], in_elements: int, out_elements: int) -> int:
    if "batch_norm" in name and arguments.get("training") is False:
        return 2 * in_elements  # one scale and one shift
    by_output = name.removesuffix("_aa").lstrip("_") in _BY_OUTPUT_PASSES or "grid" in name
    return _PASSES[name] * (out_elements if by_output else in_elements)


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, torch.Tensor)]
    return found


def _as_list(value: Any) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _matrices(x: torch.Tensor) -> tuple[int, int]:
    """How many square matrices [..., N, N] hold, and N."""
    return prod(x.shape[:-2]), int(x.shape[-1])


def _fourier(arguments: dict[str, Any], out_elements: int) -> int:
    """5 N log2 N per complex transform of N points (Cooley-Tukey), half of it for real data."""
    x = arguments["self"]
    elements = max(x.numel(), out_elements)
    points = prod(int(x.shape[d]) for d in arguments["dim"])
    factor = 5.0 if x.is_complex() else 2.5
    return int(factor * elements * log2(max(points, 2)))


def _distances(arguments: dict[str, Any], out_elements: int) -> int:
    """A difference, a power and a sum for each pair of rows and each of their elements."""
    return 3 * out_elements * int(arguments["x1"].shape[-1])


def _cholesky(arguments: dict[str, Any], out_elements: int) -> int:
    count, n = _matrices(arguments["self"])
    return count * n**3 // 3  # Golub and Van Loan, Matrix Computations, 4.2


def _inverse(arguments: dict[str, Any], out_elements: int) -> int:
    count, n = _matrices(arguments["A"])
    return 2 * count * n**3  # LU and n solutions, ibid. 3.2


def _factorise(arguments: dict[str, Any], out_elements: int) -> int:
    count, n = _matrices(arguments["A"])
    return 2 * count * n**3 // 3  # ibid. 3.2


def _solve(arguments: dict[str, Any], out_elements: int) -> int:
    count, n = _matrices(arguments["A"])
    return 2 * count * n**3 // 3 + 2 * n * out_elements  # ibid. 3.2


def _solve_triangular(arguments: dict[str, Any], out_elements: int) -> int:
    x = arguments["A"] if "A" in arguments else arguments["self"]
    return int(x.shape[-1]) * out_elements  # ibid. 3.1


_LIBRARY = {
    "_fft_r2c": _fourier,
    "_fft_c2c": _fourier,
    "_fft_c2r": _fourier,
    "_cdist_forward": _distances,
    "linalg_cholesky_ex": _cholesky,
    "cholesky": _cholesky,
    "linalg_inv_ex": _inverse,
    "linalg_lu_factor_ex": _factorise,
    "linalg_lu": _factorise,
    "_linalg_solve_ex": _solve,
    "linalg_solve_triangular": _solve_triangular,
    "triangular_solve": _solve_triangular,
}
