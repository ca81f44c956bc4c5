"""Cases of attention that together hold every pair of features, and their check against float64.

Run as a program it checks the cases named on its command line under Triton's interpreter, on CPU tensors, and
prints what failed as JSON; `check` runs one case on any device.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import traceback
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

NO_LIMIT = 2**62
# Values of one feature exclude those of another that its kernels do not have together.
FEATURES: dict[str, tuple[str, ...]] = {
    "window": ("all", "causal", "causal_bottom_right", "band", "band_bottom_right", "left"),
    "mask": ("none", "bool", "float", "float_keys", "float_queries", "float_transposed"),
    "lengths": ("full", "len_k", "varlen", "paged"),
    "heads": ("1:1", "2:2", "2:1", "3:1"),
    "dims": ("16:16", "24:40", "80:16", "7:1"),
    "dtype": ("float32", "float16", "bfloat16"),
    "alibi": ("none", "heads", "batch_heads"),
    "softcap": ("0", "3"),
    "sinks": ("no", "yes"),
    "dropout": ("0", "0.3"),
    "scale": ("0.3", "-0.3", "0"),
    "grid": ("packed", "unpacked", "split"),
    "layout": ("dense", "transposed", "broadcast"),
}


def excluded(case: dict[str, str]) -> bool:
    lengths = case.get("lengths")
    masked, dropped = case.get("mask", "none") != "none", case.get("dropout", "0") != "0"
    return (lengths in ("varlen", "paged") and masked) or (lengths == "paged" and dropped)


def pairwise_cases(
    features: dict[str, tuple[str, ...]] = FEATURES, excluded: Callable[[dict[str, str]], bool] = excluded
) -> dict[str, dict[str, str]]:
    """Greedy: each next case is the one of many random ones that holds the most pairs not seen yet."""
    rng = random.Random(0)
    missing = {
        frozenset(pair)
        for a, b in itertools.combinations(features, 2)
        for pair in itertools.product(((a, x) for x in features[a]), ((b, x) for x in features[b]))
        if not excluded(dict(pair))
    }
    cases = []
    while missing:
        wanted = dict(min(missing, key=sorted))
        trials = [{name: rng.choice(values) for name, values in features.items()} | wanted for _ in range(60)]
        pairs = {
            i: {frozenset(p) for p in itertools.combinations(trial.items(), 2)}
            for i, trial in enumerate(trials)
            if not excluded(trial)
        }
        best = max(pairs, key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        cases.append(trials[best])
    return {"-".join(case.values()): case for case in cases}


class Problem:
    """Tensors of a case, `times` as long as the shortest with an edge in each tile; `leaves` are
    differentiated, `options` are those of the reference."""

    def __init__(self, case: dict[str, str], device: str, times: int = 1) -> None:
        generator = torch.Generator().manual_seed(len(repr(case)))
        self.dtype = getattr(torch, case["dtype"])
        B, Tq, Tk = 2, 19 * times, 27 * times
        self.longest = Tq, Tk
        Hq, Hk = map(int, case["heads"].split(":"))
        D, Dv = map(int, case["dims"].split(":"))
        self.shape = B, Hq, Tq, Tk

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        def given(x: Tensor) -> Tensor:
            if case["layout"] == "transposed" and x.dim() == 4:
                x = x.transpose(1, 2).contiguous().transpose(1, 2)
            elif case["layout"] == "broadcast" and x.dim() == 4:
                x = x[:1].expand(x.shape)
            return x.to(device)

        self.cu_q = self.cu_k = self.pages = None
        batch = B
        if case["lengths"] == "varlen":
            self.cu_q = torch.tensor([0, 5, 5, 24]) * times
            self.cu_k = torch.tensor([0, 11, 14, 41]) * times
            batch, rows, keys = 1, 24 * times, 41 * times
        else:
            rows, keys = Tq, Tk
        shapes = {"q": (batch, Hq, rows, D), "k": (batch, Hk, keys, D), "v": (batch, Hk, keys, Dv)}
        if case["lengths"] == "paged":
            pages = [given(randn(16, Hk, 4 * times, d).to(self.dtype)) for d in (D, Dv)]
            table = torch.randperm(16, generator=generator)[:14].view(B, 7).to(device)
            self.pages = (*pages, table.int())
            k, v = (x[table].transpose(1, 2).flatten(2, 3) for x in pages)
            self.leaves = {"q": given(randn(*shapes["q"]).to(self.dtype)), "k": k, "v": v}
        else:
            self.leaves = {name: given(randn(*shape).to(self.dtype)) for name, shape in shapes.items()}
        mask = {
            "none": lambda: None,
            "bool": lambda: randn(B, 1, Tq, Tk) > -0.5,
            "float": lambda: randn(1, Hq, Tq, Tk).masked_fill(randn(1, Hq, Tq, Tk) > 1, -torch.inf),
            "float_keys": lambda: randn(B, 1, 1, Tk).to(self.dtype),
            "float_queries": lambda: randn(1, 1, Tq, 1),
            "float_transposed": lambda: randn(1, 1, Tk, Tq).mT,
        }[case["mask"]]()
        alibi = {"none": None, "heads": randn(Hq).abs(), "batch_heads": randn(B, Hq).abs()}[case["alibi"]]
        if alibi is not None and alibi.dim() == 2 and self.cu_q is not None:
            alibi = alibi[0]
        left, right, bottom_right = {
            "all": (NO_LIMIT, NO_LIMIT, False),
            "causal": (NO_LIMIT, 0, False),
            "causal_bottom_right": (NO_LIMIT, 0, True),
            "band": (5, 3, False),
            "band_bottom_right": (4, -1, True),
            "left": (7, NO_LIMIT, False),
        }[case["window"]]
        to, lengths = {"device": device}, {"len_k": [0, 21], "paged": [3, 27]}.get(case["lengths"])
        self.options: dict[str, Any] = {
            "mask": None if mask is None else mask.to(device),
            "len_k": torch.tensor(lengths, **to) * times if lengths else None,
            "alibi": None if alibi is None else alibi.to(device),
            "sinks": randn(Hq).to(device) if case["sinks"] == "yes" else None,
            "scale": float(case["scale"]),
            "softcap": float(case["softcap"]),
            "left": left,
            "right": right,
            "bottom_right": bottom_right,
        }
        self.dropout = float(case["dropout"])
        self.rng = torch.tensor([2**40 + 7, 2**33 + 5], **to) if self.dropout else None
        self.dout = randn(batch, rows, Hq, Dv).to(self.dtype).to(device)
        self.dlse = randn(batch, Hq, rows).to(device)
        if case["grid"] == "split":  # a gradient that is not contiguous
            self.dout = self.dout.mT.contiguous().mT

    def arguments(self) -> tuple[Any, ...]:
        """From mask to max_k, in the order of the op."""
        o = dict(self.options)
        mask, lengths = o.pop("mask"), (None, None) if self.cu_q is None else self.cumulative()
        longest = (0, 0) if self.cu_q is None else self.longest
        return mask, *lengths, *o.values(), self.dropout, self.rng, *longest

    def cumulative(self) -> tuple[Tensor, Tensor]:
        device = self.leaves["q"].device
        return self.cu_q.to(device), self.cu_k.to(device, torch.int32)


def reference(problem: Problem) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs and gradients in float64 on the CPU, and the weights, sequence by sequence."""
    from seqkernels.reference.attention import attention

    def truth(x: Tensor | None) -> Tensor | None:
        if x is None or not x.is_floating_point():
            return None if x is None else x.cpu()
        return x.detach().cpu().double().requires_grad_()

    leaves = {name: truth(x) for name, x in problem.leaves.items()}
    options = {name: truth(x) if isinstance(x, Tensor) else x for name, x in problem.options.items()}
    q, k, v = leaves.values()
    spans = [(slice(None), slice(None))]
    if problem.cu_q is not None:
        cu = problem.cu_q.tolist(), problem.cu_k.tolist()
        spans = [tuple(slice(*c[n : n + 2]) for c in cu) for n in range(len(cu[0]) - 1)]
    outs, lses = [], []
    for n, (a, b) in enumerate(spans):
        rng = problem.rng if problem.rng is None else problem.rng.cpu()
        dropped = {"dropout": problem.dropout, "rng": rng, "first": n}
        out, lse = attention(q[:, :, a], k[:, :, b], v[:, :, b], **dropped, **options)
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs, 2).transpose(1, 2), torch.cat(lses, 2)
    wanted = leaves | {
        n: options[n] for n in ("mask", "sinks") if n in options and _differentiable(options[n])
    }
    finite = lse.isfinite()
    loss = (out * problem.dout.cpu().double()).sum() + (
        lse[finite] * problem.dlse.cpu().double()[finite]
    ).sum()
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    found = {"out": out, "lse": lse}
    for (name, leaf), grad in zip(wanted.items(), grads, strict=True):
        grad = torch.zeros_like(leaf) if grad is None else grad
        found[f"d{name}"] = grad.transpose(1, 2) if name in leaves else grad
    return found, [problem.dlse.cpu() * finite]


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def ours(problem: Problem, dlse: Tensor) -> dict[str, Tensor]:
    from seqkernels.triton import launch

    leaves, arguments = problem.leaves.values(), problem.arguments()
    if problem.pages is not None:  # for inference
        rest = list(problem.options.values())[1:]  # but the mask
        out, lse = launch.paged_attention_fwd(problem.leaves["q"], *problem.pages, *rest)
        return {"out": out, "lse": lse}
    out, lse = launch.attention_fwd(*leaves, *arguments)
    grads = launch.attention_bwd(problem.dout, dlse, *leaves, out, lse, *arguments, True)
    found = dict(zip(("out", "lse", "dq", "dk", "dv", "dmask", "dsinks"), (out, lse, *grads), strict=True))
    if problem.cu_q is None:
        o = problem.options
        found["weights"] = launch.attention_weights(
            problem.leaves["q"], problem.leaves["k"], lse, o["mask"], o["len_k"], o["alibi"], o["scale"],
            o["softcap"], o["left"], o["right"], o["bottom_right"], problem.dropout, problem.rng, False,
        )  # fmt: skip
    return found


def assert_close(name: str, value: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Half types round P and dS before each product, float32 sums a few dozen numbers in another order."""
    eps = torch.finfo(torch.float32 if name == "lse" else dtype).eps
    value, truth = value.detach().cpu().double(), truth.detach()
    assert value.shape == truth.shape, (name, value.shape, truth.shape)
    finite = truth.isfinite()
    assert torch.equal(value[~finite], truth[~finite]), f"{name}: not finite elsewhere than the truth"
    error = (value - truth)[finite].abs().max().item() if finite.any() else 0.0
    largest = max(1.0, truth[finite].abs().max().item() if finite.any() else 0.0)
    allowed = (8 if name in ("out", "lse", "weights") else 32) * eps * largest
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check(case: dict[str, str], device: str, times: int = 1) -> None:
    problem = Problem(case, device, times)
    truth, (dlse,) = reference(problem)
    found = ours(problem, dlse.to(device))
    for name, exact in truth.items():
        if problem.pages is not None and name not in ("out", "lse"):
            continue
        if name == "dmask":
            exact = exact.sum_to_size(problem.options["mask"].shape)
        assert_close(name, found[name], exact, problem.dtype)
    if "weights" in found:  # v = 1 for one key at a time would give them too: out is P v
        v = problem.leaves["v"].cpu().double()
        v = v.repeat_interleave(problem.shape[1] // v.size(1), 1)
        assert_close(
            "out", (found["weights"].cpu().double() @ v).transpose(1, 2), truth["out"], problem.dtype
        )


def set_grid(kind: str) -> None:
    """On the CPU there is one multiprocessor and all that is for many has to be asked for."""
    from seqkernels.triton import decode, launch

    launch.multiprocessors = lambda device: 10**6 if kind == "split" else 1
    launch.decode.key_splits = lambda *_: 3 if kind == "split" else 1
    decode.is_packed = lambda queries, group: kind == "packed" or (kind == "split" and group > 1)


def small_tiles() -> None:
    """So that 27 keys are two blocks, with an edge."""
    from seqkernels.triton import launch
    from seqkernels.triton.tables import Tile

    launch.tile_for = lambda *key: Tile(16, 16, 4, 1)


def interpret_with_this_numpy() -> None:
    """Triton 3.6 takes int() of an array of one element, which NumPy has refused since 2.4."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def interpret_faster() -> None:
    """The language is patched once for each module, not with each call of a function in it, and sums are not
    computed again for an assertion that is off without debugging: together half of the interpreter's time."""
    from triton.runtime import interpreter

    patch, modules = interpreter._patch_lang, set()

    def patch_once(fn: Any) -> Any:
        if (module := fn.__globals__["__name__"]) not in modules:
            modules.add(module)
            patch(fn)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def failure_of(run: Callable[[], None]) -> str | None:
    torch.manual_seed(0)
    try:
        run()
    except Exception:
        return traceback.format_exc()
    return None


def main(names: list[str]) -> None:
    from triton_units import UNITS

    interpret_with_this_numpy()
    interpret_faster()
    small_tiles()
    cases = pairwise_cases()
    failures = {}
    for name in names:
        set_grid(cases[name]["grid"] if name in cases else "unpacked")
        run = partial(check, cases[name], "cpu") if name in cases else partial(UNITS[name], "cpu")
        if failure := failure_of(run):
            failures[name] = failure
    print(json.dumps(failures))


if __name__ == "__main__":
    main(sys.argv[1:])
