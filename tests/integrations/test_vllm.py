"""vLLM's batches on these kernels: plain tensors, and its own classes where it is installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import (
    NEEDS_CUDA,
    assert_close_2x,
    assert_equals,
    cu_seqlens,
    int32,
    needs_module,
    poisoned_empty,
    randn,
    require,
)
from torch import Tensor

import flash_attn_ext as fa
from flash_attn_ext.integrations import sglang
from flash_attn_ext.integrations import vllm as integration
from flash_attn_ext.integrations._vllm_prompts import prompts_at_end
from flash_attn_ext.reference import varlen_attention_reference

NEEDS_VLLM = needs_module("vllm")
NUM_HEADS, NUM_HEADS_KV, HEAD_DIM, PAGE_SIZE = 4, 2, 16, 16
DTYPES = {"cpu": torch.float64, "cuda": torch.bfloat16}


@dataclass
class Batch:
    """Requests as vLLM batches them; prompts, chunks of prompts and single tokens mixed."""

    query_lens: list[int]
    seq_lens: list[int]
    device: str
    layout: str = "NHD"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Fills a cache through slot_mapping; every slot that is no key is NaN."""
        dtype = DTYPES[self.device]
        total_q, total_k = sum(self.query_lens), sum(self.seq_lens)
        shape = (NUM_HEADS, HEAD_DIM), (NUM_HEADS_KV, HEAD_DIM)
        self.query = randn(total_q, *shape[0], dtype=dtype, device=self.device).detach()
        self.key, self.value = (
            randn(total_k, *shape[1], dtype=dtype, device=self.device).detach() for _ in range(2)
        )
        counts = [-(-n // PAGE_SIZE) for n in self.seq_lens]
        pages = (torch.randperm(sum(counts) + 3)).tolist()
        self.block_table = torch.full((len(counts), max(counts) + 2), -(10**6), dtype=torch.int32)
        slots: list[int] = []
        for row, (count, length) in enumerate(zip(counts, self.seq_lens, strict=True)):
            own = [pages.pop() for _ in range(count)]
            self.block_table[row, :count] = torch.tensor(own, dtype=torch.int32)
            slots += [own[j // PAGE_SIZE] * PAGE_SIZE + j % PAGE_SIZE for j in range(length)]
        self.block_table = self.block_table.to(self.device)
        num_pages = sum(counts) + 3
        sizes = {
            "NHD": (num_pages, PAGE_SIZE, NUM_HEADS_KV, 2 * HEAD_DIM),
            "HND": (num_pages, NUM_HEADS_KV, PAGE_SIZE, 2 * HEAD_DIM),
        }
        memory = poisoned_empty(sizes[self.layout], self.key)
        self.kv_cache = memory.transpose(1, 2) if self.layout == "NHD" else memory
        slot_mapping = torch.tensor(slots, device=self.device)
        both = torch.cat([self.key, self.value], -1)
        self.kv_cache[slot_mapping // PAGE_SIZE, :, slot_mapping % PAGE_SIZE] = both
        self.slot_mapping = slot_mapping
        self.query_start_loc = cu_seqlens(self.query_lens, self.device)
        self.lengths = int32(self.seq_lens, self.device)
        self.scale = 0.3

    def expected(self, upcast: bool = True) -> Tensor:
        """By the definition; a sink takes its share of each row's sum."""
        options = {"causal": True, **self.options}
        sinks = options.pop("sinks", None)
        window = options.pop("sliding_window", None)
        if window is not None:
            options["window_size"] = integration.window_of(window, options["causal"])
        tensors = (self.query, self.key, self.value)
        out, lse = varlen_attention_reference(
            *((x.double() for x in tensors) if upcast else tensors),
            self.query_start_loc.tolist(),
            cu_seqlens(self.seq_lens).tolist(),
            softmax_scale=self.scale,
            upcast=upcast,
            **options,
        )
        if sinks is not None:
            share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
            out = (out * share.T[..., None].to(out.dtype)).to(out.dtype)
        return out

    def check(self, out: Tensor) -> None:
        if self.device == "cpu":
            assert_equals(out, self.expected(), 1e-10)
        else:
            assert_close_2x(out, self.expected(), self.expected(upcast=False))

    def new_keys(self) -> Tensor:
        """Rows of key and value that belong to the new tokens."""
        ends = torch.tensor(self.seq_lens).cumsum(0).tolist()
        lengths = zip(ends, self.query_lens, strict=True)
        return torch.cat([torch.arange(end - n, end) for end, n in lengths]).to(self.device)

    def attend(self) -> Tensor:
        return integration.attend_pages(
            self.query,
            self.kv_cache,
            poisoned_empty(self.query.shape, self.query),
            query_start_loc=self.query_start_loc,
            seq_lens=self.lengths,
            block_table=self.block_table,
            max_query_len=max(self.query_lens),
            softmax_scale=self.scale,
            **self.options,
        )


BATCHES = {
    "decode": ([1, 1, 1], [5, 40, 17]),
    "prompts": ([7, 33], [7, 33]),
    "chunks": ([16, 5], [48, 21]),
    "mixed": ([1, 20, 1, 3], [31, 20, 1, 50]),
    "padded": ([2, 0, 0], [9, 0, 0]),  # requests that a captured graph has too many
}


def options_of(name: str, device: str) -> dict[str, Any]:
    return {
        "causal": {},
        "window": {"sliding_window": (6, 0)},
        "softcap": {"softcap": 2.0},
        "alibi": {"alibi_slopes": torch.rand(NUM_HEADS).to(device)},
        "sinks": {"sinks": randn(NUM_HEADS, dtype=torch.float32, device=device)},
        "both directions": {"causal": False, "sliding_window": (6, 0)},
        "cross": {"causal": False},
    }[name]


OPTIONS = ["causal", "window", "softcap", "alibi", "sinks", "both directions", "cross"]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_pages(lengths: tuple[list[int], list[int]], options: str, device: str) -> None:
    batch = Batch(*lengths, device, options=options_of(options, device))
    batch.check(batch.attend())


def test_either_order_of_heads_and_positions(device: str) -> None:
    batch = Batch([1, 20], [31, 20], device, layout="HND")
    assert batch.kv_cache.is_contiguous()
    batch.check(batch.attend())


def test_captured_in_a_graph() -> None:
    """A graph of three requests serves longer ones, other pages, and two requests and no third."""
    require(NEEDS_CUDA)
    batches = [
        Batch([1, 1, 1], [5, 40, 17], "cuda"),
        Batch([1, 1, 1], [20, 3, 60], "cuda"),
        Batch([1, 1, 0], [33, 50, 0], "cuda"),
    ]
    width = max(x.block_table.shape[1] for x in batches)
    captured = batches[0]
    captured.block_table = torch.nn.functional.pad(
        captured.block_table, (0, width - captured.block_table.shape[1])
    )
    pages = max(len(x.kv_cache) for x in batches)
    captured.kv_cache = torch.cat(
        [
            captured.kv_cache,
            captured.kv_cache.new_zeros(
                (pages - len(captured.kv_cache), *captured.kv_cache.shape[1:])
            ),
        ]
    )
    captured.attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured.attend()
    for batch in batches:
        num_tokens = len(batch.query)
        captured.query[:num_tokens] = batch.query
        captured.query_start_loc.copy_(batch.query_start_loc)
        captured.lengths.copy_(batch.lengths)
        captured.block_table[:, : batch.block_table.shape[1]] = batch.block_table
        captured.kv_cache[: len(batch.kv_cache)] = batch.kv_cache
        graph.replay()
        batch.check(out[:num_tokens])


def test_another_layout_of_the_cache_is_refused() -> None:
    batch = Batch([1], [5], "cpu")
    batch.kv_cache = torch.stack([batch.kv_cache, batch.kv_cache])
    with pytest.raises(fa.UnsupportedError, match=r"kv_cache: got shape \[2, .*FLASH_ATTN"):
        batch.attend()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", ["causal", "window", "softcap", "alibi", "sinks"])
def test_without_cache(options: str, causal: bool, device: str) -> None:
    lengths = [9, 1, 20]
    batch = Batch(lengths, lengths, device, options=options_of(options, device))
    out = integration.attend_packed(
        batch.query,
        batch.key,
        batch.value,
        poisoned_empty(batch.query.shape, batch.query),
        query_start_loc=batch.query_start_loc,
        max_query_len=20,
        softmax_scale=batch.scale,
        causal=causal,
        **batch.options,
    )
    batch.options["causal"] = causal
    batch.check(out)


PROMPTS_AT_END = {  # new tokens, keys, the first of the whole prompts at the end
    "none": ([1, 20, 3], [31, 20, 50], None),
    "all": ([7, 20, 1], [7, 20, 1], 0),
    "a key more": ([7, 20], [7, 21], None),
    "single tokens": ([1, 1], [1, 1], None),
    "last of mixed": ([1, 20, 4, 9], [31, 20, 30, 9], 3),
    "behind decoding": ([1, 1, 20, 3], [31, 2, 20, 3], 2),
}


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "first"), PROMPTS_AT_END.values(), ids=PROMPTS_AT_END
)
def test_prompts_at_end(
    query_lens: list[int], seq_lens: list[int], first: int | None, device: str
) -> None:
    starts = cu_seqlens(query_lens)
    found = prompts_at_end(
        len(query_lens), max(query_lens), starts.to(device), starts, int32(seq_lens)
    )
    assert (found and found.first) == first
    if found is not None:
        assert found.first_token == sum(query_lens[:first])
        assert found.query_start_loc.tolist() == cu_seqlens(query_lens[first:]).tolist()
        assert found.max_query_len == max(query_lens[first:])
        assert found.max_query_len_before == max(query_lens[:first], default=0)
    assert prompts_at_end(1, 5, starts, starts, None) is None


@pytest.mark.parametrize("options", ["causal", "window", "softcap", "alibi", "sinks"])
@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "first_prompt"), PROMPTS_AT_END.values(), ids=PROMPTS_AT_END
)
def test_batch(
    query_lens: list[int],
    seq_lens: list[int],
    first_prompt: int | None,
    options: str,
    device: str,
) -> None:
    """Whole prompts do not read the cache, the others do not read the new keys: NaN there."""
    batch = Batch(query_lens, seq_lens, device, options=options_of(options, device))
    exact, plain = batch.expected(), batch.expected(upcast=False)
    starts = cu_seqlens(query_lens)
    found = prompts_at_end(
        len(query_lens), max(query_lens), batch.query_start_loc, starts, int32(seq_lens)
    )
    first = len(query_lens) if first_prompt is None else first_prompt
    slots = batch.slot_mapping[sum(seq_lens[:first]) :]
    batch.kv_cache[slots // PAGE_SIZE, :, slots % PAGE_SIZE] = torch.nan
    rows = batch.new_keys()
    key, value = batch.key[rows], batch.value[rows]
    for new in (key, value):
        new[: sum(query_lens[:first])] = torch.nan
    out = integration.attend_batch(
        batch.query,
        key,
        value,
        batch.kv_cache,
        poisoned_empty(batch.query.shape, batch.query),
        found,
        query_start_loc=batch.query_start_loc,
        seq_lens=batch.lengths,
        block_table=batch.block_table,
        max_query_len=max(query_lens),
        softmax_scale=batch.scale,
        **batch.options,
    )
    if device == "cpu":
        assert_equals(out, exact, 1e-10)
    else:
        assert_close_2x(out, exact, plain)


def test_entry_points() -> None:
    """What pyproject.toml names exists; tools/check_wheel.py finds the same in a built wheel."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    found = re.findall(r'entry-points\."([\w.]+)"\]\n(\w+) = "([\w.:]+)"', text)
    points = [importlib.metadata.EntryPoint(name, value, group) for group, name, value in found]
    assert [x.group for x in points] == ["vllm.general_plugins", "sglang.srt.plugins"]
    assert {x.name for x in points} == {"flash_attn_ext"}
    assert [x.load() for x in points] == [integration.plugin, sglang.plugin]


def test_import_alone_imports_nothing_of_vllm() -> None:
    code = (
        "import sys, flash_attn_ext.integrations.vllm, flash_attn_ext.integrations.sglang;"
        "print('vllm' in sys.modules, 'sglang' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.parametrize("version", ["0.25.1", "0.7"])
def test_old_version(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("vllm")
    old.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", old)
    with pytest.raises(fa.UnsupportedError, match=rf"vllm: got version {version}, expected >= 0"):
        integration.register()
    with pytest.warns(UserWarning, match="no attention backend for vLLM: vllm: got version"):
        integration.plugin()


# ---- with vLLM -----------------------------------------------------------------------------------


@pytest.fixture
def backend() -> Any:
    """vLLM's answer to the name, which is our class."""
    require(NEEDS_VLLM)
    name = integration.register()
    assert integration.register() == name
    names = importlib.import_module("vllm.v1.attention.backends.registry").AttentionBackendEnum
    found = names[name].get_class()
    assert found.get_name() == name
    assert names[found.get_name()].get_path().endswith("FlashAttnExtBackend")
    return found


def configuration(**changes: Any) -> dict[str, Any]:
    """What vLLM's selection asks about a layer."""
    interface = importlib.import_module("vllm.platforms.interface")
    return {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 16,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": interface.DeviceCapability(8, 0),
        "attn_type": "decoder",
    } | changes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"has_sink": True, "has_sliding_window": True, "use_non_causal": True}, None),
        ({"attn_type": "encoder_only", "head_size": 256, "dtype": torch.float16}, None),
        ({"head_size": 264}, "head_size"),
        ({"dtype": torch.float32}, "dtype"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"block_size": 8}, "block_size"),
        ({"use_mla": True}, "MLA"),
        ({"use_mm_prefix": True}, "multimodal"),
        ({"use_batch_invariant": True}, "batch invariance"),
        ({"use_dcp": True}, "DCP"),
        ({"use_rswa": True}, "R-SWA"),
    ],
)
def test_what_is_selected(backend: Any, changes: dict[str, Any], reason: str | None) -> None:
    reasons = backend.validate_configuration(**configuration(**changes))
    if reason is None:
        assert reasons == []
    else:
        assert len(reasons) == 1
        assert re.search(reason, reasons[0])


def layer_of(backend: Any, **changes: Any) -> Any:
    options = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"} | changes
    return backend.get_impl_cls()(NUM_HEADS, HEAD_DIM, 0.3, NUM_HEADS_KV, **options)


def metadata_of(batch: Batch, **changes: Any) -> Any:
    module = importlib.import_module("vllm.v1.attention.backends.flash_attn")
    return module.FlashAttentionMetadata(
        **{
            "num_actual_tokens": len(batch.query),
            "max_query_len": max(batch.query_lens),
            "query_start_loc": batch.query_start_loc,
            "max_seq_len": max(batch.seq_lens),
            "seq_lens": batch.lengths,
            "block_table": batch.block_table,
            "slot_mapping": batch.slot_mapping,
        }
        | changes
    )


def run_layer(layer: Any, batch: Batch, metadata: Any, padding: int = 3) -> Tensor:
    """The layer's forward on tensors that are longer than the batch, as vLLM's are."""

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, poisoned_empty((padding, *x.shape[1:]), x)])

    output = poisoned_empty((len(batch.query) + padding, NUM_HEADS, HEAD_DIM), batch.query)
    rows = batch.new_keys()
    new = padded(batch.query), padded(batch.key[rows]), padded(batch.value[rows])
    result = layer.forward(torch.nn.Identity(), *new, batch.kv_cache, metadata, output)
    assert result is output
    return result[: len(batch.query)]


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"sliding_window": 7}, {"sliding_window": (6, 0)}),
        ({"logits_soft_cap": 2.0}, {"softcap": 2.0}),
        (
            {"alibi_slopes": [0.5, 0.25, 0.125, 0.1]},
            {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.1])},
        ),
        ({"sinks": torch.tensor([0.5, 1.0, -1.0, 3.0])}, {"sinks": torch.tensor([0.5, 1, -1, 3])}),
    ],
    ids=["plain", "window", "softcap", "alibi", "sinks"],
)
def test_layer(backend: Any, changes: dict[str, Any], options: dict[str, Any], device: str) -> None:
    moved = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in options.items()}
    batch = Batch([1, 20, 1, 3], [31, 20, 1, 50], device, options=moved)
    with torch.device(device):
        layer = layer_of(backend, **changes)
    batch.check(run_layer(layer, batch, metadata_of(batch)))
    assert layer.forward(None, None, None, None, None, None, torch.ones(2)).tolist() == [0, 0]


def test_layer_that_is_not_causal(backend: Any, device: str) -> None:
    options = {"sliding_window": (6, 0), "causal": False}
    batch = Batch([4, 20], [31, 20], device, options=options)
    layer = layer_of(backend, sliding_window=7)
    batch.check(run_layer(layer, batch, metadata_of(batch, causal=False)))
    with pytest.raises(fa.UnsupportedError, match="causal: got one flag for each request"):
        run_layer(layer, batch, metadata_of(batch, causal=int32([1, 0], device)))


@pytest.mark.parametrize("window", [None, 7])
def test_layer_of_an_encoder(backend: Any, window: int | None, device: str) -> None:
    options: dict[str, Any] = {"causal": False}
    if window is not None:
        options["sliding_window"] = (6, 6)
    batch = Batch([9, 20], [9, 20], device, options=options)
    layer = layer_of(backend, sliding_window=window, attn_type="encoder_only")
    batch.check(run_layer(layer, batch, metadata_of(batch)))


def test_quantised_output_is_refused(backend: Any) -> None:
    batch = Batch([1], [5], "cpu")
    output = torch.empty_like(batch.query)
    with pytest.raises(fa.UnsupportedError, match="output_scale: got a tensor"):
        layer_of(backend).forward(
            None, batch.query, None, None, batch.kv_cache, metadata_of(batch), output, output
        )


def configured(folder: Path) -> Any:
    """vLLM's configuration of a tiny Llama on the CPU."""
    config = importlib.import_module("vllm.config")
    shape = {"num_attention_heads": NUM_HEADS, "num_key_value_heads": NUM_HEADS_KV}
    shape |= {"hidden_size": NUM_HEADS * HEAD_DIM, "intermediate_size": 64, "vocab_size": 97}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(shape | kind))
    model = config.ModelConfig(
        model=str(folder), skip_tokenizer_init=True, max_model_len=64, enforce_eager=True
    )
    return config.VllmConfig(
        model_config=model,
        cache_config=config.CacheConfig(block_size=PAGE_SIZE),
        device_config=config.DeviceConfig(device="cpu"),
    )


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "first_prompt"), PROMPTS_AT_END.values(), ids=PROMPTS_AT_END
)
def test_from_vllms_batch_to_attention(
    backend: Any,
    query_lens: list[int],
    seq_lens: list[int],
    first_prompt: int | None,
    tmp_path: Path,
) -> None:
    """What vLLM's scheduler hands out, through its builder and into a layer.

    Whole prompts at the end do not read the cache, the others do not read the new keys: NaN there.
    """
    attention = importlib.import_module("vllm.v1.attention.backend")
    interface = importlib.import_module("vllm.v1.kv_cache_interface")
    config = importlib.import_module("vllm.config")
    batch = Batch(query_lens, seq_lens, "cpu")
    vllm_config = configured(tmp_path)
    with config.set_current_vllm_config(vllm_config):
        spec = interface.FullAttentionSpec(
            block_size=PAGE_SIZE,
            num_kv_heads=NUM_HEADS_KV,
            head_size=HEAD_DIM,
            dtype=torch.bfloat16,
        )
        builder = backend.get_builder_cls()(spec, [], vllm_config, torch.device("cpu"))
        common = attention.CommonAttentionMetadata(
            query_start_loc=batch.query_start_loc,
            query_start_loc_cpu=batch.query_start_loc,
            seq_lens=batch.lengths,
            num_reqs=len(query_lens),
            num_actual_tokens=len(batch.query),
            max_query_len=max(query_lens),
            max_seq_len=max(seq_lens),
            block_table_tensor=batch.block_table,
            slot_mapping=batch.slot_mapping,
            seq_lens_cpu_upper_bound=batch.lengths,
        )
        metadata = builder.build(0, common)
        captured = builder.build_for_cudagraph_capture(common)
        layer = layer_of(backend)
    assert captured.prompts is None
    assert metadata.scheduler_metadata is None
    assert builder.get_cudagraph_support(vllm_config, spec).name == "UNIFORM_BATCH"
    exact = batch.expected()
    first = len(query_lens) if first_prompt is None else first_prompt
    assert (metadata.prompts and metadata.prompts.first) == first_prompt
    slots = batch.slot_mapping[sum(seq_lens[:first]) :]
    batch.kv_cache[slots // PAGE_SIZE, :, slots % PAGE_SIZE] = torch.nan
    batch.key[: sum(seq_lens[:first])] = torch.nan
    assert_equals(run_layer(layer, batch, metadata), exact, 1e-10)
