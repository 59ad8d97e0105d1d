import subprocess
import sys

from hf_scan.costs import allocator


def test_the_hint_names_the_settings(monkeypatch):
    monkeypatch.setattr(allocator, "_has_glibc", lambda: True)
    monkeypatch.setattr(allocator, "_kept", False)
    for name in allocator.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert "MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=1000000000" in allocator.allocator_hint()
    for name, value in allocator.VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert allocator.allocator_hint() is None


def test_memory_is_kept_where_glibc_does_it():
    """In a process of its own: a large block that is freed and taken again is mapped once."""
    code = """
import ctypes, resource
from hf_scan.costs.allocator import allocator_hint, keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        block = libc.malloc(16_000_000)
        ctypes.memset(block, 1, 16_000_000)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
print(keep_freed_memory(), allocator_hint(), faults() < first / 2 or first < 8000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("True None True" if allocator._has_glibc() else "False None True")
