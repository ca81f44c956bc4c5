"""Importing this module loads the native op library, once; `torch.ops.seqkernels.*` exists from then on."""

import platform
from pathlib import Path

import torch

LIBRARY = Path(__file__).resolve().parent.parent / "_ops.so"
MINIMUM_TORCH = (2, 11)


def load(library: Path = LIBRARY) -> None:
    """Raises ImportError that says what is wrong and what to do about it."""
    here = f"(Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()})"
    if torch.__version__ < MINIMUM_TORCH:
        raise ImportError(
            f"seqkernels needs torch >= {'.'.join(map(str, MINIMUM_TORCH))}, got {torch.__version__}. "
            "Upgrade it: pip install --upgrade torch"
        )
    if not library.is_file():
        raise ImportError(
            f"seqkernels has no native library: {library} is missing {here}. In a source checkout build it "
            "(`make build`, or `pip install --no-build-isolation --no-deps -e .`), or reinstall it."
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"seqkernels cannot load its native library {library} {here}: {error}. It was "
            "built for another platform, compiler runtime or version of torch. Build it on this machine: "
            "`make clean build` in a source checkout (docs/building.md)."
        ) from error


load()


@torch.library.impl("seqkernels::allows_tf32", "default")
def allows_tf32() -> bool:
    """Whatever way torch was told: allow_tf32, set_float32_matmul_precision, fp32_precision."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
