"""Hugging Face models give the same with attn_implementation="seqkernels" as with "sdpa"."""

import copy
import os
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask  # noqa: E402

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
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_padding_becomes_lengths(kind, padding, shape, mode, monkeypatch):
    seen = []

    def spy(*args, attend=integration.attend_with_lengths, **kwargs):
        seen.append((args[3], kwargs["lengths"].tolist()))
        return attend(*args, **kwargs)

    monkeypatch.setattr(integration, "attend_with_lengths", spy)
    with mode():
        models(kind)[0](**arguments(kind, padding))
    assert seen == [(None, [9, 5, 2])] * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("example", ["none", "right"])
def test_a_traced_model_takes_any_padding(kind, example):
    ours, theirs = (model.requires_grad_(False) for model in models(kind))
    inputs = padded(example)
    traced = torch.jit.trace(
        lambda x, mask: ours(x, attention_mask=mask)[0], tuple(inputs.values()), check_trace=False
    )
    for padding in PADDING:
        inputs = padded(padding)
        rows = inputs["attention_mask"].bool()
        assert_close(traced(*inputs.values())[rows], theirs(**inputs)[0][rows])


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("inside", [True, False])
def test_fake_tensors_have_no_values_to_decide_by(kind, inside):
    model, mode = models(kind)[0], FakeTensorMode(allow_non_fake_inputs=True)
    inputs = {name: mode.from_tensor(t) for name, t in padded("right").items()}
    with mode if inside else nullcontext():
        logits = model(**inputs).logits
    assert logits.shape == (3, 9, 50)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "record",
    [
        lambda f, x: torch.jit.trace(f, x, check_trace=False),
        lambda f, x: make_fx(f)(x),
        lambda f, _: lambda x: torch.vmap(f)(x[None])[0],
    ],
    ids=["trace", "make_fx", "vmap"],
)
def test_who_looks_on_gets_a_mask_for_all_values(record):
    right, left = (padded(padding)["attention_mask"].bool() for padding in ("right", "left"))
    sizes = {"batch_size": 3, "q_length": 4, "kv_length": 9, "q_offset": 5}
    recorded = record(lambda x: integration.make_mask(**sizes, attention_mask=x), right)
    assert torch.equal(recorded(left), sdpa_mask(**sizes, attention_mask=left))


def test_a_mask_of_bool_may_come_again_with_a_cache():
    inputs, results = padded("right"), []
    tokens, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    for model in models("llama"):
        model(tokens, attention_mask=mask)
        cache = transformers.DynamicCache(config=model.config)
        model(tokens[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
        rest = model(tokens[:, 5:], attention_mask=mask, past_key_values=cache)
        results.append(rest.logits[mask[:, 5:]])
    assert_close(*results)


def test_a_mask_of_bool_may_change_in_place():
    inputs = padded("right")
    tokens, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    ours, theirs = models("llama")
    ours(tokens, attention_mask=mask)
    mask.copy_(padded("left")["attention_mask"])
    assert_close(*(model(tokens, attention_mask=mask)[0][mask] for model in (ours, theirs)))


def test_a_mask_made_before_is_the_callers_to_change():
    padding = padded("right")["attention_mask"].bool()
    free = {"mask_function": bidirectional_mask_function, "allow_is_bidirectional_skip": True}
    mask = integration.make_mask(3, 9, 9, attention_mask=padding, **free)
    padding[:, 0] = False
    assert mask[:, :, :, 0].all()
    mask[:, :, :, 1] = False
    arguments, both = torch.randn(3, 3, 4, 9, 8), (integration.attend, sdpa_attention_forward)
    results = [attend(torch.nn.Module(), *arguments, mask, is_causal=False)[0] for attend in both]
    assert_close(*results)


def test_a_compiled_layer_takes_masks_made_outside():
    both = torch.compile(integration.attend, backend="eager", fullgraph=True), integration.attend
    arguments = torch.randn(3, 3, 4, 9, 8)
    for padding in ("right", "left"):
        mask = integration.make_mask(3, 9, 9, attention_mask=padded(padding)["attention_mask"].bool())
        results = [attend(torch.nn.Module(), *arguments, mask)[0] for attend in both]
        assert_close(*results)


@pytest.mark.parametrize(("queries", "rows"), [(1, 3), (3, 1)])
def test_learned_queries_come_once_for_all_rows(queries, rows):
    q, k, v = torch.randn(queries, 4, 5, 8), torch.randn(rows, 4, 9, 8), torch.randn(rows, 4, 9, 8)
    mask, results = torch.rand(3, 1, 5, 9) < 0.7, []
    mask[..., 0] = True
    for attend in (integration.attend, sdpa_attention_forward):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, _ = attend(torch.nn.Module(), *leaves, mask)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    assert_close(*results)


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


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_mask_says_what_is_causal_where_the_model_does_not(padding):
    config = transformers.MoonshineConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
    )
    theirs = transformers.MoonshineForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    ours = copy.deepcopy(theirs.eval())
    ours.set_attn_implementation("seqkernels")
    inputs = {f"decoder_{name}": t for name, t in padded(padding).items()}
    inputs["input_values"] = torch.randn(3, 2000)
    rows = inputs["decoder_attention_mask"].bool()
    assert_close(*(model(**inputs).logits[rows] for model in (ours, theirs)))


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("cache", [transformers.DynamicCache, transformers.StaticCache])
def test_a_model_may_cut_its_mask_to_the_newest_queries(padding, cache):
    config = transformers.Gemma4TextConfig(
        **SIZES | {"num_hidden_layers": 4},
        **TOKENS,
        intermediate_size=32,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=50,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        sliding_window=4,
    )
    theirs = transformers.Gemma4ForCausalLM._from_config(config, attn_implementation="sdpa")
    ours = copy.deepcopy(theirs.double().eval())
    ours.set_attn_implementation("seqkernels")
    length = {"max_cache_len": 16} if cache is transformers.StaticCache else {}
    inputs = padded(padding)
    for newest in (1, 2):
        arguments = [inputs | {"past_key_values": cache(config=config, **length)} for _ in range(2)]
        results = (m(**kw, logits_to_keep=newest) for m, kw in zip((ours, theirs), arguments, strict=True))
        assert_close(*(result.logits for result in results))


@pytest.mark.parametrize("padding", ["none", "right"])
def test_a_model_may_cut_its_mask_to_the_keys_there_are(padding):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "d_kv": 4, "d_ff": 32}
    config = transformers.Pix2StructTextConfig(**sizes, is_decoder=True, initializer_range=1.0)
    theirs = transformers.Pix2StructTextModel._from_config(config, attn_implementation="sdpa")
    ours = copy.deepcopy(theirs.eval())
    ours.set_attn_implementation("seqkernels")
    inputs = padded(padding)
    rows = inputs["attention_mask"].bool()
    assert_close(*(model(**inputs).logits[rows] for model in (ours, theirs)))


@pytest.mark.filterwarnings("ignore:seqkernels falls back")
@pytest.mark.parametrize("kind", ["Bloom", "BigBirdPegasus", "PegasusX", "MegatronBert", "Splinter"])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_models_that_know_only_eager_get_its_masks(kind, padding):
    sizes = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}
    sizes = SIZES | TOKENS | (sizes if "Pegasus" in kind else {})
    config = getattr(transformers, f"{kind}Config")(**sizes)
    classes = {"PegasusX": "ForConditionalGeneration", "MegatronBert": "Model", "Splinter": "Model"}
    theirs, ours = (
        getattr(transformers, kind + classes.get(kind, "ForCausalLM"))
        ._from_config(copy.deepcopy(config), attn_implementation=name)
        .eval()
        for name in ("eager", "seqkernels")
    )
    ours.load_state_dict(theirs.state_dict())
    inputs = padded(padding)
    rows = inputs["attention_mask"].bool()
    inputs |= {"decoder_input_ids": inputs["input_ids"]} if kind == "PegasusX" else {}
    assert_close(*(model(**inputs)[0][rows] for model in (ours, theirs)))


def test_a_model_that_attends_by_itself_says_so(monkeypatch):
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.BloomConfig(**SIZES, **TOKENS), attn_implementation="seqkernels"
    )
    monkeypatch.setattr(support, "_told", set())
    with pytest.warns(UserWarning, match="Bloom.* does not take its attention from transformers' registry"):
        model(**padded("none"))
    torch.compile(model, backend="eager", fullgraph=True)(**padded("none"), use_cache=False)
    monkeypatch.setenv("SEQKERNELS_STRICT", "1")
    with pytest.raises(RuntimeError, match="forbids falling back"):
        model(**padded("none"))


def test_a_mask_of_queries_and_keys_is_no_padding():
    mask = torch.zeros(5, 5).masked_fill(torch.rand(5, 5) < 0.3, -torch.inf).fill_diagonal_(0)  # RT-DETR's
    for rows in (3, 5):
        arguments, both = torch.randn(3, rows, 4, 5, 8), (integration.attend, sdpa_attention_forward)
        assert_close(*(attend(torch.nn.Module(), *arguments, mask)[0] for attend in both))


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


def test_weights_that_there_are_not_are_said_to_be_missing(monkeypatch):
    said, inputs = [], padded("right")
    ours, theirs = models("llama")
    monkeypatch.setattr(integration.logger, "warning_once", said.append)
    results = [model(**inputs, output_attentions=True) for model in (ours, theirs)]
    assert results[0].attentions == results[1].attentions == ()
    assert set(said) == {"seqkernels has no attention weights for output_attentions=True: only eager has"}


def test_training_with_dropout(monkeypatch):
    monkeypatch.setenv("SEQKERNELS_STRICT", "1")
    model, tokens = models("gpt2")[0].train(), padded("right")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.transformer.h[0].attn.attn_dropout.p, seen = 0.5, []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        model.zero_grad()
        model(**tokens).logits.sum().backward()
        seen.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert seen[0].isfinite().all()
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_a_model_that_says_which_keys_to_attend_to_is_refused():
    transformers = pytest.importorskip("transformers")
    from seqkernels.integrations.transformers import register

    register()
    config = transformers.DeepseekV32Config(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=3,
        max_position_embeddings=64,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="seqkernels").eval()
    with pytest.raises(ValueError, match="hands indices to its attention, which seqkernels does not know"):
        model(input_ids=torch.arange(12)[None])
