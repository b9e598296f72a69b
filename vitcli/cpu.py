"""The processor: its name, its cores, and whether it has instructions for bfloat16."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

BF16 = ("avx512_bf16", "amx_bf16", "bf16")  # AVX512-BF16, AMX, and Arm's


def name() -> str:
    """As the system calls it."""
    return _facts().get("model name") or platform.processor() or platform.machine()


def bf16_instructions() -> list[str]:
    """Those that it has for products in bfloat16; without any such products are slower than in float32."""
    facts = _facts()
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return [flag for flag in BF16 if flag in flags]


def physical_cores() -> int:
    """Cores that this process may use, hyperthreads not counted where the system tells."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    siblings = set()
    for core in usable:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(usable)
    return len(siblings)


def _facts() -> dict[str, str]:
    """Of the first core in /proc/cpuinfo; {} where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    return dict(re.findall(r"^(.+?)\s*: (.*)$", text.split("\n\n")[0], re.MULTILINE))
