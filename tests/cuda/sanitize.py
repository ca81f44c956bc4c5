"""Every CUDA kernel of the recurrence once, small, for compute-sanitizer: `make sanitize-gpu`.

Each kind of cell and dtype runs in one block, in several that wait for each other, and step by step; packed,
with resets and with a projection; forward and backward; float32 with and without TF32.
"""

from collections.abc import Iterator

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkernels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
T, I = 4, 5  # noqa: E741
FORMS = ("blocks, 1 to a group", "to a group", "stepwise")


def sizes(device: str) -> dict[str, tuple[int, int]]:
    """B and H for each form; more rows than all multiprocessors can hold at a time go step by step."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return dict(zip(FORMS, ((9, 8), (9, 264), (64 * multiprocessors + 1, 9)), strict=True))


def calls(kind: str, dtype: torch.dtype, device: str) -> Iterator[tuple[str, torch.nn.Module, tuple, dict]]:
    """(form, module, arguments, keyword arguments)"""
    options = {"bidirectional": True, "dtype": dtype, "device": device}
    for form, (B, H) in sizes(device).items():
        module = getattr(seqkernels, kind)(I, H, **options)
        x = torch.randn(T, B, I, dtype=dtype, device=device)
        form = "stepwise" if dtype == torch.float64 else form
        yield form, module, (x,), {"resets": torch.rand(T, B, device=device) < 0.3}
        lengths = torch.randint(1, T + 1, (B,))
        lengths[0] = T
        yield form, module, (pack_padded_sequence(x, lengths, enforce_sorted=False),), {}
    if kind == "LSTM":
        projected = seqkernels.LSTM(I, 20, proj_size=7, **options)
        yield "stepwise", projected, (torch.randn(T, 9, I, dtype=dtype, device=device),), {}
    if kind != "RNN":
        module = getattr(seqkernels, kind)(I, 8, **options)
        module.recompute = True
        form = "stepwise" if dtype == torch.float64 else FORMS[0]
        yield form, module, (torch.randn(T, 9, I, dtype=dtype, device=device),), {}


def train(module: torch.nn.Module, *args: object, **kwargs: object) -> None:
    output = module(*args, **kwargs)[0]
    output = output.data if isinstance(output, PackedSequence) else output
    for gradient in torch.autograd.grad(output.sum(), list(module.parameters())):
        assert gradient.isfinite().all()


def main(device: str = "cuda") -> None:
    count = 0
    for kind in ("LSTM", "GRU", "RNN"):
        for dtype, tf32 in [*((dtype, False) for dtype in DTYPES), (torch.float32, True)]:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            for form, module, args, kwargs in calls(kind, dtype, device):
                if isinstance(args[0], torch.Tensor):
                    plan = seqkernels.explain(module, *args)
                    assert form in plan, f"{module}: expected {form}, got {plan}"
                train(module, *args, **kwargs)
                count += 1
            cell = getattr(seqkernels, f"{kind}Cell")(I, 20, dtype=dtype, device=device)
            cell(torch.randn(3, I, dtype=dtype, device=device))
    print(f"{count} layers, forward and backward")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
