"""The attention backend that `vllm` registers; imported by vLLM alone, when it is chosen.

vLLM's FlashAttention classes stay in charge of everything around attention: which requests are
batched how, the layout of the cache and the writes to it (``do_kv_cache_update``).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionType,
    MultipleOf,
)
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from .. import _checks
from ..errors import UnsupportedError
from . import vllm as adapter
from ._vllm_prompts import Prompts, prompts_at_end

_NAME = adapter.register()
_ENCODERS = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
_PAGE_SIZE = 16
"""vLLM's own kernels, which write the cache, take multiples of this."""


class FlashAttnExtBackend(FlashAttentionBackend):  # type: ignore[misc]
    """What vLLM asks before it builds layers and caches."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """The name under which the backend is registered."""
        return _NAME

    @staticmethod
    def get_impl_cls() -> type[FlashAttnExtImpl]:
        """The class of a layer's attention."""
        return FlashAttnExtImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttnExtMetadataBuilder]:
        """The class that describes batches."""
        return FlashAttnExtMetadataBuilder

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        """Page sizes."""
        return [MultipleOf(_PAGE_SIZE)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """The rule of backends that prefer none."""
        size: int = AttentionBackend.get_preferred_block_size.__func__(cls, default_block_size)
        return size

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Head dimensions that a kernel reads without copies."""
        return head_size % 8 == 0 and 0 < head_size <= _checks.MAX_HEAD_DIM

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        """No quantised cache."""
        return kv_cache_dtype is None or kv_cache_dtype in cls.supported_kv_cache_dtypes

    @classmethod
    def supports_sink(cls) -> bool:
        """On every GPU, not from SM90 on only."""
        return True

    @classmethod
    def supports_rswa(cls) -> bool:
        """Windows that leave the prompt visible."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Images that see themselves in both directions."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """The same bits in whatever batch a request is: splits of the keys depend on it here."""
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """Belongs to quantised caches."""
        return False

    @classmethod
    def supports_combination(cls, *args: Any, **kwargs: Any) -> str | None:
        """Nothing that is supported excludes anything else."""
        return None


class FlashAttnExtMetadataBuilder(FlashAttentionMetadataBuilder):  # type: ignore[misc]
    """vLLM's description of batches, without a schedule for flash-attn 3.

    A captured graph serves batches with one number of new tokens for every request, because the
    grid of a kernel follows from ``max_query_len``.

    Whole prompts at the end of a batch, where vLLM appends new requests, are marked: their new keys
    are all their keys, and the kernel for whole sequences, which does not read pages, computes them
    in a fraction of the time.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.aot_schedule = False

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """The description of a batch, with ``prompts``."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        batch = common_attn_metadata
        metadata.prompts = prompts_at_end(
            batch.num_reqs,
            batch.max_query_len,
            batch.query_start_loc,
            batch.query_start_loc_cpu,
            getattr(batch, "seq_lens_cpu_upper_bound", None),
        )
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """The same of an example, whose lengths say nothing of the batches to come."""
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)
        metadata.prompts = None
        return metadata


class FlashAttnExtImpl(FlashAttentionImpl):  # type: ignore[misc]
    """Attention of one layer."""

    can_return_lse_for_decode = False
    supports_dcp = False

    def __init__(self, *args: Any, sinks: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # which would take sinks only where flash-attn 3 runs
        self.sinks = sinks
        self.supports_quant_query_input = False

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Writes ``output``.

        Args:
            layer: not read.
            query: [num_tokens, num_heads_q, head_dim], padded at the end.
            key: [num_tokens, num_heads_kv, head_dim]; read for encoders and whole prompts.
            value: as key.
            kv_cache: [num_pages, num_heads_kv, page_size, 2 * head_dim]; it holds key and value.
            attn_metadata: the batch; None in vLLM's profiling run.
            output: as query.
            output_scale: must be None.
            output_block_scale: must be None.

        Returns:
            output.

        Raises:
            UnsupportedError: quantised output, requests of one batch that differ in being causal.
        """
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError(f"output_scale: got a tensor, expected None with {_NAME}")
        if attn_metadata is None:
            return output.zero_()
        causal = attn_metadata.causal
        if isinstance(causal, Tensor):
            raise UnsupportedError(
                f"causal: got one flag for each request, expected one for all with {_NAME}; use "
                "--attention-backend FLASH_ATTN"
            )
        options = {
            "softmax_scale": self.scale,
            "sliding_window": self.sliding_window,
            "softcap": self.logits_soft_cap,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
        }
        num_tokens = attn_metadata.num_actual_tokens
        if self.attn_type in _ENCODERS:
            adapter.attend_packed(
                *(x[:num_tokens] for x in (query, key, value, output)),
                query_start_loc=attn_metadata.query_start_loc,
                max_query_len=attn_metadata.max_query_len,
                **options,
            )
            return output
        adapter.attend_batch(
            query[:num_tokens],
            key if key is None else key[:num_tokens],
            value if value is None else value[:num_tokens],
            kv_cache,
            output[:num_tokens],
            self._prompts(attn_metadata, key),
            query_start_loc=attn_metadata.query_start_loc,
            seq_lens=attn_metadata.seq_lens,
            block_table=attn_metadata.block_table,
            max_query_len=attn_metadata.max_query_len,
            causal=causal,
            **options,
        )
        return output

    def _prompts(self, attn_metadata: Any, key: Tensor | None) -> Prompts | None:
        """Requests of this layer that need no cache; none where its keys are another layer's."""
        if self.attn_type != AttentionType.DECODER or key is None:
            return None
        if self.kv_sharing_target_layer_name is not None:
            return None
        prompts: Prompts | None = getattr(attn_metadata, "prompts", None)
        return prompts
