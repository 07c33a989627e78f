"""Tells Triton that the CPU is the active device."""

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class CpuDriver(DriverBase):
    """One device, always there, without streams."""

    def __init__(self):
        """The base class would look for a compiler."""

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return "int"

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def clear_cache(self, cache):
        pass

    def _never(self, *args, **options):
        raise NotImplementedError("nothing is measured in the interpreter")

    get_benchmarker = get_empty_cache_for_benchmark = _never
