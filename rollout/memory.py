"""What this process has taken of the machine's memory, from the kernel's own count."""

from __future__ import annotations

from pathlib import Path


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far, mapped shared memory included (VmHWM of /proc/self/status)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no field VmHWM")
