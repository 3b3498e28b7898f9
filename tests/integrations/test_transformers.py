"""transformers' models on these kernels: tiny ones with random weights, against its eager code."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    NEEDS_CUDA,
    NEEDS_TRANSFORMERS,
    NEEDS_TRANSFORMERS_5,
    NEEDS_TRANSFORMERS_5_23,
    assert_close_2x,
    assert_equals,
    cu_seqlens,
    require,
    skip_is_allowed,
)
from torch import Tensor

import flash_attn_ext as fa
from flash_attn_ext._after_import import is_waited_for
from flash_attn_ext.integrations import transformers as integration

if skip_is_allowed(NEEDS_TRANSFORMERS):
    pytest.skip(NEEDS_TRANSFORMERS, allow_module_level=True)

import transformers
import transformers.modeling_utils  # registration follows it, before any test changes something

VOCABULARY = 97
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2 window": (
        "Qwen2",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 16}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 5, "head_dim": 12}),
    "gemma2": (
        "Gemma2",
        {**GROUPED, "head_dim": 16, "sliding_window": 5, "attn_logit_softcapping": 2.0},
    ),
    "phi": ("Phi", SMALL),
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


def model_of(
    family: str, options: dict[str, Any], device: str, kind: str = "ForCausalLM", seed: int = 0
) -> Any:
    """A model in eval mode with weights that make attention matter."""
    config = getattr(transformers, f"{family}Config")(**options)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    return model.to(device)


def tokens(batch_size: int, seqlen: int, device: str) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch_size, seqlen)).to(device)


def run(model: Any, implementation: str, dtype: torch.dtype, **inputs: Any) -> Tensor:
    """Logits, or hidden states of a model without a head."""
    model.set_attn_implementation(implementation)
    model.to(dtype)
    with torch.no_grad():
        result = model(**inputs)
    return result.logits if "logits" in result else result.last_hidden_state


def assert_as_eager(model: Any, device: str, ids: Tensor, kept: Tensor | None = None) -> None:
    """Error at most twice that of eager in the same type, each valid token against fp64.

    In fp64 every sequence runs alone: eager's mask overflows there, because it is -1.8e308 and its
    softmax is computed in fp32.

    Args:
        model: on the device.
        device: its name.
        ids: [batch, seqlen].
        kept: [batch, seqlen], False where padded; None: not padded.
    """
    dtype = DTYPES[device]
    state = {name: x.clone() for name, x in model.state_dict().items()}
    inputs = {"input_ids": ids}
    if kept is None:
        kept = torch.ones_like(ids, dtype=torch.bool)
    else:
        inputs = {"input_ids": ids * kept, "attention_mask": kept.long()}
    ours = run(model, integration.NAME, dtype, **inputs)[kept]
    plain = run(model, "eager", dtype, **inputs)[kept]
    rows = [row[valid][None] for row, valid in zip(ids, kept, strict=True)]
    exact = torch.cat([run(model, "eager", torch.float64, input_ids=x)[0] for x in rows])
    model.to(dtype).load_state_dict(state)
    assert (ours - exact).abs().max() < 0.1 * exact.abs().max()  # so that 2x is not 2x of nonsense
    assert_close_2x(ours, exact, plain)


@pytest.mark.parametrize("name", list(DECODERS))
def test_decoders(name: str, device: str) -> None:
    """Dense, then padded on the left and on the right, longer than every window."""
    model = model_of(*DECODERS[name], device)
    ids = tokens(3, 14, device)
    assert_as_eager(model, device, ids)
    for side in ("left", "right"):
        lengths = torch.tensor([14, 9, 3], device=device)
        kept = torch.arange(14, device=device) < lengths[:, None]
        kept = kept.flip(1) if side == "left" else kept
        assert_as_eager(model, device, ids, kept)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("form", ["position_ids", "cu_seqlens"])
def test_packed(name: str, form: str, device: str) -> None:
    """Sequences in one row do not see each other."""
    model = model_of(*DECODERS[name], device)
    lengths = [5, 1, 11]
    ids = tokens(1, sum(lengths), device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(device)
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions}
    if form == "cu_seqlens":
        lengths_tensor = cu_seqlens(lengths, device)
        inputs |= {"cu_seq_lens_q": lengths_tensor, "cu_seq_lens_k": lengths_tensor}
        inputs |= {"max_length_q": 11, "max_length_k": 11}
    dtype = DTYPES[device]
    out = run(model, integration.NAME, dtype, **inputs, use_cache=False)[0]
    plain = [run(model, "eager", dtype, input_ids=x)[0] for x in ids.split(lengths, 1)]
    exact = [run(model, "eager", torch.float64, input_ids=x)[0] for x in ids.split(lengths, 1)]
    assert_close_2x(out, torch.cat(exact), torch.cat(plain))


def test_encoder(device: str) -> None:
    model = model_of("Bert", {**SMALL, "is_decoder": False}, device, kind="Model")
    ids = tokens(3, 14, device)
    assert_as_eager(model, device, ids)
    kept = torch.arange(14, device=device) < torch.tensor([14, 9, 3], device=device)[:, None]
    assert_as_eager(model, device, ids, kept)


def test_sinks(device: str) -> None:
    """Attention sinks are one more logit here, as in eager code."""
    options = {
        **GROUPED,
        "head_dim": 16,
        "sliding_window": 5,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
    }
    model = model_of("GptOss", options, device)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the other has no fp64
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.normal_(1.0)
            elif "expert" in name:
                parameter.normal_(0.0, 0.1)
    assert_as_eager(model, device, tokens(2, 14, device))
    # The same weights without sinks give something else: they were not dropped.
    dtype = DTYPES[device]
    ids = tokens(2, 14, device)
    with_sinks = run(model, integration.NAME, dtype, input_ids=ids)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.fill_(-1e4)
    assert (run(model, integration.NAME, dtype, input_ids=ids) - with_sinks).abs().max() > 0.01


@pytest.mark.parametrize("padded", [False, True])
def test_gradients(padded: bool, device: str) -> None:
    dtype = DTYPES[device]
    model = model_of(*DECODERS["llama"], device)
    ids = tokens(2, 12, device)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
    labels = torch.where(mask.bool(), ids, -100)

    def gradients(implementation: str, dtype: torch.dtype) -> dict[str, Tensor]:
        model.to(dtype)
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        return {name: x.grad.clone() for name, x in model.named_parameters()}

    ours, plain = gradients(integration.NAME, dtype), gradients("eager", dtype)
    exact = gradients("eager", torch.float64)
    for name in ours:
        assert_close_2x(ours[name], exact[name], plain[name], name=name, slack=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_generation(name: str, cache: str, device: str) -> None:
    """Greedy decoding of a left-padded batch past the window, token by token as eager does it."""
    model = model_of(*DECODERS[name], device).to(DTYPES[device])
    ids = tokens(3, 8, device)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    scores = {}
    for implementation in ("eager", integration.NAME):
        model.set_attn_implementation(implementation)
        out = model.generate(
            ids * mask,
            attention_mask=mask,
            max_new_tokens=10,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert out.sequences.shape == (3, 18)
        scores[implementation] = (out.sequences, torch.stack(out.logits))
    (expected, expected_logits), (sequences, logits) = scores["eager"], scores[integration.NAME]
    if device == "cpu":
        assert torch.equal(sequences, expected)
        assert_equals(logits, expected_logits, 1e-4)
    else:  # in bf16 a tie may be broken otherwise; until then all agrees
        same = (sequences == expected).all(0).int().cumprod(0).sum().item() - 8
        assert same >= 1
        assert_equals(logits[:same], expected_logits[:same], 0.1)


def assert_greedy(model: Any, prompt: list[int], new: list[int], device: str) -> None:
    """Eager code would have chosen each token, or one whose logit is larger by rounding alone."""
    ids = torch.tensor([prompt + new]).to(device)
    logits = run(model, "eager", DTYPES[device], input_ids=ids)[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    assert (logits.amax(1) - chosen).max() < {"cpu": 1e-4, "cuda": 0.1}[device]


@pytest.fixture
def _static_inputs_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers (5.17, 5.24) clears inputs on one stream and fills them on another, unordered.

    On a GPU that other processes keep busy, the first batch then computes with cleared inputs,
    whatever computes attention: its eager code gives the same wrong tokens.
    """
    if not torch.cuda.is_available() or not hasattr(transformers, "ContinuousBatchingConfig"):
        return
    inputs = importlib.import_module("transformers.generation.continuous_batching.input_outputs")
    reset = inputs.ContinuousBatchingIOs.reset

    def reset_at_once(self: Any) -> None:
        reset(self)
        torch.cuda.synchronize()

    monkeypatch.setattr(inputs.ContinuousBatchingIOs, "reset", reset_at_once)


@pytest.mark.usefixtures("_static_inputs_in_order")
@pytest.mark.parametrize("name", integration.NAMES)
def test_continuous_batching(name: str, device: str) -> None:
    """Requests of different lengths in one stream of pages. 5.23 began to serve a CPU.

    On a GPU the name that ends in a digit decodes in pages.
    """
    require(NEEDS_TRANSFORMERS_5_23 if device == "cpu" else NEEDS_TRANSFORMERS_5)
    model = model_of(*DECODERS["llama"], device).to(DTYPES[device])
    prompts = [tokens(1, n, "cpu")[0].tolist() for n in (3, 9, 6)]
    model.set_attn_implementation(name)
    config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1)
    options: dict[str, Any] = {"num_blocks": 32, "max_batch_tokens": 64}
    if hasattr(transformers, "ContinuousBatchingConfig"):
        small = transformers.ContinuousBatchingConfig(**options)
        options = {"continuous_batching_config": small}
    if device == "cpu":
        options["warmup"] = False
    results = model.generate_batch(prompts, generation_config=config, **options)
    generated = [list(x.generated_tokens) for x in results.values()]
    assert [len(x) for x in generated] == [6, 6, 6]
    for prompt, new in zip(prompts, generated, strict=True):
        assert_greedy(model, prompt, new, device)


def test_mask_of_scores_is_refused() -> None:
    model = model_of(*DECODERS["llama"], "cpu")
    model.set_attn_implementation(integration.NAME)
    ids = tokens(2, 6, "cpu")
    with pytest.raises(fa.UnsupportedError, match=r"attention_mask: got shape \[2, 1, 6, 6\]"):
        model(ids, attention_mask=torch.zeros(2, 1, 6, 6))


def test_bias_of_positions_is_refused() -> None:
    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises(fa.UnsupportedError, match="position_bias: got a tensor"):
        integration.attention_forward(
            lambda: None, None, torch.nn.Identity(), x, x, x, None, position_bias=x
        )


@pytest.mark.parametrize("name", integration.NAMES)
def test_names(name: str) -> None:
    config = transformers.LlamaConfig(**GROUPED)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name)
    assert model.config._attn_implementation == name
    model(tokens(1, 4, "cpu"))


def test_other_names_are_transformers_business() -> None:
    flash = importlib.import_module("transformers.modeling_flash_attention_utils")
    calls: list[str | None] = []
    resolve = integration._resolving_ours(lambda name: calls.append(name))
    resolve("flash_attention_2")
    resolve(None)
    resolve("someone/flash_attn_ext")
    assert calls == ["flash_attention_2", None, "someone/flash_attn_ext"]
    assert flash._lazy_imports("paged|flash_attn_ext")[0] is fa.flash_attn_func


def test_registered_once() -> None:
    flash = importlib.import_module("transformers.modeling_flash_attention_utils")
    resolve = flash._lazy_imports
    integration.register()
    assert flash._lazy_imports is resolve
    assert not is_waited_for("transformers.modeling_utils")


def test_version_without_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = importlib.import_module("transformers.modeling_flash_attention_utils")
    monkeypatch.delattr(flash, "_lazy_imports")
    with pytest.raises(fa.UnsupportedError, match=r"expected >= 4\.57") as caught:
        integration.register()
    assert "_lazy_imports" in str(caught.value)
    with pytest.warns(UserWarning, match="attn_implementation='flash_attn_ext' is not available"):
        integration.register_when_imported()


def test_import_alone_imports_nothing_of_transformers() -> None:
    """Here flash_attn_ext came first, and registration followed transformers' import."""
    code = "import flash_attn_ext, sys; print('transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.stdout.strip() == "False", done.stderr


def test_a_search_without_an_import_changes_nothing() -> None:
    code = (
        "import flash_attn_ext, importlib.util; name = 'transformers.modeling_utils';"
        "importlib.util.find_spec(name); modeling = importlib.import_module(name);"
        "print('flash_attn_ext' in modeling.AttentionInterface._global_mapping)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.stdout.strip() == "True", done.stderr


def test_transformers_may_be_imported_first() -> None:
    modeling = importlib.import_module("transformers.modeling_utils")
    names = modeling.AttentionInterface._global_mapping
    before = names.pop(integration.NAME)
    integration.register_when_imported()
    assert names[integration.NAME] is not before


def test_models_that_ask_for_flash_attention_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unmodified: with the modules of flash-attn, and a GPU, the usual name ends here too."""
    flash = importlib.import_module("transformers.modeling_flash_attention_utils")
    from flash_attn_ext import compat

    compat.enable()
    try:
        monkeypatch.setattr(flash, "is_flash_attn_2_available", lambda: True)
        functions = flash._lazy_imports("flash_attention_2")
    finally:
        compat.disable()
    assert functions[0] is fa.flash_attn_func
    assert functions[1] is fa.flash_attn_varlen_func


FLASH_ATTENTION_2 = """
import sys, torch, transformers
from transformers import modeling_flash_attention_utils as flash
config = transformers.LlamaConfig(**eval(sys.argv[1]))
torch.manual_seed(0)
model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="flash_attention_2")
model.to("cuda", torch.bfloat16).eval()
ids = torch.randint(1, config.vocab_size, (2, 14)).cuda()
mask = torch.ones_like(ids)
mask[0, :5] = 0
with torch.no_grad():
    ours = model(ids, attention_mask=mask).logits[mask.bool()]
    print(flash._lazy_imports("flash_attention_2")[1].__module__)
    model.set_attn_implementation("eager")
    eager = model(ids, attention_mask=mask).logits[mask.bool()]
print(((ours - eager).abs().max() / eager.abs().max()).item())
"""


def test_unmodified_program_that_asks_for_flash_attention_2(tmp_path: Path) -> None:
    """All of transformers' own checks, of the GPU too: nothing is patched, one command before."""
    require(NEEDS_CUDA)
    script = tmp_path / "train.py"
    script.write_text(FLASH_ATTENTION_2)
    command = [sys.executable, "-m", "flash_attn_ext", "run", str(script), repr(GROUPED)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    module, error = done.stdout.split()
    assert module == "flash_attn_ext.attention"
    assert float(error) < 0.05


def test_module_is_skipped_only_without_transformers() -> None:
    require(NEEDS_TRANSFORMERS)
    assert transformers.__version__
