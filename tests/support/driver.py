"""Launching a kernel's PTX through NVIDIA's driver, as TensorRT does it."""

import ctypes

import torch


def launch(built, inputs, out):
    """Run what `fake_tensorrt.build_layer` built, on the current stream, and wait for it."""
    driver = ctypes.CDLL("libcuda.so.1")
    torch.cuda.synchronize()  # PyTorch's context is the current one from here on
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(driver, driver.cuModuleLoadData(ctypes.byref(module), built.ptx.encode() + b"\0"))
    try:
        name = built.name.encode()
        _check(driver, driver.cuModuleGetFunction(ctypes.byref(function), module, name))
        values = [
            *(ctypes.c_uint64(tensor.data_ptr()) for tensor in inputs),
            *(ctypes.c_int32(number) for number in built.integers),
            ctypes.c_uint64(out.data_ptr()),
        ]
        addresses = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in values)
        )
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check(
            driver,
            driver.cuLaunchKernel(
                function, *built.grid, *built.block, built.shared_bytes, stream, addresses, None
            ),
        )
        torch.cuda.synchronize()
    finally:
        _check(driver, driver.cuModuleUnload(module))


def _check(driver, status):
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"the driver must accept a kernel, and says {text.value}")
