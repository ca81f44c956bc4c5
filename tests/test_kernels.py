"""The kernels without torch, on NumPy arrays, with every instruction set that this machine supports."""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import DTypeLike
from peak import resident

from seqkernels import _kernels

Arrays = dict[str, np.ndarray]
GATES = {"lstm": 4, "projection": 4, "gru": 3, "tanh": 1, "relu": 1}


@pytest.fixture(params=_kernels.supported_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _kernels.active_isa()
    _kernels.force_isa(request.param)
    yield request.param
    _kernels.force_isa(before)


# Layers -----------------------------------------------------------------------------------------------------


def layer(
    cell: str, dtype: DTypeLike, T: int, B: int, inputs: int, H: int, D: int, lengths: list[int] | None = None
) -> dict:
    """Arguments of a forward call; rows of `lengths` make it packed."""
    random = np.random.default_rng(0)

    def values(*shape: int, fan_in: int = 1) -> np.ndarray:
        return random.uniform(-1, 1, shape).astype(dtype) / np.asarray(np.sqrt(fan_in), dtype)

    G, P = GATES[cell], 5 if cell == "projection" else H
    weights = []
    for _ in range(D):
        weights += [values(G * H, inputs, fan_in=inputs), values(G * H, P, fan_in=P)]
        weights += [values(G * H), values(G * H)]
        weights += [values(P, H, fan_in=H)] if cell == "projection" else []
    sizes = [B] * T if lengths is None else [sum(n > t for n in lengths) for t in range(T)]
    arguments = {"x": values(*((T, B) if lengths is None else (sum(sizes),)), inputs), "h0": values(D, B, P)}
    arguments |= {"weights": weights} | ({"c0": values(D, B, H)} if G == 4 else {})
    if lengths is not None:
        arguments["batch_sizes"] = np.array(sizes, np.int64)
    return arguments | ({"relu": cell == "relu"} if G == 1 else {})


def kernel(cell: str, step: str):
    name = {"projection": "lstm", "tanh": "rnn", "relu": "rnn"}.get(cell, cell)
    return getattr(_kernels, f"{name}_{step}")


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def reference(cell: str, arguments: dict) -> Arrays:
    """Step by step in long double: what forward has to return."""
    weights = [w.astype(np.longdouble) for w in arguments["weights"]]
    x, h0 = arguments["x"].astype(np.longdouble), arguments["h0"].astype(np.longdouble)
    c0 = arguments.get("c0", h0).astype(np.longdouble)
    D, B, P = h0.shape
    sizes = arguments.get("batch_sizes", [B] * len(x))
    resets = arguments.get("resets", np.zeros((len(sizes), B), bool))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    tokens = x.reshape(-1, x.shape[-1])
    y, cells = np.zeros((len(tokens), D * P)), np.zeros((len(tokens), D * c0.shape[2]))
    hn, cn = h0.copy(), c0.copy()
    for d in range(D):
        w_ih, w_hh, b_ih, b_hh, *w_hr = weights[d * len(weights) // D : (d + 1) * len(weights) // D]
        for t in range(len(sizes))[:: -1 if d else 1]:
            n = sizes[t]
            rows = slice(starts[t], starts[t] + n)
            h = np.where(resets[t, :n, None], h0[d, :n], hn[d, :n])
            c = np.where(resets[t, :n, None], c0[d, :n], cn[d, :n])
            a, r = tokens[rows] @ w_ih.T + b_ih, h @ w_hh.T + b_hh
            if GATES[cell] == 4:
                i, f, g, o = np.split(a + r, 4, axis=1)
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
                h = h @ w_hr[0].T if w_hr else h
                cn[d, :n] = c
                cells[rows, d * c.shape[1] : (d + 1) * c.shape[1]] = c
            elif cell == "gru":
                (ar, az, an), (rr, rz, rn) = np.split(a, 3, axis=1), np.split(r, 3, axis=1)
                z = sigmoid(az + rz)
                h = (1 - z) * np.tanh(an + sigmoid(ar + rr) * rn) + z * h
            else:
                h = np.tanh(a + r) if cell == "tanh" else np.maximum(a + r, 0)
            hn[d, :n] = h
            y[rows, d * P : (d + 1) * P] = h
    shape = x.shape[:-1]
    result = {"y": y.reshape(*shape, D * P), "hn": hn}
    return result | ({"cn": cn, "cells": cells.reshape(*shape, -1)} if GATES[cell] == 4 else {})


CELLS = pytest.mark.parametrize("cell", GATES)
SEQUENCES = pytest.mark.parametrize("sequence", ["dense", "resets", "batch first", "packed"])


def sequence_of(cell: str, sequence: str, dtype: DTypeLike, H: int = 19, D: int = 2) -> dict:
    lengths = [6, 4, 4, 1, 0] if sequence == "packed" else None
    arguments = layer(cell, dtype, T=6, B=5, inputs=7, H=H, D=D, lengths=lengths)
    if sequence == "resets":
        arguments["resets"] = np.random.default_rng(1).random((6, 5)) < 0.3
    if sequence == "batch first":
        arguments["x"] = arguments["x"].swapaxes(0, 1).copy().swapaxes(0, 1)
    return arguments


@CELLS
@SEQUENCES
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_forward_is_the_equations(cell, sequence, dtype):
    arguments = sequence_of(cell, sequence, dtype)
    got, expected = kernel(cell, "fwd")(**arguments), reference(cell, arguments)
    assert got.keys() - {"gates"} == expected.keys()
    for name, truth in expected.items():
        assert got[name].dtype == dtype
        assert got[name].shape == truth.shape
        np.testing.assert_allclose(got[name], truth, rtol=0, atol=16 * np.finfo(dtype).eps, err_msg=name)


@CELLS
@SEQUENCES
@pytest.mark.parametrize("save_gates", [True, False])
def test_backward_is_the_slope_of_forward(cell, sequence, save_gates):
    """Along a random direction in the space of all inputs, by central differences of the reference."""
    arguments = sequence_of(cell, sequence, np.float64, H=9)
    random = np.random.default_rng(2)
    keep = {"save_gates": save_gates} if GATES[cell] > 1 else {}
    outputs = kernel(cell, "fwd")(**arguments, **keep)
    names = {"y": "dy", "hn": "dhn", "cn": "dcn", "cells": "dcells"}
    slopes = {n: random.uniform(-1, 1, outputs[n].shape) for n in names if n in outputs}
    given = {n: v for n, v in outputs.items() if n in ("y", "cells", "gates")}
    grads = kernel(cell, "bwd")(**arguments, **given, **{names[n]: v for n, v in slopes.items()})

    inputs = [arguments[n] for n in ("x", "h0", "c0") if n in arguments] + arguments["weights"]
    gradients = [grads[n] for n in ("dx", "dh0", "dc0") if n in grads] + grads["dweights"]
    steps = [random.uniform(-1, 1, v.shape) for v in inputs]
    assert [g.shape for g in gradients] == [v.shape for v in inputs]

    def loss(size: float) -> np.longdouble:
        moved = [v + size * s for v, s in zip(inputs, steps, strict=True)]
        at = arguments | {"x": moved[0], "h0": moved[1], "weights": moved[-len(arguments["weights"]) :]}
        at |= {"c0": moved[2]} if "c0" in arguments else {}
        result = reference(cell, at)
        return sum(np.sum(result[n] * v) for n, v in slopes.items())

    expected = (loss(1e-5) - loss(-1e-5)) / 2e-5
    terms = [np.sum(g * s) for g, s in zip(gradients, steps, strict=True)]
    assert abs(sum(terms) - expected) < 1e-7 * max(1, *map(abs, terms))


@CELLS
def test_threads_and_repetition(cell):
    """Enough work for three threads: as exact as with one, the same bits every time, inputs as they were."""
    arguments = layer(cell, np.float32, T=12, B=9, inputs=40, H=48, D=2)
    before = {n: v.copy() for n, v in arguments.items() if isinstance(v, np.ndarray)}
    one = kernel(cell, "fwd")(**arguments)
    for threads in (2, 3):
        many, again = (kernel(cell, "fwd")(**arguments, threads=threads) for _ in range(2))
        for name, value in one.items():
            np.testing.assert_allclose(many[name], value, rtol=0, atol=2e-6, err_msg=name)
            assert many[name].tobytes() == again[name].tobytes(), name
        given = {n: one[n] for n in ("y", "cells", "gates") if n in one} | {"dy": one["y"]}
        many, again = (kernel(cell, "bwd")(**arguments, **given, threads=threads) for _ in range(2))
        assert many["dx"].tobytes() == again["dx"].tobytes()
        for first, second in zip(many["dweights"], again["dweights"], strict=True):
            assert first.tobytes() == second.tobytes()
    for name, value in before.items():
        np.testing.assert_array_equal(arguments[name], value)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_bits_do_not_depend_on_who_computes(cell):
    """Where one thread is slower, units are shared out anew: here one loses its core at times."""
    arguments = layer(cell, np.float32, T=60, B=16, inputs=32, H=320, D=1)
    one = kernel(cell, "fwd")(**arguments, threads=2)
    given = {n: one[n] for n in ("y", "cells", "gates") if n in one} | {"dy": one["y"]}
    slopes = kernel(cell, "bwd")(**arguments, **given, threads=2)
    command = [sys.executable, "-c", "import time; end = time.time() + 20\nwhile time.time() < end: pass"]
    with subprocess.Popen(command) as other:
        for _ in range(5):
            again = kernel(cell, "fwd")(**arguments, threads=2)
            assert all(again[name].tobytes() == value.tobytes() for name, value in one.items())
            again = kernel(cell, "bwd")(**arguments, **given, threads=2)
            assert again["dx"].tobytes() == slopes["dx"].tobytes()
            for first, second in zip(again["dweights"], slopes["dweights"], strict=True):
                assert first.tobytes() == second.tobytes()
        other.kill()


WRONG = {
    "x": np.zeros((6, 5, 8), np.float32),
    "h0": np.zeros((2, 5, 20), np.float32),
    "c0": np.zeros((2, 5, 19)),
    "weights": [np.zeros((76, 7), np.float32)],
    "resets": np.zeros((6, 5), np.int32),
    "batch_sizes": np.array([5, 4], np.int64),
    "threads": 0,
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name):
    arguments = sequence_of("lstm", "dense", np.float32) | {name: WRONG[name]}
    with pytest.raises(ValueError, match="expected"):
        _kernels.lstm_fwd(**arguments)


def test_unknown_and_missing_arguments_are_refused():
    arguments = sequence_of("gru", "dense", np.float32)
    with pytest.raises(TypeError, match="unexpected argument: relu"):
        _kernels.gru_fwd(**arguments, relu=True)
    with pytest.raises(TypeError, match="missing argument: y"):
        _kernels.gru_bwd(**arguments)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_scratch_memory_does_not_grow():
    small, large = (layer("lstm", np.float32, T=3, B=4, inputs=8, H=H, D=1) for H in (8, 96))

    def calls(n: int) -> None:
        for _ in range(n):
            for arguments in (small, large):
                out = _kernels.lstm_fwd(**arguments)
                given = {name: out[name] for name in ("y", "cells", "gates")}
                _kernels.lstm_bwd(**arguments, **given, dy=out["y"])

    calls(20)
    before = resident()
    calls(250)  # 1000 kernel calls, each with some 300 KB of scratch for the large layer
    assert resident() - before < 2 << 20


# Vector functions -------------------------------------------------------------------------------------------


def arguments_of(dtype: DTypeLike) -> np.ndarray:
    """The whole range: every binade, the linear and the saturated part, denormals; in both signs."""
    info, random = np.finfo(dtype), np.random.default_rng(3)
    tiny, largest = np.log2(info.smallest_subnormal), np.log2(info.max)
    x = np.concatenate(
        [
            np.exp2(random.uniform(float(tiny), float(largest), 20000)),
            random.uniform(0, 30, 100000),
            random.uniform(0, 800, 20000),
            info.tiny * random.uniform(0, 2, 2000),
            [0, info.smallest_subnormal, info.tiny, info.eps, info.max],
        ]
    ).astype(dtype)
    return np.concatenate([x, -x])


def ulps(got: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Errors in units of the last place of the truth; among denormals that unit is the smallest one."""
    info = np.finfo(got.dtype)
    exponent = np.frexp(np.maximum(np.abs(truth), info.tiny))[1]
    return np.abs(got - truth) / np.ldexp(np.longdouble(1), exponent - info.nmant - 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_vector_functions_are_within_4_ulp(name, dtype):
    x = arguments_of(dtype)
    # float32 has its truth in float64 (exact to 1e-16); float64 needs the 11 more bits of an x86 long double.
    wide = x.astype(np.float64 if dtype == np.float32 else np.longdouble)
    with np.errstate(over="ignore", under="ignore"):
        truth = np.tanh(wide) if name == "tanh" else sigmoid(wide)
    got = getattr(_kernels, name)(x)
    assert got.dtype == dtype
    error = ulps(got, truth)
    # From here down sigmoid may be zero: where it would be denormal, or (float64) below 1e-304.
    flushed = (name == "sigmoid") & (x < (-87 if dtype == np.float32 else -700)) & (got == 0)
    worst = np.argmax(np.where(flushed, 0, error))
    assert error[worst] <= 4, f"{name}({x[worst]!r}) = {got[worst]!r}: off by {float(error[worst]):.2f} ulp"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_vector_functions_at_the_edges(dtype):
    """Also in every lane, and at the end of an array that is no multiple of the vector."""
    inf, nan = np.inf, np.nan
    x = np.array([0, -0.0, inf, -inf, 100, -1000, nan], dtype)
    for shift in range(16):
        row = np.concatenate([np.ones(shift, dtype), x])
        sigmoid_row, tanh_row = _kernels.sigmoid(row)[shift:], _kernels.tanh(row)[shift:]
        np.testing.assert_array_equal(sigmoid_row, np.array([0.5, 0.5, 1, 0, 1, 0, nan], dtype))
        np.testing.assert_array_equal(tanh_row, np.array([0, 0, 1, -1, 1, -1, nan], dtype))
    assert np.all(np.abs(_kernels.tanh(arguments_of(dtype))) <= 1)


def test_fma_peak_is_plausible():
    """Vectors of float64 have half the lanes. Other programs disturb the measurement, hence the attempts."""

    def ratio() -> float:
        single, double = (_kernels.fma_peak(dtype, 1) for dtype in ("float32", "float64"))
        assert 0.1 < double < 1000  # GF/s of one core; AVX-512 at 5 GHz: 160
        return single / double

    assert any(1.5 < ratio() < 3 for _ in range(5))
    with pytest.raises(ValueError, match="float33"):
        _kernels.fma_peak("float33", 1)
    with pytest.raises(ValueError, match="threads"):
        _kernels.fma_peak("float32", 0)
