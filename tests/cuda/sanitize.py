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
ALONE, TOGETHER, STEPWISE = "blocks, 1 to a group", "to a group", "stepwise"
TWO_TILES = {rows: f"of 32 units x {rows} rows, 2 tiles a warp" for rows in (8, 16, 32)}


def sizes(device: str) -> Iterator[tuple[str, int, int]]:
    """(form, B, H): one block, of half types with all weights in registers and without; several, backward
    with one tile of weights a warp, and with two in each loop, of one, two and four rows a thread; more rows
    than all multiprocessors can hold at a time."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    yield ALONE, 9, 8
    yield ALONE, 9, 9
    yield TOGETHER, 9, 264
    for rows in TWO_TILES:  # a group, of 9 blocks of 32 units for each direction
        yield TOGETHER, multiprocessors // 18 * rows, 264
    yield STEPWISE, 64 * multiprocessors + 1, 9


def calls(kind: str, dtype: torch.dtype, device: str) -> Iterator[tuple[str, torch.nn.Module, tuple, dict]]:
    """(form, module, arguments, keyword arguments)"""
    options = {"bidirectional": True, "dtype": dtype, "device": device}
    for form, B, H in sizes(device):
        module = getattr(seqkernels, kind)(I, H, **options)
        x = torch.randn(T, B, I, dtype=dtype, device=device)
        form = STEPWISE if dtype == torch.float64 else form
        yield form, module, (x,), {"resets": torch.rand(T, B, device=device) < 0.3}
        lengths = torch.randint(1, T + 1, (B,))
        lengths[0] = T
        yield form, module, (pack_padded_sequence(x, lengths, enforce_sorted=False),), {}
    if kind == "LSTM":
        projected = seqkernels.LSTM(I, 20, proj_size=7, **options)
        yield STEPWISE, projected, (torch.randn(T, 9, I, dtype=dtype, device=device),), {}
    if kind != "RNN":
        module = getattr(seqkernels, kind)(I, 8, **options)
        module.recompute = True
        form = STEPWISE if dtype == torch.float64 else ALONE
        yield form, module, (torch.randn(T, 9, I, dtype=dtype, device=device),), {}


def train(module: torch.nn.Module, *args: object, **kwargs: object) -> None:
    output = module(*args, **kwargs)[0]
    output = output.data if isinstance(output, PackedSequence) else output
    for gradient in torch.autograd.grad(output.sum(), list(module.parameters())):
        assert gradient.isfinite().all()


def main(device: str = "cuda") -> None:
    count, backward = 0, ""
    for kind in ("LSTM", "GRU", "RNN"):
        for dtype, tf32 in [*((dtype, False) for dtype in DTYPES), (torch.float32, True)]:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            for form, module, args, kwargs in calls(kind, dtype, device):
                if isinstance(args[0], torch.Tensor):
                    plan = seqkernels.explain(module, *args)
                    assert form in plan, f"{module}: expected {form}, got {plan}"
                    backward += plan.partition("backward")[2]
                train(module, *args, **kwargs)
                count += 1
            cell = getattr(seqkernels, f"{kind}Cell")(I, 20, dtype=dtype, device=device)
            cell(torch.randn(3, I, dtype=dtype, device=device))
    assert all(words in backward for words in TWO_TILES.values()), "no kernel took two tiles in some loop"
    print(f"{count} layers, forward and backward")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
