"""The `seqkernels` command: each verb is a module with `main(argv) -> int`, imported only when called."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import seqkernels

VERBS = {
    "bench": ("seqkernels.bench", "time the kernels against torch and ONNX Runtime here and write a report"),
    "info": (
        "seqkernels.info",
        "print versions, instruction sets, threads, devices: what a bug report needs",
    ),
    "selftest": ("seqkernels.selftest", "check the kernels on this machine against plain torch"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="seqkernels", description=seqkernels.__doc__)
    parser.add_argument("--version", action="version", version=f"seqkernels {seqkernels.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="verb", required=True)
    for verb, (_, text) in VERBS.items():
        verbs.add_parser(verb, help=text, add_help=False)
    args, rest = parser.parse_known_args(argv)  # what follows the verb is the verb's own business
    try:
        return importlib.import_module(VERBS[args.verb][0]).main(rest)
    except BrokenPipeError:  # `| head` has read enough; nothing more is to be written when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:  # what a verb has not caught itself
        print("interrupted", file=sys.stderr)
        return 130
