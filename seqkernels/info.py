"""`seqkernels info`: versions, instruction sets, threads and devices: what a bug report needs."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import seqkernels


def cpu_model() -> str:
    """The processor's name; platform.processor() is empty or only the architecture on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Of the working tree that this package is used from."""
    folder = Path(seqkernels.__file__).parent
    if not (folder.parent / ".git").exists():
        return "none: installed, or a copy without .git"
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown: {type(error).__name__}"


def gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def switches() -> str:
    """What the environment sets that changes what runs or how fast."""
    names = [
        n
        for n in sorted(os.environ)
        if n.startswith("SEQKERNELS_") or n in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    ]
    return ", ".join(f"{n}={os.environ[n]}" for n in names) or "none"


def collect() -> dict[str, str]:
    from seqkernels import _kernels, support

    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "seqkernels": f"{seqkernels.__version__} ({Path(seqkernels.__file__).parent})",
        "commit": commit(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": torch.__version__,
        "onnxruntime": installed("onnxruntime"),
        "numpy": installed("numpy"),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpus usable": str(affinity),
        "torch threads": str(torch.get_num_threads()),
        "isa active": torch.ops.seqkernels.get_isa(),
        "isa supported": ", ".join(_kernels.supported_isas()),
        "cuda kernels": "yes"
        if support.has_cuda_kernels()
        else "no (built without nvcc >= 12.8 or with SEQKERNELS_CUDA=off)",
        "torch cuda": torch.version.cuda or "no",
        "gpu": gpus(),
        "environment": switches(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="seqkernels info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:<{width}}  {value}")
    return 0
