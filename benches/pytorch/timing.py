"""Timing on a CPU or a GPU, and what else a line of results says about the machine."""

from __future__ import annotations

import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch

MIB = 2**20
# Dense bf16 TFLOP/s by the vendors' datasheets, for parts whose name holds the key.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "H800": 989.0, "A100": 312.0, "L40S": 362.0}


def times_ms(
    run: Callable[[], object],
    device: torch.device,
    seconds: float = 1.0,
    warmup: int = 2,
    least: int = 3,
    most: int = 200,
) -> list[float]:
    """Runs `run` for about `seconds` after the warm-up; returns every run's milliseconds."""
    for _ in range(warmup):
        run()
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    once = max(time.perf_counter() - start, 1e-6)
    repeats = min(max(int(seconds / once), least), most)
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        wait(device)
        return [first.elapsed_time(second) for first, second in zip(marks, marks[1:])]
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def median_ms(run: Callable[[], object], device: torch.device, **how) -> float:
    """Returns the median of `times_ms`."""
    return statistics.median(times_ms(run, device, **how))


def percentile(times: list[float], share: float) -> float:
    """Returns the time that `share` of the runs did not exceed."""
    ordered = sorted(times)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def open_device(name: str) -> torch.device:
    """Returns a device, or ends the program with the reason why it cannot be used."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no GPU and driver here; use --device cpu")
    return torch.device(name)


def wait(device: torch.device) -> None:
    """Waits for the device to finish what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> None:
    """Starts a new peak of memory, where the device counts one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mib(device: torch.device) -> float:
    """Returns the peak of allocated memory; on a CPU that of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def device_name(device: torch.device) -> str:
    """Returns the name of the GPU, or of the processor's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


def peak_tflops(device: torch.device) -> float | None:
    """Returns the datasheet's bf16 rate of a known GPU."""
    name = device_name(device)
    return next((rate for key, rate in PEAK_TFLOPS.items() if key in name), None)


def environment(device: torch.device) -> dict:
    """Returns what a reader needs to place the numbers."""
    return {
        "kind": "environment",
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
    }


def emit(line: dict) -> None:
    """Prints one JSON line, numbers rounded to six digits."""
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}
    sys.stdout.write(json.dumps(rounded) + "\n")
    sys.stdout.flush()
