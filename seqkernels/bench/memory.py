"""Peak memory of one call, measured in a process of its own.

A small server process imports the packages once; for every measurement it forks a child that builds the
problem, makes one tiny call (so that lazily loaded code is in memory already) and then the real one.
Reported is the growth of the resident set: its peak during the call minus its size before. On Linux the
peak is VmHWM of /proc/self/status, set back right before the call through /proc/self/clear_refs; elsewhere
it is ru_maxrss, which never falls, so that a peak below the one of building the problem goes unseen.

Run as `python -m seqkernels.bench.memory`: one JSON request a line in, one JSON answer a line out.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress

import torch

from .attention import AttentionCase
from .cases import Case
from .contestants import CONTESTANTS, make_problem

VMHWM, RU_MAXRSS = "VmHWM, set back before the call", "ru_maxrss"


class MemoryMeter:
    """Client of the server process. Use as a context manager."""

    def __enter__(self) -> MemoryMeter:
        # A session of its own, so that Ctrl-C reaches only the process that knows what to do about it.
        command = [sys.executable, "-m", __name__]
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGTERM)  # the child that measures, too
        self._server.wait()
        for stream in (self._server.stdin, self._server.stdout):
            with suppress(BrokenPipeError):
                stream.close()

    def peak(self, case: Case | AttentionCase, contestant: str) -> tuple[int, str]:
        """(bytes, how they were measured). MemoryError when the child was killed or failed."""
        request = {"case": dataclasses.asdict(case), "contestant": contestant}
        request["threads"] = torch.get_num_threads()
        try:
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            line = self._server.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line or '{"error": "the measuring process has ended"}')
        if "error" in answer:
            raise MemoryError(f"{case.name}, {contestant}: {answer['error']}")
        return answer["peak"], answer["method"]


def serve() -> None:
    for line in sys.stdin:
        read_end, write_end = os.pipe()
        if (child := os.fork()) == 0:
            os.write(write_end, json.dumps(_measure(json.loads(line))).encode())
            os._exit(0)
        os.close(write_end)
        with open(read_end, encoding="utf-8") as pipe:
            answer = pipe.read()
        status = os.waitpid(child, 0)[1]
        print(answer or json.dumps({"error": f"child ended with wait status {status}"}), flush=True)


def _measure(request: dict) -> dict:
    try:
        torch.set_num_threads(request["threads"])
        case = (Case if "layers" in request["case"] else AttentionCase)(**request["case"])
        make = CONTESTANTS[request["contestant"]]
        with torch.set_grad_enabled(case.mode == "train"):
            make(make_problem(case.tiny())).run()
            contestant = make(make_problem(case))
            before, method = forget_peak()
            result = contestant.run()
            after = peak_now(method)
        del result
        return {"peak": max(0, after - before), "method": method}
    except Exception as error:  # the answer has to reach the other process whatever went wrong
        return {"error": f"{type(error).__name__}: {error}"}


def forget_peak() -> tuple[int, str]:
    """Bytes in use now, after making the peak equal to them where the system can do that."""
    if sys.platform == "linux":
        try:
            trim = ctypes.CDLL(None).malloc_trim  # hand back what building the problem has freed (glibc only)
            trim(0)
        except AttributeError:
            pass
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as control:
            control.write("5")
        return peak_now(VMHWM), VMHWM
    except OSError:
        return peak_now(RU_MAXRSS), RU_MAXRSS


def peak_now(method: str) -> int:
    if method == VMHWM:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    serve()
