"""Which GPUs this process sees, asked of NVIDIA's driver itself: without torch, and without opening one."""

import ctypes
from dataclasses import dataclass

MAJOR, MINOR = 75, 76
"""CUdevice_attribute: compute capability."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU.

    Args:
        name: as its maker says it.
        capability: compute capability, (major, minor).
        num_bytes: of its memory.
    """

    name: str
    capability: tuple[int, int]
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Driver:
    """What the driver tells.

    Args:
        cuda: newest version of CUDA that it runs, (major, minor); (0, 0) where there is no driver.
        gpus: that this process may use (CUDA_VISIBLE_DEVICES).
    """

    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]


def driver() -> Driver:
    """Ask the driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Driver(cuda=(0, 0), gpus=())
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    version = (number.value // 1000, number.value % 1000 // 10)
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(number)):
        return Driver(cuda=version, gpus=())
    return Driver(cuda=version, gpus=tuple(_gpu(cuda, index) for index in range(number.value)))


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, value, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(128)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    found = []
    for attribute in (MAJOR, MINOR):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        found.append(value.value)
    return Gpu(name=name.value.decode(), capability=(found[0], found[1]), num_bytes=size.value)
