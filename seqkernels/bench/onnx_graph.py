"""A torch.nn recurrent module as an ONNX model for ONNX Runtime, forward in float32.

Built by hand from the operators LSTM, GRU and RNN, because torch.onnx may export something slower than
these. ONNX stacks the gates in another order (LSTM i,o,f,c and GRU z,r,h; torch has i,f,g,o and r,z,n) and
torch's GRU is the variant with linear_before_reset.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from .cases import GATES, Case

SPIN_DURATION_SINCE = (1, 32)  # the first version that we have seen take it
GATE_ORDER = {"lstm": [0, 3, 1, 2], "gru": [1, 0, 2], "rnn": [0]}  # ONNX's gate k is torch's GATE_ORDER[k]


def layer_weights(cell: str, weights: list[Tensor]) -> dict[str, np.ndarray]:
    """W [D, G*H, I], R [D, G*H, H], B [D, 2*G*H] of a layer from w_ih, w_hh, b_ih, b_hh per direction."""

    def reorder(weight: Tensor) -> Tensor:
        gates = weight.detach().float().chunk(GATES[cell])
        return torch.cat([gates[k] for k in GATE_ORDER[cell]])

    w_ih, w_hh, b_ih, b_hh = ([reorder(w) for w in weights[k::4]] for k in range(4))
    biases = [torch.cat(pair) for pair in zip(b_ih, b_hh, strict=True)]
    return {"W": torch.stack(w_ih).numpy(), "R": torch.stack(w_hh).numpy(), "B": torch.stack(biases).numpy()}


def build(case: Case, module: nn.Module) -> bytes:
    """Serialized: x [T, B, I], h0 (and c0) [layers*D, B, H], lengths [B] -> y [T, B, D*H], hn (and cn)."""
    D, states = case.directions, ["h", "c"] if case.cell == "lstm" else ["h"]
    weights = list(module.parameters())
    nodes, constants = [], {"split": np.array([D] * case.layers)}
    constants |= {"axis": np.array([1])} if D == 1 else {"merged": np.array([0, 0, -1])}
    attributes = {"hidden_size": case.H, "direction": "bidirectional" if case.bidirectional else "forward"}
    attributes |= {"linear_before_reset": 1} if case.cell == "gru" else {}
    for state in states:
        pieces = [f"{state}0_{layer}" for layer in range(case.layers)]
        nodes.append(helper.make_node("Split", [f"{state}0", "split"], pieces, axis=0))
    x = "x"
    for layer in range(case.layers):
        for name, value in layer_weights(case.cell, weights[4 * D * layer : 4 * D * (layer + 1)]).items():
            constants[f"{name}_{layer}"] = value
        inputs = [x, f"W_{layer}", f"R_{layer}", f"B_{layer}", "lengths" if case.fill is not None else ""]
        inputs += [f"{state}0_{layer}" for state in states]
        outputs = [f"Y_{layer}"] + [f"{state}n_{layer}" for state in states]
        nodes.append(helper.make_node(case.cell.upper(), inputs, outputs, **attributes))
        x = "y" if layer == case.layers - 1 else f"y_{layer}"
        if D == 1:
            nodes.append(helper.make_node("Squeeze", [f"Y_{layer}", "axis"], [x]))
        else:  # [T, D, B, H] -> [T, B, D*H]
            nodes.append(helper.make_node("Transpose", [f"Y_{layer}"], [f"Yt_{layer}"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"Yt_{layer}", "merged"], [x]))
    for state in states:
        pieces = [f"{state}n_{layer}" for layer in range(case.layers)]
        nodes.append(helper.make_node("Concat", pieces, [f"{state}n"], axis=0))

    state_shape = [D * case.layers, case.B, case.H]
    float32, describe = TensorProto.FLOAT, helper.make_tensor_value_info
    inputs = [describe("x", float32, [case.T, case.B, case.I])]
    inputs += [describe(f"{state}0", float32, state_shape) for state in states]
    inputs += [describe("lengths", TensorProto.INT32, [case.B])] if case.fill is not None else []
    outputs = [describe("y", float32, [case.T, case.B, D * case.H])]
    outputs += [describe(f"{state}n", float32, state_shape) for state in states]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, case.cell, inputs, outputs, initializers)
    # Opset 14 and IR 8 have all that is needed and are read by every ONNX Runtime of the last years.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    return model.SerializeToString()


def session_call(
    case: Case, module: nn.Module, x: Tensor | PackedSequence, hx: tuple[Tensor, ...]
) -> Callable[[], list[np.ndarray]]:
    """The call to time; it returns y (padded), hn (and cn)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin for long after a run would slow down whoever is measured next, but those that sleep at
    # once take 3 to 18 % of a short call to wake. As long as libgomp's, where that can be said.
    can_say = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= SPIN_DURATION_SINCE
    key, value = ("intra_op.spin_duration_us", "4000") if can_say else ("force_spinning_stop", "1")
    options.add_session_config_entry(f"session.{key}", value)
    session = onnxruntime.InferenceSession(build(case, module), options, providers=["CPUExecutionProvider"])
    feed = {name: state.numpy() for name, state in zip(("h0", "c0"), hx, strict=False)}
    if isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(x)
        feed |= {"x": padded.numpy(), "lengths": lengths.int().numpy()}
    else:
        feed["x"] = x.numpy()
    return lambda: session.run(None, feed)
