// Ops of the KV cache: append_kv.
#include "bindings/device.h"
#include "bindings/rotary_table.h"
#include "bindings/stable_torch.h"
#include "bindings/tensor_checks.h"

namespace fa {
namespace {

void append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
               const Tensor& cache_seqlens, const OptionalTensor& cache_batch_idx,
               const OptionalTensor& page_table, const OptionalTensor& cu_seqlens_k_new,
               const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin,
               const OptionalTensor& rotary_seqlens, bool rotary_interleaved) {
  const int64_t rank = cu_seqlens_k_new ? 3 : 4;
  const std::pair<const char*, const Tensor*> tensors[] = {
      {"k_cache", &k_cache}, {"v_cache", &v_cache}, {"k", &k}, {"v", &v}};
  for (const auto& [name, t] : tensors) {
    check_tensor(name, *t, k_cache, t == &k || t == &v ? rank : 4);
    check_dtype(name, *t, k_cache.scalar_type());
  }
  FA_CHECK(rotary_cos.has_value() == rotary_sin.has_value(),
           "rotary_cos and rotary_sin: got one of them, expected both or neither");

  AppendKvParams p{};
  p.batch_size = to_int("batch", cu_seqlens_k_new ? cu_seqlens_k_new->size(0) - 1 : k.size(0));
  p.seqlen_new = to_int("seqlen", cu_seqlens_k_new ? k.size(0) : k.size(1));
  p.num_heads_kv = to_int("heads", k_cache.size(2));
  p.head_dim = to_int("head_dim", k_cache.size(3));
  p.head_dim_v = to_int("head_dim_v", v_cache.size(3));
  const std::optional<DType> dtype = dtype_of(k_cache.scalar_type());

  Problem problem;
  problem.family = Family::kAppendKv;
  problem.dtype = dtype.value_or(DType::kFloat64);
  problem.head_dim = p.head_dim;
  problem.head_dim_v = p.head_dim_v;
  problem.rotary_dim = rotary_cos ? 2 * to_int("rotary_dim", rotary_cos->size(1)) : 0;
  problem.batch_size = p.batch_size;
  problem.seqlen_k = p.seqlen_new;
  problem.num_heads_q = problem.num_heads_kv = p.num_heads_kv;
  problem.varlen = cu_seqlens_k_new.has_value();
  problem.page_size = page_table ? to_int("page_size", k_cache.size(1)) : 0;
  problem.rotary_interleaved = rotary_interleaved;
  bool aligned = rows_aligned(k, 16) && rows_aligned(v, 16) && rows_aligned(k_cache, 16) &&
                 rows_aligned(v_cache, 16);
  if (rotary_cos) aligned = aligned && rows_aligned(*rotary_cos, 16) && rows_aligned(*rotary_sin, 16);
  problem.alignment_bytes = aligned ? 16 : 1;
  const PlannedKernel kernel = plan_kernel(problem, k_cache.get_device_index());
  if (kernel.backend == nullptr) {
    return call_tiled<void>("flash_attn_ext::append_kv", k_cache, v_cache, k, v, cache_seqlens,
                            cache_batch_idx, page_table, cu_seqlens_k_new, rotary_cos, rotary_sin,
                            rotary_seqlens, rotary_interleaved);
  }

  for (int64_t i = 0; i < 3; ++i) check_size("v_cache", v_cache, i, k_cache.size(i));
  check_size("k", k, rank - 2, p.num_heads_kv);
  check_size("k", k, rank - 1, p.head_dim);
  check_size("v", v, rank - 1, p.head_dim_v);
  for (int64_t i = 0; i + 1 < rank; ++i) check_size("v", v, i, k.size(i));
  p.k = k.data_ptr();
  p.v = v.data_ptr();
  p.k_cache = k_cache.data_ptr();
  p.v_cache = v_cache.data_ptr();
  p.cache_seqlens = int32_vector("cache_seqlens", cache_seqlens, k_cache, p.batch_size);
  p.cache_batch_idx = int32_vector("cache_batch_idx", cache_batch_idx, k_cache, p.batch_size);
  p.cu_seqlens_new =
      int32_vector("cu_seqlens_k_new", cu_seqlens_k_new, k_cache, p.batch_size + 1);
  p.rotary_seqlens = int32_vector("rotary_seqlens", rotary_seqlens, k_cache, p.batch_size);
  p.k_strides = strides_of(k);
  p.v_strides = strides_of(v);
  p.k_cache_strides = strides_of(k_cache);
  p.v_cache_strides = strides_of(v_cache);
  p.num_caches = to_int("caches", k_cache.size(0));
  p.cache_len = to_int("cache length", k_cache.size(1));
  if (page_table) {
    check_tensor("page_table", *page_table, k_cache, 2);
    check_dtype("page_table", *page_table, ScalarType::Int);
    p.page_table = static_cast<const int*>(page_table->data_ptr());
    p.page_table_batch_stride = page_table->stride(0);
    p.page_table_rows = to_int("page_table rows", page_table->size(0));
    p.page_size = p.cache_len;
    p.max_pages = to_int("max_pages", page_table->size(1));
    p.cache_len = to_int("max_pages * page_size", page_table->size(1) * k_cache.size(1));
  }
  p.dtype = *dtype;
  p.vectorized = kernel.plan.vectorized;
  if (rotary_cos)
    p.table = rotary_table(*rotary_cos, *rotary_sin, k_cache, rotary_interleaved, false);
  if (k.numel() == 0 && v.numel() == 0) return;
  launch(*kernel.backend, kernel.backend->append_kv, p, k_cache.get_device_index());
}

}  // namespace
}  // namespace fa

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  m.impl("append_kv", TORCH_BOX(&fa::append_kv));
}
