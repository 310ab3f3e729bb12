"""Triton's interpreter, which runs kernels on the CPU: in a subprocess, since it is chosen when triton is imported.

    python tests/interpreter.py SCRIPT [ARGUMENTS]      python tests/interpreter.py -c CODE

runs a script in it, with 16-bit floating-point numbers (:func:`hold_bf16_as_fp32`).
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def in_interpreter(*arguments: str) -> str:
    """Output of Python with ``arguments`` under the interpreter; skips the test where triton is not installed."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    call = [sys.executable, __file__, *arguments]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
    return done.stdout + done.stderr


def hold_bf16_as_fp32() -> None:
    """Make the interpreter compute with bf16.

    It has bf16 numbers as their bits, whole numbers, so that every sum and product of them is wrong, and it cuts digits
    off where the device rounds to nearest. Here they are fp32 numbers that bf16 can represent: rounded wherever a value
    of that type arises, and stored as 16 bits. Products in a dot are exact, as on the device. The device's other
    precision of fp32 products, bf16x3, is accepted and computed as fp32.
    """
    import dataclasses

    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    init, np_dtype, fits = handle.__init__, interpreter._get_np_dtype, interpreter._validate_np_data_size
    load, store, absolute = builder.create_masked_load, builder.create_masked_store, builder.create_fabs
    cast, convert, bitcast = builder.cast_impl, builder.create_fp_to_fp, builder.create_bitcast

    def tensor(data: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(data, dtype=np.float32)).bfloat16()

    def bits(data: Any) -> Any:
        return tensor(data).view(torch.uint16).numpy()

    def values(stored: Any) -> Any:
        return torch.from_numpy(np.array(stored, dtype=np.uint16)).view(torch.bfloat16).float().numpy()

    def is_bf16(x: Any) -> bool:
        return x.scalar == tl.bfloat16

    def init_rounded(self: Any, data: Any, dtype: Any, *args: Any, **kwargs: Any) -> None:
        init(self, tensor(data).float().numpy() if is_bf16(dtype) else data, dtype, *args, **kwargs)

    def load_16_bits(self: Any, ptrs: Any, mask: Any, other: Any, *options: Any) -> Any:
        if ptrs.get_element_ty() != tl.bfloat16:
            return load(self, ptrs, mask, other, *options)
        rest = bits(np.zeros(ptrs.data.shape) if other is None else np.broadcast_to(other.data, ptrs.data.shape))
        stored = interpreter._interpreter.load(ptrs.data, mask.data, rest, np.dtype(np.uint16))
        return handle(values(stored), tl.bfloat16)

    def store_16_bits(self: Any, ptrs: Any, value: Any, mask: Any, *options: Any) -> Any:
        if not is_bf16(value.dtype):
            return store(self, ptrs, value, mask, *options)
        return interpreter._interpreter.store(ptrs.data, bits(value.data), mask.data)

    def cast_numbers(self: Any, src: Any, dst_type: Any) -> Any:
        if is_bf16(src.dtype) or is_bf16(dst_type):
            return handle(src.data.astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)
        return cast(self, src, dst_type)

    def convert_numbers(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        is_either = is_bf16(src.dtype) or is_bf16(dst_type)
        return cast_numbers(self, src, dst_type) if is_either else convert(self, src, dst_type, rounding_mode)

    def bitcast_16_bits(self: Any, src: Any, dst_type: Any) -> Any:
        if is_bf16(src.dtype):
            src = handle(bits(src.data), tl.uint16)
        if is_bf16(dst_type):
            return handle(values(src.data.view(np.uint16)), tl.bfloat16)
        return bitcast(self, src, dst_type)

    def absolute_number(self: Any, arg: Any) -> Any:
        return handle(np.abs(arg.data), tl.bfloat16) if is_bf16(arg.dtype) else absolute(self, arg)

    interpreter._get_np_dtype = lambda dtype: np.dtype(np.float32) if is_bf16(dtype) else np_dtype(dtype)
    interpreter._validate_np_data_size = lambda data, dtype: (
        data.dtype == np.float32 if is_bf16(dtype) else fits(data, dtype)
    )
    handle.__init__ = init_rounded
    builder.create_masked_load, builder.create_masked_store = load_16_bits, store_16_bits
    builder.cast_impl, builder.create_fp_to_fp = cast_numbers, convert_numbers
    builder.create_bitcast, builder.create_fabs = bitcast_16_bits, absolute_number
    options = interpreter.interpreter_builder.options
    precisions = (*options.allowed_dot_input_precisions, "bf16x3")
    interpreter.interpreter_builder.options = dataclasses.replace(options, allowed_dot_input_precisions=precisions)


if __name__ == "__main__":
    hold_bf16_as_fp32()
    sys.argv.pop(0)
    if sys.argv[0] == "-c":
        exec(compile(sys.argv.pop(1), "-c", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))  # as Python does, for modules beside the script
        runpy.run_path(sys.argv[0], run_name="__main__")
