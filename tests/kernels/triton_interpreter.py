"""Run the Triton kernels on the CPU: Triton's interpreter on numpy arrays, in a process of its own.

Triton decides while it is imported whether kernels are interpreted, so the process is started with
TRITON_INTERPRET=1. There `launch` calls back from the compiled program. Neither a GPU nor
jax-triton nor torch is needed, and all that surrounds the kernels, the op's derivative too, is as
it is.

The interpreter keeps bf16 as uint16; it multiplies such operands as integers and cuts digits off
where a device rounds. Both are mended here, and that numpy 2.5 takes no array for an index. It also
patches the language anew at every call of a function, which takes most of its time: once is enough.
"""

import contextlib
import importlib
import multiprocessing
import os
import types
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

PACKAGE = "pallas_kernels.gated_delta_rule"
# The modules that call kernels.
LAUNCHING = ("prepare", "recurrence", "sweep", "gradients", "step_kernel")
TYPES = {"bfloat16": "bf16", "float32": "fp32"}


@contextlib.contextmanager
def worker():
    """An executor in whose one process kernels are interpreted."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_start) as pool:
        yield pool


def _start():
    os.environ["TRITON_INTERPRET"] = "1"
    jax.config.update("jax_platforms", "cpu")
    _mend_interpreter()
    importlib.import_module(f"{PACKAGE}.triton_gpu_launch").jax_triton = lambda: None
    for name in LAUNCHING:
        importlib.import_module(f"{PACKAGE}.triton_gpu_{name}").launch = launch


def _mend_interpreter():
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot, cast, patch_tensor = builder.create_dot, builder.cast_impl, interpreter._patch_lang_tensor
    patch_language, patched = interpreter._patch_lang, set()
    scope = types.SimpleNamespace(restore=lambda: None)

    def cast_impl(self, x, target):
        source, target = x.dtype.scalar, target.scalar
        if (source, target) == (tl.float32, tl.bfloat16):
            data = x.data.astype(jnp.bfloat16).view(np.uint16)
        elif (source, target) == (tl.bfloat16, tl.float32):
            data = x.data.view(jnp.bfloat16).astype(np.float32)
        else:
            return cast(self, x, target)
        return interpreter.TensorHandle(data, target)

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def patch_lang(function):
        known = function.__globals__.values()
        languages = frozenset(x.__name__ for x in known if x is tl or x is tl.core)
        if languages not in patched:
            patched.add(languages)
            patch_language(function)
        return scope

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    interpreter._patch_lang, interpreter._patch_lang_tensor = patch_lang, patch_lang_tensor
    # Arguments are in host memory already.
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    interpreter.GridExecutor._restore_args_dev = lambda self, *_: None


class _Pointer:
    """What Triton takes for an array."""

    def __init__(self, array):
        self.array, self.dtype = array, TYPES[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data


def launch(kernel, operands, outputs, grid, warps, aliases=None, **constants):
    """`triton_gpu_launch.launch` for the interpreter."""
    del warps, aliases
    constants.pop("stages", None)
    several = isinstance(outputs, tuple)
    outputs = outputs if several else (outputs,)
    numbers = {i: x for i, x in enumerate(operands) if isinstance(x, int)}
    arrays = [x for i, x in enumerate(operands) if i not in numbers]

    def run(*arrays):
        read = [np.ascontiguousarray(x) for x in arrays]
        written = [np.full(x.shape, np.nan, x.dtype) for x in outputs]
        pointers = [_Pointer(x) for x in (*read, *written)]
        for i, number in numbers.items():
            pointers.insert(i, number)
        kernel[grid](*pointers, **constants)
        return tuple(written)

    results = jax.pure_callback(run, outputs, *arrays)
    return results if several else results[0]
