"""Hugging Face models give the same with attn_implementation="seqkernels" as with "sdpa"."""

import copy
import os

import pytest
import torch
from torch.testing import assert_close

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

from seqkernels import support  # noqa: E402
from seqkernels.integrations import transformers as integration  # noqa: E402

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES, intermediate_size=32, pad_token_id=0),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=4, n_positions=64, vocab_size=50, **TOKENS
    ),
    "llama": lambda: transformers.LlamaConfig(**SIZES, intermediate_size=32, num_key_value_heads=2, **TOKENS),
    "mistral": lambda: transformers.MistralConfig(
        **SIZES, intermediate_size=32, num_key_value_heads=2, sliding_window=4, **TOKENS
    ),
    "t5": lambda: transformers.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        **TOKENS,
    ),
}
CLASSES = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
DECODERS = ["gpt2", "llama", "mistral", "t5"]
PADDING = {"none": [9, 9, 9], "right": [9, 5, 2], "left": [-9, -5, -2], "holes": None}


@pytest.fixture(autouse=True, scope="module")
def registered():
    integration.register()


def models(kind: str):
    """[ours, torch's] with the same weights."""
    config = CONFIGS[kind]()
    cls = getattr(transformers, CLASSES.get(kind, "AutoModelForCausalLM"))
    theirs = cls.from_config(config, attn_implementation="sdpa").double().eval()
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("seqkernels")
    return [ours, theirs]


def padded(padding: str) -> dict[str, torch.Tensor]:
    tokens, keep = torch.randint(3, 50, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    if padding == "holes":
        keep[0, 3] = keep[1, 7] = keep[2, 0] = 0
    else:
        for row, length in zip(keep, PADDING[padding], strict=True):
            row[length:] = 0
            if length < 0:
                row[:length] = 0
                row[length:] = 1
    return {"input_ids": tokens.masked_fill(keep == 0, 0), "attention_mask": keep}


def arguments(kind: str, padding: str) -> dict[str, torch.Tensor]:
    inputs = padded(padding)
    return inputs | ({"decoder_input_ids": torch.randint(3, 50, (3, 6))} if kind == "t5" else {})


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("padding", PADDING)
def test_logits_and_gradients(kind, padding, monkeypatch):
    monkeypatch.setenv("SEQKERNELS_STRICT", "1")
    inputs, results = arguments(kind, padding), []
    for model in models(kind):
        logits = model(**inputs).logits
        rows = slice(None) if kind == "t5" else inputs["attention_mask"].bool()
        grads = torch.autograd.grad(logits[rows].sin().sum(), list(model.parameters()), allow_unused=True)
        results.append((logits[rows], [g for g in grads if g is not None]))
    assert_close(*results)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_generation(kind, padding, cache):
    inputs = padded(padding)
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": cache is not None}
    options |= {"cache_implementation": cache} if cache == "static" else {}
    generated = [model.generate(**inputs, **options, disable_compile=True) for model in models(kind)]
    assert torch.equal(*generated)


def test_a_cache_grows_by_many_tokens_at_once():
    inputs = padded("left")
    results = []
    for model in models("llama"):
        cache = transformers.DynamicCache(config=model.config)
        model(
            input_ids=inputs["input_ids"][:, :5],
            attention_mask=inputs["attention_mask"][:, :5],
            past_key_values=cache,
        )
        rest = model(
            input_ids=inputs["input_ids"][:, 5:],
            attention_mask=inputs["attention_mask"],
            past_key_values=cache,
        )
        results.append(rest.logits[inputs["attention_mask"][:, 5:].bool()])
    assert_close(*results)


@pytest.mark.parametrize(
    ("kind", "padding", "shape"), [("llama", "right", (3, 9)), ("bert", "right", (3, 1, 1, 9))]
)
def test_padding_becomes_lengths(kind, padding, shape, monkeypatch):
    seen = []

    def spy(*args, attend=integration.attend_with_lengths, **kwargs):
        seen.append((args[3], kwargs["lengths"].tolist()))
        return attend(*args, **kwargs)

    monkeypatch.setattr(integration, "attend_with_lengths", spy)
    models(kind)[0](**arguments(kind, padding))
    assert seen == [(None, [9, 5, 2])] * 2


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_mask_of_four_dims_is_taken_as_it_is(kind):
    inputs = padded("none")
    mask = torch.rand(3, 1, 9, 9) < 0.7
    mask[..., 0] = True
    additive = torch.zeros(3, 1, 9, 9, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    ours, theirs = models(kind)
    for m in (mask, additive):
        results = [model(input_ids=inputs["input_ids"], attention_mask=m).logits for model in (ours, theirs)]
        assert_close(*results)


def test_softcap_and_sinks():
    module = torch.nn.Module()
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    sinks = torch.randn(4)
    out, weights = integration.attend(module, q, k, v, None, softcap=3.0, s_aux=sinks, scaling=0.3)
    scores = 3 * (0.3 * q @ k.repeat_interleave(2, 1).mT / 3).tanh()
    scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    p = torch.cat([scores, sinks[:, None, None].expand(2, 4, 5, 1)], -1).softmax(-1)[..., :-1]
    assert_close(out, (p @ v.repeat_interleave(2, 1)).transpose(1, 2))
    assert weights is None


def test_training_with_dropout_says_that_torch_runs(monkeypatch):
    monkeypatch.setattr(support, "_told", set())
    model = models("gpt2")[0].train()
    with pytest.warns(UserWarning, match="the attention kernels for cpu tensors have no dropout"):
        model(**padded("right")).logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
