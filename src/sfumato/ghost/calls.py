"""Names of torch calls: what only looks at a tensor, what takes a value out of it, what decides."""

from collections.abc import Callable
from typing import Any

METADATA = set(
    "shape dtype device ndim requires_grad is_leaf grad_fn layout is_cuda grad names itemsize nbytes is_sparse is_meta "
    "is_quantized is_nested is_mkldnn is_cpu size dim numel stride is_floating_point is_complex element_size "
    "storage_offset is_contiguous get_device data_ptr untyped_storage nelement ndimension is_inference is_conj is_neg "
    "retain_grad _version output_nr is_shared __len__ __repr__ "
    "__hash__ is_same_size _is_view is_signed __contains__ "
    "register_post_accumulate_grad_hook _backward_hooks is_mps is_xpu volatile name".split()
)
DECISIONS = {"__bool__", "is_nonzero", "equal", "allclose"}
ESCAPES = {"item", "tolist", "numpy", "__float__", "__array__", "__complex__", "__int__", "__index__", "__format__"}


def name_of(func: Callable[..., Any]) -> str:
    """What a call is named, attributes included."""
    name = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", "") if name == "__get__" else name  # type: ignore[attr-defined]
