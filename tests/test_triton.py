"""Triton kernels: under the interpreter on the CPU, on a GPU where there is one, and as cubins."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton_matrix import check, failure_of, pairwise_cases, set_grid

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton_cubin  # noqa: E402
import triton_launch  # noqa: E402
from triton_units import UNITS  # noqa: E402

from seqkernels.triton import backward, decode, launch, launch_additive, tables  # noqa: E402

TESTS = Path(__file__).parent
CASES = pairwise_cases()
WORKERS = 2
SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}  # bytes a block may have
TENSOR_MEMORY_LIMIT = 512  # columns, on sm_100 alone: Triton compiles what needs more into a trap


@pytest.fixture(scope="session")
def interpreted(request: pytest.FixtureRequest) -> dict[str, str]:
    """Tracebacks of the selected cases that fail. TRITON_INTERPRET changes what @triton.jit does, for good,
    so the interpreter has processes of its own."""
    selected = (item.callspec.params for item in request.session.items if "interpreted" in item.fixturenames)
    names = [params["name"] for params in selected]
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(TESTS / "triton_matrix.py"), *names[n::WORKERS]],
            env=os.environ
            | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])},
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(WORKERS)
    ]
    outputs = [child.communicate()[0] for child in children]
    assert not any(child.returncode for child in children)
    return {
        name: failure for output in outputs for name, failure in json.loads(output.splitlines()[-1]).items()
    }


@pytest.mark.parametrize("name", [*CASES, *UNITS])
def test_interpreted(name: str, interpreted: dict[str, str]):
    assert name not in interpreted, interpreted[name]


def test_the_cases_hold_every_pair_of_features():
    from itertools import combinations

    from triton_matrix import FEATURES, excluded

    seen = {frozenset(pair) for case in CASES.values() for pair in combinations(case.items(), 2)}
    for a, b in combinations(FEATURES, 2):
        for x, y in product(FEATURES[a], FEATURES[b]):
            assert excluded({a: x, b: y}) or frozenset({(a, x), (b, y)}) in seen


def test_import_brings_no_triton():
    code = (
        "import sys, torch, seqkernels, seqkernels.triton as t\n"
        "if not hasattr(torch.ops.seqkernels, 'attention_fwd'):\n"
        "    library = torch.library.Library('seqkernels', 'FRAGMENT')\n"
        "    [library.define(f'{name}(Tensor x) -> Tensor') for name in (*t.OPS, *t.ADDITIVE_OPS)]\n"
        "t.register(); t.register()\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "assert all(has(f'seqkernels::{name}', 'CUDA') for name in (*t.OPS, *t.ADDITIVE_OPS))\n"
        "assert 'triton' not in sys.modules and not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=TESTS.parent)


def test_splits_and_packs_by_shape_alone():
    """What decides is the same in every call, so the same bits come out."""
    assert decode.key_splits(programs=8, keys=131_072, multiprocessors=132) == 33
    assert decode.key_splits(programs=8, keys=8192, multiprocessors=132) == 16
    assert decode.key_splits(programs=8, keys=1000, multiprocessors=132) == 1
    assert decode.key_splits(programs=132, keys=131_072, multiprocessors=132) == 1
    assert decode.key_splits(programs=0, keys=131_072, multiprocessors=132) == 1
    assert decode.is_packed(queries=1, group=1)
    assert decode.is_packed(queries=32, group=4)
    assert not decode.is_packed(queries=64, group=4)
    assert not decode.is_packed(queries=64, group=1)
    assert decode.packed_tile(tables.Tile(128, 128, 8, 3), rows=8) == tables.Tile(16, 128, 4, 3)
    assert decode.packed_tile(tables.Tile(64, 16, 8, 2), rows=128) == tables.Tile(64, 16, 8, 2)
    assert launch.group_splits(programs=4, group=8, multiprocessors=16) == 4
    assert launch.group_splits(programs=4, group=6, multiprocessors=132) == 6
    assert launch.group_splits(programs=200, group=8, multiprocessors=132) == 1


def test_rows_too_far_apart_for_32_bits_are_copied():
    x = torch.empty_strided((2, 1, 4096, 16), (0, 0, 2**20, 1), device="meta")
    assert launch.rows_of(x) is x
    assert launch.rows_of(x, page=2047) is x
    assert launch.rows_of(x, page=2048).is_contiguous()


def test_float32_precision_follows_torch():
    before = torch.get_float32_matmul_precision()
    try:
        for precision, name in (("highest", "ieee"), ("high", "tf32x3"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(precision)
            assert launch.float32_precision() == name
        torch.set_float32_matmul_precision("highest")
        matmul = torch.backends.cuda.matmul
        for precision, name in (("tf32", "tf32x3"), ("ieee", "ieee"), ("tf32", "tf32x3"), ("none", "ieee")):
            matmul.fp32_precision = precision  # after which torch may refuse to tell the above
            assert launch.float32_precision() == name
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)


# Registers, spills and shared memory of the rows of the tables, compiled for GPUs that are not there.
# SEQKERNELS_TEST_CUBINS=all compiles every row with several flag sets, head dims and precisions (minutes).
ALL = os.environ.get("SEQKERNELS_TEST_CUBINS") == "all"
# Spill instructions a block of float32: lost among the thousands that products take. On an H100 exact dQ of
# 64 features with 36 was 1.6 times as fast as the best without.
FEW, FEW_EXACT = 32, 64


def gate_cases() -> Iterator[tuple[str, tuple]]:
    """ALL, or two tiers of every row of Hopper in 16 bit, which ships to most, and a ninth of the rest."""
    rows = [(kernel, arch, "bf16", row) for (kernel, arch), rows in tables.HALF.items() for row in rows]
    rows += [(kernel, 80, "fp32", row) for kernel, rows in tables.FLOAT32.items() for row in rows]
    exact = ((kernel, row) for kernel, rows in tables.EXACT.items() for row in rows if row.dim == 64)
    rows += [(kernel, 80, "exact", row) for kernel, row in exact]
    for n, (kernel, arch, dtype, row) in enumerate(rows):
        for m, tier in enumerate(triton_cubin.TIERS):
            cases = [*row_cases(kernel, arch, dtype, row, tier)]
            most_used = (arch, dtype) == (90, "bf16")
            if ALL:
                yield from cases
            elif (n + m) % 3 != 0 if most_used else (n + m) % 9 == 0:
                yield cases[n % 3]
    for arch, dtype, dim in ((90, "bf16", 64), (90, "bf16", 256), (100, "bf16", 128), (80, "fp32", 128)):
        everything = triton_cubin.TIERS["rich"]["everything"]
        yield f"far-sm{arch}-{dtype}-{dim}", ("far", arch, dtype, dim, launch.OF_ROWS, everything)


def row_cases(kernel: str, arch: int, dtype: str, row: tables.Row, tier: str):
    dim, tile = row.dim, getattr(row, tier)
    narrow = {"DV": row.total - dim} if row.total else {}
    sets = {
        name: flags
        for name, flags in triton_cubin.TIERS[tier].items()
        if not (kernel == tables.TILES and "VARLEN" in flags)  # which has neither masks nor weights
    }
    first = next(iter(sets.values()))
    others = [("fp16", arch, dim, {}), ("bf16", arch, dim * 5 // 8, {})]  # 80 = 64 + 16, 160, 320
    if dtype == "fp32":
        others = [(dtype, a, dim, {"PRECISION": p}) for a, p in ((80, "tf32"), (90, "tf32"), (80, "tf32x3"))]
    if arch == 80:
        others += [(dtype, a, dim, {}) for a in (89, 120)]  # which have less shared memory
    if dtype == "exact":
        dtype, others = "fp32", [("fp32", 90, dim, {})]
    cases = [(name, dtype, arch, dim, flags | narrow) for name, flags in sets.items()]
    cases += [
        ("-".join(extra.values()), dtype, a, d, first | extra | (narrow if d == dim else {}))
        for dtype, a, d, extra in others
    ]
    for name, dtype, a, d, flags in cases:
        for k in (kernel, "weights") if kernel == tables.TILES else (kernel,):
            yield f"{k}-sm{a}-{dtype}-{d}-{tier}-{name}".rstrip("-"), (k, a, dtype, d, tile, flags)


def resources(case: tuple) -> triton_cubin.Resources:
    kernel, arch, dtype, dim, tile, flags = case
    return triton_cubin.compile_for(kernel, triton_cubin.features(dim, dtype, **flags), dtype, tile, arch)


GATE = dict(gate_cases())


@pytest.fixture(scope="session")
def cubins(request: pytest.FixtureRequest):
    yield from in_processes(request, "cubin", resources, GATE)


def in_processes(request: pytest.FixtureRequest, parameter: str, function, cases: dict) -> Iterator[dict]:
    """The results of the selected cases by name."""
    names = [
        item.callspec.params[parameter]
        for item in request.session.items
        if request.fixturename in item.fixturenames
    ]
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        yield dict(zip(names, pool.map(function, [cases[name] for name in names], chunksize=4), strict=True))


@pytest.mark.parametrize("cubin", GATE)
def test_resources(cubin: str, cubins: dict):
    kernel, arch, dtype, dim, tile, flags = GATE[cubin]
    found = cubins[cubin]
    known = kernel in (tables.TILES, "weights") and dim == 256 and "PRECISION" in flags
    few = 0 if dtype != "fp32" else FEW if "PRECISION" in flags else FEW_EXACT
    assert known or found.spills_in_loops <= few, found
    assert found.shared <= SHARED_LIMIT.get(arch, SHARED_LIMIT[80])
    assert found.tensor_memory <= TENSOR_MEMORY_LIMIT
    rows = tile.BN if kernel == tables.DKDV else tile.BM
    may = flags.get("PRECISION") == "tf32"  # one product in TF32 takes it in some kernels
    assert may or found.wgmma == (arch == 90 and dtype != "fp32" and rows >= 64)


def test_the_gate_sees_spills():
    found = resources((tables.DKDV, 90, "bf16", 128, tables.Tile(128, 128, 4, 1), {}))
    assert found.spills_in_loops > 0


def test_the_gate_sees_too_much_tensor_memory():
    """A kernel that needs more than there is compiles without complaint, and refuses to load."""
    found = resources((tables.FORWARD, 100, "bf16", 512, tables.Tile(64, 16, 8, 2), {}))
    assert found.tensor_memory > TENSOR_MEMORY_LIMIT
    for extras in range(3):
        tile = tables.tile_for(tables.FORWARD, 100, 16, (512, 512), extras)
        flags = next(iter([*triton_cubin.TIERS.values()][extras].values()))
        found = resources((tables.FORWARD, 100, "bf16", 512, tile, flags))
        assert found.tensor_memory <= TENSOR_MEMORY_LIMIT
        assert found.registers > 32


def launches() -> Iterator[tuple[str, tuple]]:
    """What the launcher makes of whole calls, (architecture, call, arguments)."""
    calls = [("train", name) for name in triton_launch.CASES]
    for shape in triton_launch.SHAPES:
        for dtype, dims in (("bfloat16", (64, 80, 128, 256, 512)), ("float32", (64, 128, 256))):
            calls += [("decode", shape, dtype, D, rich, 16 * (D != 80)) for D in dims for rich in (0, 1)]
    for arch in (80, 90, 100):
        for n, (call, *args) in enumerate(calls):
            if ALL or (n % 6 == {80: 0, 90: 2, 100: 4}[arch] and (call == "decode" or n % 4 == 0)):
                yield f"sm{arch}-{call}-" + "-".join(map(str, args)), (arch, call, *args)


LAUNCHES = dict(launches())


def launched_kernels(case: tuple) -> dict[str, triton_cubin.Resources]:
    arch, call, *args = case
    return triton_launch.compiled(arch, getattr(triton_launch, call), *args)


@pytest.fixture(scope="session")
def launched(request: pytest.FixtureRequest):
    yield from in_processes(request, "call", launched_kernels, LAUNCHES)


@pytest.mark.parametrize("call", LAUNCHES)
def test_whole_calls_compile(call: str, launched: dict):
    arch, kind = LAUNCHES[call][:2]
    found = launched[call]
    names = {name.split("-")[0] for name in found}
    expected = {"attention_forward"}
    if kind == "decode":
        expected.add("combine")
    elif "paged" not in call:
        expected.add("attention_dkdv")
    assert names >= expected
    for kernel in found.values():
        assert kernel.shared <= SHARED_LIMIT[arch]
        assert kernel.tensor_memory <= TENSOR_MEMORY_LIMIT
        if kind == "decode":  # in training, masks whose rows are not aligned need more registers
            assert kernel.spills_in_loops <= (FEW if "float32" in call else 0), kernel


ADDITIVE_KERNELS = ("additive_forward", "additive_statistics", "additive_dq", "additive_dkdv")


def additive_launches() -> Iterator[tuple[str, tuple]]:
    """ALL, or every tile on every architecture, in turn in bfloat16 and float32, with all that it can do."""
    calls = product((80, 90, 100), tables.ADDITIVE, (1, 0), ("bfloat16", "float32", "float16"))
    for n, (arch, *args) in enumerate(calls):
        if ALL or n % 12 in (0, 7):
            yield f"sm{arch}-" + "-".join(map(str, args)), (arch, "additive", *args)


ADDITIVE_LAUNCHES = dict(additive_launches())


@pytest.fixture(scope="session")
def launched_additive(request: pytest.FixtureRequest):
    yield from in_processes(request, "additive", launched_kernels, ADDITIVE_LAUNCHES)


@pytest.mark.parametrize("additive", ADDITIVE_LAUNCHES)
def test_additive_attention_spills_nothing(additive: str, launched_additive: dict):
    found = launched_additive[additive]
    assert {name.split("-")[0] for name in found} >= {*ADDITIVE_KERNELS}
    for name, kernel in found.items():
        assert kernel.spills_in_loops == 0, (name, kernel)
        assert kernel.spilled <= 32, (name, kernel)  # bytes, around the loops
        assert kernel.shared <= SHARED_LIMIT[80]
        assert kernel.tensor_memory <= TENSOR_MEMORY_LIMIT


def test_lengths_compile_nothing_new():
    """Every number is read at run time: none of them may be specialised to 1 or to multiples of 16."""
    kernels = [kernel for kernel, _ in triton_cubin.KERNELS.values()]
    kernels += [backward.attention_statistics, decode.combine]
    kernels += [getattr(launch_additive.additive, name) for name in ADDITIVE_KERNELS]
    for kernel in kernels:
        for p in kernel.params:
            pointer = p.name[0].isupper() and p.name not in triton_cubin.LENGTHS
            assert p.is_constexpr or pointer or p.do_not_specialize, (kernel.__name__, p.name)


class Kernel:
    """Like Triton's of two pointers, a number and a constant; knows what it has compiled and what has run."""

    params = tuple(
        SimpleNamespace(num=n, is_constexpr=n == 3, do_not_specialize=n == 2) for n in range(4)
    )  # fmt: skip

    def __init__(self) -> None:
        self.compiled = 0
        self.ran: list[tuple] = []

    def __getitem__(self, grid: tuple[int]):
        def compile_and_run(*args, **constants):
            number = self.compiled = self.compiled + 1
            found = SimpleNamespace(function=number, packed_metadata=None)
            found.run = lambda *args: self.ran.append((number, args[0], *args[-4:]))
            return found

        return compile_and_run


def test_every_specialisation_has_its_kernel(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", triton_launch.Absent(90))
    kernel, tile = Kernel(), tables.Tile(16, 0, 4, 2)
    x = torch.zeros(64)
    half = x.half()
    calls = [
        (tile, x, x, 1.0, False),
        (tile, x[1:], x, 1.0, False),  # not at a multiple of 16 bytes
        (tile, x, x[1:], 1.0, False),
        (tile, x, None, 1.0, False),
        (tile, x, half, 1.0, False),
        (tile, x, x, 1.0, True),
        (tile._replace(warps=8), x, x, 1.0, False),
        (tile._replace(stages=3), x, x, 1.0, False),
        (tile._replace(BM=32), x, x, 1.0, False),
    ]
    for n in range(2):
        for tile, a, b, number, flag in calls:
            launch.launch(kernel, 5, tile, a, b, number + n, F=flag)
        assert kernel.compiled == len(calls)
    launch.launch(kernel, 7, tile, x[4:], x[32:], 3.0, F=False)  # other addresses, as much aligned
    assert kernel.compiled == len(calls)
    assert [number for number, *_ in kernel.ran] == [*range(1, len(calls) + 1), len(calls)]
    assert kernel.ran[0] == (1, 5, x.data_ptr(), 2.0, False, 16)
    assert kernel.ran[3][2:5] == (None, 2.0, False)
    assert kernel.ran[-1][1:] == (7, x[32:].data_ptr(), 3.0, False, 32)


def test_profilers_see_every_launch(monkeypatch):
    """Triton itself launches what its hooks are told of."""
    monkeypatch.setattr(triton.runtime.driver, "_active", triton_launch.Absent(90))
    kernel, x = Kernel(), torch.zeros(4)
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    try:
        for n in range(3):
            launch.launch(kernel, 1, tables.Tile(16, 0, 4, 2), x, x, 1.0, F=False)
            assert kernel.compiled == n + 1
    finally:
        hook.remove(print)
    launch.launch(kernel, 1, tables.Tile(16, 0, 4, 2), x, x, 1.0, F=False)
    assert kernel.compiled == 3
    assert len(kernel.ran) == 1


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def restored_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((launch, "multiprocessors"), (decode, "key_splits"), (decode, "is_packed")):
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("times", [1, 16])
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name: str, times: int, restored_grid):
    """Within one tile, and over several."""
    set_grid(CASES[name]["grid"])
    check(CASES[name], "cuda", times)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", UNITS)
def test_unit_on_gpu(name: str):
    failure = failure_of(partial(UNITS[name], "cuda"))
    assert failure is None, failure


def _run(q, k, v):
    limits = (2**62, 0, True)
    rest = (None, None, None, None, None, None, q.size(-1) ** -0.5, 0.0, *limits, 0.0, None, 0, 0)
    out, lse = launch.attention_fwd(q, k, v, *rest)
    return out, lse, *launch.attention_bwd(out, None, q, k, v, out, lse, *rest, False)[:3]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("Tq", [1, 8, 1000])
def test_same_bits_every_time_on_gpu(Tq: int):
    q, k, v = (
        torch.randn(2, h, t, 128, device="cuda", dtype=torch.bfloat16)
        for h, t in ((8, Tq), (2, 1500), (2, 1500))
    )
    first = _run(q, k, v)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, _run(q, k, v), strict=True))


@pytest.mark.gpu
@needs_gpu
def test_calls_that_differ_in_what_is_compiled_on_gpu():
    """In turn, with the same shapes: pointers that 16 bytes do not divide, a mask that goes away."""
    memory = torch.randn(3, 2 * 4 * 300 * 64 + 8, device="cuda", dtype=torch.float16)
    mask = torch.randn(2, 1, 300, 300, device="cuda", dtype=torch.float16)

    def run(first: int, mask: torch.Tensor | None, copy: bool) -> list[torch.Tensor]:
        q, k, v = memory[:, first : first - 8 or None].view(3, 2, 4, 300, 64)
        if copy:
            q, k, v = q.clone(), k.clone(), v.clone()
        rest = (mask, *[None] * 5, 0.125, 0.0, 2**62, 2**62, False, 0.0, None, 0, 0)
        out, lse = launch.attention_fwd(q, k, v, *rest)
        return [out, lse, *launch.attention_bwd(out, None, q, k, v, out, lse, *rest, False)[:3]]

    for first, bias in ((0, mask), (0, None), (1, None), (0, None), (1, mask), (4, None), (0, mask)):
        expected = run(first, bias, True)
        for found, wanted in zip(run(first, bias, False), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
@needs_gpu
def test_graph_capture_on_gpu():
    """No call waits for the device, and a replay reads new values from the same tensors."""
    q, k, v = (torch.randn(2, 4, 300, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    _run(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _run(q, k, v)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, _run(q, k, v), strict=True))
