"""The operators that a stored program may name, and the check of how it calls them.

A program folder may come from anybody, and torch has operators that write files, read memory out of
bounds or mutate tensors as no captured model does. So the names are a fixed list: the operators
that `torch.export` leaves in the graphs of models, and those that the passes of this package add.
"""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qalora_compile.errors import UnsupportedError
from qalora_compile.ir.torch_internals import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    schema_of,
)

_ATEN_NAMES = """
__and__ __lshift__ __or__ __rshift__ __xor__ _assert_async _assert_scalar _assert_tensor_metadata
_cdist_forward _conj_physical _embedding_bag _fft_c2c _fft_c2r _fft_r2c _grouped_mm _is_all_true
_is_any_true _local_scalar_dense _log_softmax _native_batch_norm_legit
_native_batch_norm_legit_no_training _native_multi_head_attention _prelu_kernel _safe_softmax
_scaled_dot_product_flash_attention_for_cpu _shape_as_tensor _softmax _to_copy _unique2
_unsafe_index _unsafe_index_put _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa
_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm abs
abs_ absolute acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d add add_ addbmm addcdiv addcdiv_
addcmul addcmul_ addmm addmm_ addmv addr affine_grid_generator alias all alpha_dropout
alpha_dropout_ amax amin aminmax angle any arange arccos arccosh arcsin arcsinh arctan arctan2
arctanh argmax argmin argsort as_strided asin asinh atan atan2 atan2_ atanh avg_pool1d avg_pool2d
avg_pool3d baddbmm bartlett_window batch_norm bernoulli bernoulli_ bilinear binary_cross_entropy
binary_cross_entropy_with_logits bitwise_and bitwise_and_ bitwise_left_shift bitwise_not
bitwise_not_ bitwise_or bitwise_or_ bitwise_right_shift bitwise_xor blackman_window block_diag bmm
broadcast_tensors broadcast_to bucketize cartesian_prod cat cdist ceil ceil_ celu celu_
chain_matmul channel_shuffle chunk clamp clamp_ clamp_max clamp_max_ clamp_min clamp_min_ clip
clone col2im column_stack combinations complex concat concatenate conj_physical constant_pad_nd
contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution
copy copy_ copysign corrcoef cos cos_ cosh cosine_similarity count_nonzero cov cross
cross_entropy_loss cummax cummin cumprod cumsum cumsum_ deg2rad det detach detach_ diag diag_embed
diagonal diagonal_copy diagonal_scatter diff digamma dist div div_ divide dot dropout dropout_
dstack einsum elu elu_ embedding embedding_bag empty empty_like empty_strided eq eq_ erf erf_ erfc
erfinv exp exp2 exp_ expand expand_as expm1 exponential_ eye feature_alpha_dropout feature_dropout
feature_dropout_ fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_hfft fft_ifft fft_ifft2
fft_ifftn fft_ifftshift fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn
fill fill_ fill_diagonal_ fix flatten flip fliplr flipud float_power floor floor_ floor_divide
floor_divide_ fmax fmin fmod fmod_ frac frexp full full_like gather gcd ge ge_ gelu gelu_ glu
greater greater_equal grid_sampler grid_sampler_2d grid_sampler_3d group_norm gru gru_cell gt gt_
hamming_window hann_window hardshrink hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh
hardtanh_ heaviside histc hsplit hstack huber_loss hypot i0 igamma igammac im2col imag index
index_add index_add_ index_copy index_copy_ index_fill index_fill_ index_put index_put_
index_select inner instance_norm inverse is_nonzero isclose isfinite isin isinf isnan isneginf
isposinf isreal istft item kl_div kron kthvalue l1_loss layer_norm lcm ldexp le le_ leaky_relu
leaky_relu_ lerp lerp_ less less_equal lgamma lift_fresh lift_fresh_copy linalg_cholesky
linalg_cross linalg_det linalg_eigh linalg_inv linalg_matrix_norm linalg_norm linalg_pinv
linalg_qr linalg_solve linalg_svd linalg_vector_norm linear linspace log log10 log1p log2 log_
log_sigmoid log_softmax logaddexp logaddexp2 logcumsumexp logical_and logical_and_ logical_not
logical_not_ logical_or logical_or_ logical_xor logit logspace logsumexp lstm lstm_cell lt lt_ mH
mT masked_fill masked_fill_ masked_scatter masked_scatter_ masked_select matmul matrix_exp
matrix_power max max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d
max_pool3d_with_indices maximum mean median meshgrid min minimum mish mish_ mm mode moveaxis
movedim mse_loss mul mul_ multinomial multiply mv mvlgamma nan_to_num nan_to_num_ nanmean
nanmedian nanquantile nansum narrow narrow_copy native_batch_norm native_dropout native_group_norm
native_layer_norm ne ne_ neg neg_ negative new_empty new_full new_ones new_zeros nextafter
nll_loss nll_loss2d nll_loss_nd nonzero norm normal normal_ not_equal nuclear_norm numpy_T one_hot
ones ones_like outer pad pairwise_distance pdist permute pinverse pixel_shuffle pixel_unshuffle
poisson polar polygamma positive pow pow_ prelu prod put quantile rad2deg rand rand_like randint
randint_like randn randn_like randperm range ravel real reciprocal reciprocal_ reflection_pad1d
reflection_pad2d reflection_pad3d relu relu6 relu6_ relu_ remainder remainder_ renorm repeat
repeat_interleave replication_pad2d replication_pad3d reshape reshape_as resolve_conj resolve_neg
rms_norm rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell roll rot90 round round_ row_stack rrelu
rrelu_ rsqrt rsqrt_ rsub scalar_tensor scaled_dot_product_attention scatter scatter_ scatter_add
scatter_add_ scatter_reduce scatter_reduce_ searchsorted select select_scatter selu selu_ sgn
sigmoid sigmoid_ sign sign_ signbit silu silu_ sin sin_ sinc sinh slice slice_scatter
smooth_l1_loss soft_margin_loss softmax softplus softshrink sort special_airy_ai special_bessel_j0
special_bessel_j1 special_bessel_y0 special_bessel_y1 special_chebyshev_polynomial_t
special_chebyshev_polynomial_u special_chebyshev_polynomial_v special_chebyshev_polynomial_w
special_digamma special_entr special_erf special_erfc special_erfcx special_erfinv special_exp2
special_expit special_expm1 special_gammaln special_hermite_polynomial_h
special_hermite_polynomial_he special_i0 special_i0e special_i1 special_i1e
special_laguerre_polynomial_l special_legendre_polynomial_p special_log1p special_log_ndtr
special_log_softmax special_logit special_logsumexp special_modified_bessel_i0
special_modified_bessel_i1 special_modified_bessel_k0 special_modified_bessel_k1
special_multigammaln special_ndtr special_ndtri special_polygamma special_psi special_round
special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1
special_shifted_chebyshev_polynomial_t special_shifted_chebyshev_polynomial_u
special_shifted_chebyshev_polynomial_v special_shifted_chebyshev_polynomial_w special_sinc
special_softmax special_spherical_bessel_j0 special_xlog1py special_xlogy special_zeta split
split_with_sizes sqrt sqrt_ square squeeze squeeze_ stack std std_mean stft sub sub_ subtract sum
sum_to_size swapaxes swapdims sym_constrain_range sym_constrain_range_for_size sym_numel sym_size
sym_storage_offset sym_stride t t_ take take_along_dim tan tanh tanh_ tensor_split tensordot
threshold threshold_ tile to topk trace transpose transpose_ triangular_solve tril tril_
tril_indices triplet_margin_loss triu triu_ triu_indices true_divide trunc trunc_ type_as unbind
unflatten unfold uniform_ unique_consecutive unique_dim unsafe_chunk unsafe_split
unsafe_split_with_sizes unsqueeze unsqueeze_ upsample_bicubic2d upsample_bilinear2d
upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
vander var var_mean vdot view view_as view_as_complex view_as_real vsplit vstack where xlogy zero_
zeros zeros_like
"""
_ATEN = frozenset(_ATEN_NAMES.split())
_OWN = "qalora"
_OTHERS = {"transformers.grouped_mm_fallback.default": "transformers.integrations.moe"}
"""Operators of a library, and the module of it that registers them."""
_HIGHER_ORDER = frozenset(
    {"cond", "map_impl", "scan", "while_loop", "wrap_with_autocast", "wrap_with_set_grad_enabled"}
)
_OPERATOR_NAMES = """
abs add and_ eq floordiv ge getitem gt invert le lshift lt mod mul ne neg not_ or_ pos pow rshift
sub truediv xor
"""
_MATH_NAMES = """
acos asin atan ceil cos cosh exp fabs floor log log10 log2 pow sin sinh sqrt tan tanh trunc
"""
_SYM_NAMES = """
sym_float sym_fresh_size sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum
"""
_PLAIN = {
    "_operator": (operator, frozenset(_OPERATOR_NAMES.split())),
    "operator": (operator, frozenset(_OPERATOR_NAMES.split())),
    "math": (math, frozenset(_MATH_NAMES.split())),
    "torch": (torch, frozenset(_SYM_NAMES.split())),
}
_GROWING = ("pow", "lshift")
_MAX_EXPONENT = 64
"""Limit of integer powers: a power of a power of sizes could take forever."""
_CONSTANTS: dict[str, tuple[type, ...]] = {
    "Tensor": (float, int),  # torch converts a number to a tensor
    "int": (int,),
    "bool": (bool,),
    "float": (float, int),
    "number": (float, int),
    "complex": (float, int),
    "str": (str,),
    "ScalarType": (torch.dtype,),
    "Layout": (torch.layout,),
    "MemoryFormat": (torch.memory_format,),
    "Device": (torch.device,),
}
"""Types of an operator's schema, and the constants that a graph may hold for them."""
_NEVER_COMPUTED = ("str", "ScalarType", "Layout", "MemoryFormat", "Device")

_trusted: set[str] = set()


def trust_operators(*names: str) -> None:
    """Let stored programs name operators of your own, in this process.

    Args:
        names: Qualified names with the overload, such as `mylib.my_norm.default`. The code that
            registers them has to be imported before a program is read.
    """
    _trusted.update(names)


def operator_text(target: Any, where: str) -> str:
    """The stored name of what a node calls; `find_operator` undoes it.

    Raises:
        UnsupportedError: it is not an operator that a stored program may name.
    """
    if isinstance(target, OpOverload):
        text = str(target)
    elif isinstance(target, HigherOrderOperator):
        text = f"higher_order.{target.name()}"
    else:
        text = f"{getattr(target, '__module__', '?')}.{getattr(target, '__name__', '?')}"
    try:
        found = find_operator(text)
    except ValueError:
        found = None
    if found is target:
        return text
    raise UnsupportedError(
        f"{text} has no stored form: it is none of the operators that a program folder may hold",
        where=where,
        hint="an operator of your own: call qalora_compile.ir.operators.trust_operators(name) "
        "before saving and before loading",
    )


def find_operator(text: str) -> Callable[..., Any]:
    """The operator of a stored name. Nothing outside the fixed list is looked up.

    Raises:
        ValueError: the name is not on the list, or this torch has no such operator.
    """
    namespace, _, rest = text.partition(".")
    if namespace in _PLAIN:
        module, names = _PLAIN[namespace]
        function: Callable[..., Any] | None = getattr(module, rest, None) if rest in names else None
    elif namespace == "higher_order":
        function = getattr(torch.ops.higher_order, rest, None) if rest in _HIGHER_ORDER else None
    else:
        function = _overload(text)
    if function is None:
        raise ValueError(f"{text!r} is none of the operators that a stored program may call")
    return function


def _overload(text: str) -> OpOverload | None:
    namespace, _, rest = text.partition(".")
    name, _, overload = rest.partition(".")
    if text in _OTHERS:
        _register(text, _OTHERS[text])
    elif not (text in _trusted or namespace == _OWN or (namespace == "aten" and name in _ATEN)):
        return None
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if not isinstance(packet, OpOverloadPacket) or overload not in packet.overloads():
        return None
    found: OpOverload = getattr(packet, overload)
    return None if any(argument.is_out for argument in schema_of(found).arguments) else found


def _register(text: str, module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UnsupportedError(
            f"the program calls {text}, which comes with {module}",
            hint="pip install 'qalora-compile[hf]'",
        ) from error


def check_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compare the arguments of a node with the schema of the operator that it calls.

    Raises:
        ValueError: an argument is missing, unknown, given twice, or a constant of another type.
    """
    if isinstance(target, HigherOrderOperator):
        return
    if not isinstance(target, OpOverload):
        _check_plain(target, args, kwargs)
        return
    schema = schema_of(target).arguments
    positional = [a for a in schema if not a.kwarg_only]
    if len(args) > len(positional):
        raise ValueError(f"{target} takes {len(positional)} positional arguments, not {len(args)}")
    given = dict(zip((a.name for a in positional), args, strict=False))
    twice = given.keys() & kwargs.keys()
    unknown = kwargs.keys() - {a.name for a in schema}
    if twice or unknown:
        raise ValueError(f"{target} is given {sorted(twice | unknown)[0]!r}, unknown or twice")
    given |= kwargs
    for argument in schema:
        if argument.name not in given:
            if not argument.has_default_value():
                raise ValueError(f"{target} lacks its argument {argument.name}")
        elif not _fits(str(argument.real_type), given[argument.name]):
            raise ValueError(
                f"the argument {argument.name} of {target} is {given[argument.name]!r}, "
                f"no {argument.real_type}"
            )


def _fits(kind: str, value: Any) -> bool:
    """Whether a constant, or a node, may stand for an argument of a type."""
    if kind.startswith("Optional["):
        return value is None or _fits(kind[9:-1], value)
    if isinstance(value, fx.Node):
        return kind not in _NEVER_COMPUTED
    if kind.startswith("List["):
        inner = kind[5:-1]
        if isinstance(value, (list, tuple)):
            return all(_fits(inner, item) for item in value)
        return _fits(inner, value)  # one number stands for all axes of a window
    if isinstance(value, bool) and kind in ("int", "float"):
        return False
    return isinstance(value, _CONSTANTS.get(kind, ()))


def _check_plain(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Functions of Python take nodes and numbers by position; `getitem` takes slices too."""
    name = target.__name__
    if kwargs or not args:
        raise ValueError(f"{name} takes positional arguments")
    if name in _GROWING and len(args) > 1:
        _, power, *_ = args
        if isinstance(power, int) and power > _MAX_EXPONENT:
            raise ValueError(f"{name} with {power} is larger than any size")
