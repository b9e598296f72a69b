"""What the C library does with freed memory: keep it, so that the kernel need not clear every large buffer anew."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGE = 32 << 20  # bytes of a buffer; glibc takes no more


def keep_freed() -> None:
    """Let this process keep what it frees; where there is no glibc nothing happens."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(MMAP_THRESHOLD, LARGE)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
