"""Products of bfloat16 matrices on CPUs with tiles for them (Intel's AMX), by PyTorch's oneDNN.

XLA for CPUs computes such products in float32, at a tenth of what the tiles do. PyTorch, which is
here anyway, has a product that uses them; this makes it a foreign function of XLA's that reads and
writes XLA's own memory. The structures are those of xla/ffi/api/c_api.h, of which no header needs a
compiler here: ctypes calls from C, too.
"""

import ctypes
import math
import re
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from magnet_jax.io.torch_env import import_torch

_VERSION = (0, 3)  # of the interface below
_BFLOAT16, _METADATA, _EXECUTE, _INTERNAL = 16, 1, 3, 13  # enumerators of the header
# Products [M, C] x [C, N] by name: whether the first, the second factor lies transposed.
_PRODUCTS = {"plain": (False, False), "second": (False, True), "first": (True, False)}


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    """A structure of the header: its size and a chain of extensions come first."""
    first = [("struct_size", ctypes.c_size_t), ("extensions", ctypes.c_void_p)]
    return type(name, (ctypes.Structure,), {"_fields_": [*first, *fields.items()]})


_Buffer = _structure(
    "XLA_FFI_Buffer",
    dtype=ctypes.c_int,
    data=ctypes.c_void_p,
    rank=ctypes.c_int64,
    dims=ctypes.POINTER(ctypes.c_int64),
)
_Buffers = _structure(
    "XLA_FFI_Args",  # and XLA_FFI_Rets
    size=ctypes.c_int64,
    types=ctypes.c_void_p,
    buffers=ctypes.POINTER(ctypes.POINTER(_Buffer)),
)
_Version = _structure("XLA_FFI_Api_Version", major=ctypes.c_int, minor=ctypes.c_int)
_Complaint = _structure("XLA_FFI_Error_Create_Args", message=ctypes.c_char_p, code=ctypes.c_int)
_Api = _structure(
    "XLA_FFI_Api",
    version=_Version,
    internal=ctypes.c_void_p,
    create_error=ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Complaint)),
)
_Call = _structure(
    "XLA_FFI_CallFrame",
    api=ctypes.POINTER(_Api),
    context=ctypes.c_void_p,
    stage=ctypes.c_int,
    args=_Buffers,
    rets=_Buffers,
)


class _Metadata(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("version", _Version)]


class _Extension(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(_Metadata)),  # of the one type there is
    ]


_Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Call))


def use_synchronous_dispatch() -> None:
    """To be called before JAX starts: programs then run in the thread that calls them.

    A program in a thread of XLA's would wait for Python for ever where Python ends meanwhile.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def hindrance() -> str | None:
    """Why `matmul` cannot be used in this process; None if it can."""
    processors = Path("/proc/cpuinfo")
    if not processors.exists() or "amx_bf16" not in processors.read_text():
        return "this machine's CPUs have no AMX (amx_bf16 in /proc/cpuinfo)"
    header = Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    text = header.read_text() if header.exists() else ""
    version = tuple(map(int, re.findall(r"#define XLA_FFI_API_M\w+ (\d+)", text)))
    if version != _VERSION:
        return f"this JAX calls foreign functions in another way ({version}, not {_VERSION})"
    if jax.config.read("jax_cpu_enable_async_dispatch"):
        return (
            "programs must run in the thread that calls them: set JAX_CPU_ENABLE_ASYNC_DISPATCH to "
            "false in the environment"
        )
    return None


def _tensor(buffer: _Buffer) -> Any:
    """A view of XLA's memory."""
    torch = import_torch()
    if buffer.dtype != _BFLOAT16:
        raise TypeError(f"a factor or result of type {buffer.dtype}, not bfloat16")
    shape = buffer.dims[: buffer.rank]
    memory = (ctypes.c_char * (2 * math.prod(shape))).from_address(buffer.data)
    return torch.frombuffer(memory, dtype=torch.bfloat16).view(shape)


def _handler(turn_first: bool, turn_second: bool) -> Any:
    """What XLA calls for one of the products."""
    torch = import_torch()

    def multiply(call: Any) -> None:
        first, second = (_tensor(call.args.buffers[i].contents) for i in range(2))
        first = first.T if turn_first else first
        second = second.T if turn_second else second
        torch.mm(first, second, out=_tensor(call.rets.buffers[0].contents))

    def handle(pointer: Any) -> int | None:
        call = pointer.contents
        try:
            if call.extensions:
                extension = _Extension.from_address(call.extensions)
                if extension.type == _METADATA:
                    version = extension.metadata.contents.version
                    version.major, version.minor = _VERSION
                    return None
            if call.stage == _EXECUTE:
                multiply(call)
            return None
        # C has no exceptions, and reads what is returned. (An interrupt is no other case: one of
        # Python's, asked for again from here, would be raised here, and lost.)
        except BaseException as error:
            message = f"amx: {error!r}".encode(errors="replace")
            complaint = _Complaint(ctypes.sizeof(_Complaint), None, message, _INTERNAL)
            return call.api.contents.create_error(ctypes.byref(complaint))

    return _Handler(handle)


_handlers: dict[str, Any] = {}  # kept, as XLA calls them until the process ends
_registering = threading.Lock()


def _register() -> None:
    """Makes the products known to XLA, once."""
    with _registering:
        for name, turned in _PRODUCTS.items():
            if name not in _handlers:
                _handlers[name] = _handler(*turned)
                capsule = jax.ffi.pycapsule(_handlers[name])
                jax.ffi.register_ffi_target(f"magnet_jax_amx_{name}", capsule, platform="cpu")


def _product(name: str, first: jax.Array, second: jax.Array) -> jax.Array:
    if (first.dtype, second.dtype) != (jnp.bfloat16, jnp.bfloat16):
        raise TypeError(f"amx multiplies bfloat16, not {first.dtype} by {second.dtype}")
    rows, columns = _PRODUCTS[name]
    shape = (first.shape[1 if rows else 0], second.shape[0 if columns else 1])
    if 0 in first.shape + second.shape:
        return jnp.zeros(shape, jnp.bfloat16)
    _register()
    result = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return jax.ffi.ffi_call(f"magnet_jax_amx_{name}", result)(first, second)


@jax.custom_vjp
def matmul(first_MC: jax.Array, second_CN: jax.Array) -> jax.Array:
    """[M, N] bfloat16, summed in float32 and rounded once, where there is no `hindrance`.

    For programs of one device: XLA cannot split it.
    """
    return _product("plain", first_MC, second_CN)


def _forward(first_MC: jax.Array, second_CN: jax.Array) -> tuple[jax.Array, tuple]:
    return matmul(first_MC, second_CN), (first_MC, second_CN)


def _backward(factors: tuple, gradient_MN: jax.Array) -> tuple[jax.Array, jax.Array]:
    first_MC, second_CN = factors
    return (
        _product("second", gradient_MN, second_CN),
        _product("first", first_MC, gradient_MN),
    )


matmul.defvjp(_forward, _backward)
