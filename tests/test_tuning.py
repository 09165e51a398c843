"""Settings of the process."""

import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_freed_memory_stays_however_much():
    """More than 2 GB too, the largest number that glibc takes for it: a large network's step frees more."""
    program = """
import ctypes
from jaxsd import tuning

tuning.tune_allocator()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes, libc.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_void_p], [ctypes.c_ssize_t]
before = libc.sbrk(0)
block = libc.malloc(2300 << 20)  # never touched: address space alone
assert block, "no address space"
libc.free(block)
print((libc.sbrk(0) - before) >> 20)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(result.stdout) >= 2300
