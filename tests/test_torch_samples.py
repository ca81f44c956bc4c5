"""torch's own samples and error samples for its modules, run against ours.

The samples come with torch (torch.testing._internal.common_modules); the checks follow its test_modules.py,
where some are expected failures for torch's CUDA modules (gradients twice, tensors that do not lie
contiguously), and one leaves them out (gradients in eval mode). Here none is, on any device.
"""

import copy
import pickle
from functools import partial

import pytest
import torch
from devices import DEVICES, NEEDS_GPU
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import seqkernels

cm = pytest.importorskip("torch.testing._internal.common_modules")

SAMPLES = {
    "RNN": partial(cm.module_inputs_torch_nn_RNN_GRU, is_rnn=True, with_packed_sequence=True),
    "GRU": partial(cm.module_inputs_torch_nn_RNN_GRU, is_rnn=False, with_packed_sequence=True),
    "LSTM": cm.module_inputs_torch_nn_LSTM,
    "RNNCell": partial(cm.module_inputs_torch_nn_RNN_GRU_Cell, is_rnn=True),
    "GRUCell": cm.module_inputs_torch_nn_RNN_GRU_Cell,
    "LSTMCell": cm.module_inputs_torch_nn_LSTMCell,
    "MultiheadAttention": cm.module_inputs_torch_nn_MultiheadAttention,
}
ERRORS = {
    "RNN": cm.module_error_inputs_torch_nn_RNN_GRU,
    "GRU": cm.module_error_inputs_torch_nn_RNN_GRU,
    "LSTM": cm.module_error_inputs_torch_nn_RNN_GRU,
    "RNNCell": cm.module_error_inputs_torch_nn_RNN_GRU_Cell,
    "GRUCell": cm.module_error_inputs_torch_nn_RNN_GRU_Cell,
    "LSTMCell": cm.module_error_inputs_torch_nn_LSTMCell,
}
kinds = pytest.mark.parametrize("kind", SAMPLES)
RECURRENT = [kind for kind in SAMPLES if kind != "MultiheadAttention"]  # attention on GPUs knows no float64
everywhere = pytest.mark.parametrize(
    ("kind", "device"),
    [
        *((kind, "cpu") for kind in SAMPLES),
        *(pytest.param(kind, "cuda", marks=NEEDS_GPU) for kind in RECURRENT),
    ],
)


def samples(kind: str, dtype: torch.dtype = torch.float64, training: bool = True, device: str = "cpu"):
    """(constructor, args, kwargs, sample) with requires_grad inputs; the constructor takes the class."""
    for sample in SAMPLES[kind](None, device=device, dtype=dtype, requires_grad=True, training=training):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs

        def construct(cls, args=args, kwargs=kwargs):
            return cls(*args, **kwargs, dtype=dtype, device=device).train(training)

        yield construct, sample.forward_input.args, sample.forward_input.kwargs, sample


def tensors(value: object) -> list[Tensor]:
    """All float tensors in nested outputs or arguments."""
    leaves = pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, PackedSequence))
    leaves = [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in leaves]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def rebuild(args: object, leaves: list[Tensor]) -> object:
    """`args` with its float tensors replaced in order."""
    replacements = iter(leaves)

    def replace(value: object) -> object:
        if isinstance(value, PackedSequence):
            return PackedSequence(next(replacements), *value[1:])
        return next(replacements) if isinstance(value, Tensor) and value.is_floating_point() else value

    return pytree.tree_map(replace, args, is_leaf=lambda v: isinstance(v, PackedSequence))


@everywhere
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward(kind, device, dtype, training):
    for construct, args, kwargs, sample in samples(kind, dtype, training, device):
        ours, theirs = construct(getattr(seqkernels, kind)), construct(getattr(nn, kind))
        ours.load_state_dict(theirs.state_dict())
        assert_close(tensors(ours(*args, **kwargs)), tensors(theirs(*args, **kwargs)))
        if sample.reference_fn is not None and not isinstance(args[0], PackedSequence):
            expected = sample.reference_fn(ours, *args, **kwargs)
            assert_close(ours(*args, **kwargs), expected)


def call(
    module: nn.Module, args, kwargs, count: int, names: list[str], *leaves: Tensor
) -> tuple[Tensor, ...]:
    """The module as a function of its `count` inputs and of its parameters."""
    args, kwargs = rebuild((args, kwargs), leaves[:count])
    weights = dict(zip(names, leaves[count:], strict=True))
    return tuple(tensors(functional_call(module, weights, args, kwargs)))


@everywhere
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_gradients(kind, device, check, training):
    for construct, args, kwargs, _ in samples(kind, training=training, device=device):
        module = construct(getattr(seqkernels, kind))
        inputs, parameters = tensors((args, kwargs)), dict(module.named_parameters())
        function = partial(call, module, args, kwargs, len(inputs), list(parameters))
        assert check(function, (*inputs, *parameters.values()), fast_mode=True)


@everywhere
def test_non_contiguous_tensors(kind, device):
    for construct, args, kwargs, _ in samples(kind, device=device):
        module = construct(getattr(seqkernels, kind))
        inputs = [t.detach().requires_grad_() for t in tensors((args, kwargs))]
        scattered = [
            torch.stack([t, torch.full_like(t, torch.nan)], -1).detach()[..., 0].requires_grad_()
            for t in inputs
        ]
        results = []
        for leaves in (inputs, scattered):
            new_args, new_kwargs = rebuild((args, kwargs), leaves)
            outputs = tensors(module(*new_args, **new_kwargs))
            grads = torch.autograd.grad(sum(o.sum() for o in outputs), [*leaves, *module.parameters()])
            results.append((outputs, grads))
        assert not any(t.is_contiguous() for t in scattered if t.numel() > 1)
        assert_close(results[0], results[1])


@everywhere
def test_inputs_are_not_modified(kind, device):
    for construct, args, kwargs, _ in samples(kind, device=device):
        module = construct(getattr(seqkernels, kind))
        everything = [*tensors((args, kwargs)), *module.parameters()]
        before = [(t.clone(), t._version) for t in everything]
        sum(o.sum() for o in tensors(module(*args, **kwargs))).backward()
        for tensor, (value, version) in zip(everything, before, strict=True):
            assert torch.equal(tensor, value)
            assert tensor._version == version


@everywhere
def test_pickle(kind, device):
    for construct, args, kwargs, _ in samples(kind, device=device):
        module = construct(getattr(seqkernels, kind))
        loaded = pickle.loads(pickle.dumps(module))
        assert type(loaded) is type(module)
        assert_close(tensors(loaded(*args, **kwargs)), tensors(module(*args, **kwargs)))


def moved(values: object, device: str) -> object:
    """Copies of all tensors on a device, leaves where the originals are."""

    def move(value: object) -> object:
        if isinstance(value, PackedSequence):
            return PackedSequence(move(value.data), *value[1:])
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(device, copy=True).requires_grad_(value.requires_grad)

    return pytree.tree_map(move, values, is_leaf=lambda v: isinstance(v, PackedSequence))


def outputs_and_gradients(module: nn.Module, args, kwargs) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    outputs = tensors(module(*args, **kwargs))
    loss = sum((o * o).sum() for o in outputs)
    leaves = [*tensors((args, kwargs)), *module.parameters()]
    return [o.cpu() for o in outputs], tuple(g.cpu() for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cpu_and_gpu_compute_the_same(kind, device, dtype, training):
    for construct, args, kwargs, _ in samples(kind, dtype, training):
        ours = construct(getattr(seqkernels, kind))
        theirs = construct(getattr(nn, kind))
        theirs.load_state_dict(ours.state_dict())
        there = copy.deepcopy(ours).to(device)
        result = outputs_and_gradients(there, *moved((args, kwargs), device))
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
        for module in (ours, theirs):
            assert_close(result, outputs_and_gradients(module, *moved((args, kwargs), "cpu")), **tolerance)


@kinds
def test_repr_is_torchs(kind):
    for construct, _, _, _ in samples(kind):
        assert repr(construct(getattr(seqkernels, kind))) == repr(construct(getattr(nn, kind)))


@kinds
def test_factory_kwargs(kind):
    for construct, _, _, _ in samples(kind, dtype=torch.float16, device="meta"):
        for parameter in construct(getattr(seqkernels, kind)).parameters():
            assert (parameter.dtype, parameter.device.type) == (torch.float16, "meta")


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_errors(kind, dtype):
    cls = getattr(seqkernels, kind)
    for error in ERRORS[kind](None, device="cpu", dtype=dtype, requires_grad=False, training=True):
        sample = error.module_error_input
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        if error.error_on is cm.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                cls(*args, **kwargs)
        else:
            module = cls(*args, **({"dtype": dtype} | kwargs))
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*sample.forward_input.args, **sample.forward_input.kwargs)
