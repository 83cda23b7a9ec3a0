"""Measures peak memory of the host and of CUDA."""

import sys
from pathlib import Path

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the peak of resident memory


def reset_peaks() -> None:
    """Resets the peaks; off Linux the host's peak stays that of the process."""
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_host() -> int:
    """Returns the peak of resident memory in bytes, since `reset_peaks` or since the process started."""
    if CLEAR_REFS.exists():
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory() -> int:
    """Returns the peak in bytes of CUDA where available, else of the host."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_host()
