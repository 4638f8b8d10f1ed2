"""The types in which layers compute: autocast's; routers, their losses and the mix of residual layers in at least fp32."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


def computing_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a network is applied to `x`: autocast's if it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def cast_by_autocast(x: Tensor) -> Tensor:
    """Cast to autocast's dtype if it is on: once, instead of a cast and a copy for each matrix."""
    return x.to(computing_dtype(x))


def without_autocast(device_type: str) -> AbstractContextManager:
    """Return a context without autocast; a null context if it is off, which costs less."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


@contextmanager
def fp32_products() -> Iterator[None]:
    """Compute products of fp32 matrices in fp32, also where `torch.set_float32_matmul_precision` allows TF32 or bf16.

    The setting is the process's: it is restored before the other products and the backward pass, which follow it.
    """
    allowed = _allowed()
    if allowed == "highest":
        yield
        return
    _allow("highest" if isinstance(allowed, str) else ["ieee"] * len(BACKENDS))
    try:
        yield
    finally:
        _allow(allowed)


def _allowed() -> str | list[str]:
    """Return the process's setting, or one for each of `BACKENDS` if a script has set theirs: PyTorch refuses to mix them."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return [backend.fp32_precision for backend in BACKENDS]


def _allow(precision: str | list[str]) -> None:
    if isinstance(precision, str):
        torch.set_float32_matmul_precision(precision)
    else:
        for backend, value in zip(BACKENDS, precision, strict=True):
            backend.fp32_precision = value


def allows_tf32() -> bool:
    """Return True if a GPU may compute products of fp32 matrices in TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
