"""What a run's figures depend on: versions, cores, threads, and what the memory of a GPU held."""

from __future__ import annotations

import os
import platform

import torch


def surroundings(device: torch.device) -> dict[str, str]:
    """What the figures depend on; on a GPU, what its memory held at most: this process's tensors and the allocator's
    segments, and what the driver calls used now, whoever uses it."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.release()}",
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["device"] = torch.cuda.get_device_name(device)
        free, total = torch.cuda.mem_get_info(device)
        found["allocated_bytes"] = str(torch.cuda.max_memory_allocated(device))
        found["reserved_bytes"] = str(torch.cuda.max_memory_reserved(device))
        found["device_used_bytes"] = str(total - free)
    return found
