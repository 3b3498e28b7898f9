// Ops of the KV cache: append_kv, kvcache_fwd and kvcache_append_fwd.
#include "bindings/decode_args.h"
#include "bindings/prefill.h"
#include "bindings/rotary_op.h"
#include "bindings/rotary_table.h"
#include "bindings/stable_torch.h"
#include "bindings/tensor_checks.h"

namespace fa {
namespace {

// Arguments of the op, in the order of the schema.
struct AppendKvArgs {
  const Tensor &k_cache, &v_cache, &k, &v, &cache_seqlens;
  const OptionalTensor &cache_batch_idx, &page_table, &cu_seqlens_k_new;
  const OptionalTensor &rotary_cos, &rotary_sin, &rotary_seqlens;
  bool rotary_interleaved;

  bool varlen() const { return cu_seqlens_k_new.has_value(); }
  int device_index() const { return k_cache.get_device_index(); }
};

void check_append_kv(const AppendKvArgs& args) {
  const int64_t rank = args.varlen() ? 3 : 4;
  check_tensor("k_cache", args.k_cache, args.k_cache, 4);
  check_tensor("v_cache", args.v_cache, args.k_cache, 4);
  check_tensor("k", args.k, args.k_cache, rank);
  check_tensor("v", args.v, args.k_cache, rank);
  const ScalarType dtype = args.k_cache.scalar_type();
  check_dtype("v_cache", args.v_cache, dtype);
  check_dtype("k", args.k, dtype);
  check_dtype("v", args.v, dtype);
  for (int64_t i = 0; i < 3; ++i) check_size("v_cache", args.v_cache, i, args.k_cache.size(i));
  for (int64_t i = 0; i + 1 < rank; ++i) check_size("v", args.v, i, args.k.size(i));
  for (int64_t i = 1; i <= 2; ++i)  // heads and head_dim, from behind
    check_size("k", args.k, rank - i, args.k_cache.size(4 - i));
  check_size("v", args.v, rank - 1, args.v_cache.size(3));
  FA_CHECK(args.rotary_cos.has_value() == args.rotary_sin.has_value(),
           "rotary_cos and rotary_sin: got one of them, expected both or neither");
  if (args.page_table) {
    check_tensor("page_table", *args.page_table, args.k_cache, 2);
    check_dtype("page_table", *args.page_table, ScalarType::Int);
  }
}

// The sizes, the same in the params and in the problem.
AppendKvParams append_kv_sizes(const AppendKvArgs& args) {
  AppendKvParams p{};
  p.batch_size =
      to_int("batch", args.varlen() ? args.cu_seqlens_k_new->size(0) - 1 : args.k.size(0));
  p.seqlen_new = to_int("seqlen", args.varlen() ? args.k.size(0) : args.k.size(1));
  p.num_heads_kv = to_int("heads", args.k_cache.size(2));
  p.head_dim = to_int("head_dim", args.k_cache.size(3));
  p.head_dim_v = to_int("head_dim_v", args.v_cache.size(3));
  p.num_caches = to_int("caches", args.k_cache.size(0));
  p.cache_len = to_int("cache length", args.k_cache.size(1));
  if (args.page_table) {
    p.page_table_rows = to_int("page_table rows", args.page_table->size(0));
    p.page_size = p.cache_len;
    p.cache_len = to_int("max_pages * page_size", args.page_table->size(1) * p.page_size);
  }
  return p;
}

PlannedKernel plan_append_kv(const AppendKvArgs& args, const AppendKvParams& sizes) {
  const std::optional<DType> dtype = dtype_of(args.k_cache.scalar_type());
  if (!dtype) return {};
  Problem problem;
  problem.family = Family::kAppendKv;
  problem.dtype = *dtype;
  problem.head_dim = sizes.head_dim;
  problem.head_dim_v = sizes.head_dim_v;
  problem.batch_size = sizes.batch_size;
  problem.seqlen_k = sizes.seqlen_new;
  problem.num_heads_q = problem.num_heads_kv = sizes.num_heads_kv;
  problem.varlen = args.varlen();
  problem.page_size = sizes.page_size;
  bool aligned = rows_aligned(args.k, 16) && rows_aligned(args.v, 16) &&
                 rows_aligned(args.k_cache, 16) && rows_aligned(args.v_cache, 16);
  if (args.rotary_cos) {
    problem.rotary_dim = 2 * to_int("rotary_dim", args.rotary_cos->size(1));
    problem.rotary_interleaved = args.rotary_interleaved;
    aligned = aligned && rows_aligned(*args.rotary_cos, 16) && rows_aligned(*args.rotary_sin, 16);
  }
  problem.alignment_bytes = aligned ? 16 : 1;
  return plan_kernel(problem, args.device_index());
}

// What is left to fill in of `p`, the sizes.
AppendKvParams append_kv_params(const PlannedKernel& kernel, const AppendKvArgs& args,
                                AppendKvParams p) {
  const Tensor& like = args.k_cache;
  p.k = args.k.data_ptr();
  p.v = args.v.data_ptr();
  p.k_cache = args.k_cache.data_ptr();
  p.v_cache = args.v_cache.data_ptr();
  p.cache_seqlens = int32_vector("cache_seqlens", args.cache_seqlens, like, p.batch_size);
  p.cache_batch_idx = int32_vector("cache_batch_idx", args.cache_batch_idx, like, p.batch_size);
  p.cu_seqlens_new =
      int32_vector("cu_seqlens_k_new", args.cu_seqlens_k_new, like, p.batch_size + 1);
  p.rotary_seqlens = int32_vector("rotary_seqlens", args.rotary_seqlens, like, p.batch_size);
  p.k_strides = strides_of(args.k);
  p.v_strides = strides_of(args.v);
  p.k_cache_strides = strides_of(args.k_cache);
  p.v_cache_strides = strides_of(args.v_cache);
  if (args.page_table) {
    p.page_table = static_cast<const int*>(args.page_table->data_ptr());
    p.page_table_batch_stride = args.page_table->stride(0);
  }
  if (args.rotary_cos)
    p.table =
        rotary_table(*args.rotary_cos, *args.rotary_sin, like, args.rotary_interleaved, false);
  p.dtype = *dtype_of(like.scalar_type());
  p.vectorized = kernel.plan.vectorized;
  return p;
}

void launch_append_kv(const PlannedKernel& kernel, const AppendKvArgs& args,
                      const AppendKvParams& p) {
  if (args.k.numel() == 0 && args.v.numel() == 0) return;
  launch(*kernel.backend, kernel.backend->append_kv, p, args.device_index());
}

void append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
               const Tensor& cache_seqlens, const OptionalTensor& cache_batch_idx,
               const OptionalTensor& page_table, const OptionalTensor& cu_seqlens_k_new,
               const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin,
               const OptionalTensor& rotary_seqlens, bool rotary_interleaved) {
  const AppendKvArgs args{
      k_cache,    v_cache,          k,          v,          cache_seqlens,  cache_batch_idx,
      page_table, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved};
  check_append_kv(args);
  const AppendKvParams sizes = append_kv_sizes(args);
  const PlannedKernel kernel = plan_append_kv(args, sizes);
  if (kernel.backend == nullptr) {
    return call_tiled<void>("flash_attn_ext::append_kv", k_cache, v_cache, k, v, cache_seqlens,
                            cache_batch_idx, page_table, cu_seqlens_k_new, rotary_cos, rotary_sin,
                            rotary_seqlens, rotary_interleaved);
  }
  launch_append_kv(kernel, args, append_kv_params(kernel, args, sizes));
}

struct Queries {
  const Tensor& q;
  const OptionalTensor& cu_seqlens_q;
  int64_t max_seqlen_q;
  bool same_position;
};

// The steps before attention: appends, and returns rotated queries if there is a table; in one
// launch, if the kernel can.
std::optional<Tensor> append_and_rotate(const PlannedKernel& kernel, const AppendKvArgs& args,
                                        const AppendKvParams& sizes, const Queries& queries) {
  const OptionalTensor& positions =
      args.rotary_seqlens ? args.rotary_seqlens : OptionalTensor(args.cache_seqlens);
  if (kernel.backend != nullptr && args.k.numel() > 0) {
    AppendKvParams p = append_kv_params(kernel, args, sizes);
    std::optional<PlannedRotation> rotation;
    if (args.rotary_cos)
      rotation = plan_rotation(queries.q, *args.rotary_cos, *args.rotary_sin, positions,
                               queries.cu_seqlens_q, queries.max_seqlen_q, args.rotary_interleaved,
                               false, queries.same_position);
    const bool is_one = rotation && rotation->params.vectorized == p.vectorized;
    if (is_one) p.queries = rotation->params;
    launch_append_kv(kernel, args, p);
    if (is_one) return rotation->out;
  } else {
    append_kv(args.k_cache, args.v_cache, args.k, args.v, args.cache_seqlens, args.cache_batch_idx,
              args.page_table, args.cu_seqlens_k_new, args.rotary_cos, args.rotary_sin,
              args.rotary_seqlens, args.rotary_interleaved);
  }
  if (!args.rotary_cos) return std::nullopt;
  return rotary(queries.q, *args.rotary_cos, *args.rotary_sin, positions, queries.cu_seqlens_q,
                queries.max_seqlen_q, args.rotary_interleaved, false, queries.same_position);
}

using OutLse = std::tuple<Tensor, Tensor>;

DecodeArgs kvcache_args(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor* cache_seqlens, const OptionalTensor& page_table,
                        const ScoreArgs& scores, const OptionalTensor& cache_batch_idx,
                        const OptionalTensor& cache_leftpad, const OptionalTensor& cu_seqlens_q,
                        int64_t max_seqlen_q, int64_t num_splits, int64_t sm_margin) {
  return {q,
          k_cache,
          v_cache,
          cache_seqlens,
          pointer_to(cache_batch_idx),
          pointer_to(cache_leftpad),
          pointer_to(page_table),
          pointer_to(cu_seqlens_q),
          nullptr,
          nullptr,
          max_seqlen_q,
          std::nullopt,
          scores,
          num_splits,
          sm_margin};
}

OutLse kvcache_fwd(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                   const OptionalTensor& cache_seqlens, const OptionalTensor& page_table,
                   std::optional<double> softmax_scale, int64_t window_left, int64_t window_right,
                   double softcap, const OptionalTensor& alibi_slopes,
                   const OptionalTensor& cache_batch_idx, const OptionalTensor& cache_leftpad,
                   const OptionalTensor& cu_seqlens_q, int64_t max_seqlen_q, int64_t num_splits,
                   int64_t sm_margin) {
  const OptionalTensor none;
  const ScoreArgs scores{alibi_slopes, none, softmax_scale, window_left, window_right, softcap, 0.};
  const DecodeArgs args = kvcache_args(q, k_cache, v_cache, pointer_to(cache_seqlens), page_table,
                                       scores, cache_batch_idx, cache_leftpad, cu_seqlens_q,
                                       max_seqlen_q, num_splits, sm_margin);
  const DecodeKernel kernel = plan_decode(args);
  if (!kernel) {
    return call_tiled<OutLse>("flash_attn_ext::kvcache_fwd", q, k_cache, v_cache, cache_seqlens,
                              page_table, softmax_scale, window_left, window_right, softcap,
                              alibi_slopes, cache_batch_idx, cache_leftpad, cu_seqlens_q,
                              max_seqlen_q, num_splits, sm_margin);
  }
  if (is_prefill(args, kernel, {})) return prefill(args, {});
  Tensor out = new_decode_out(args);
  Tensor lse = launch_decode(kernel, args, out);
  return {out, lse};
}

OutLse kvcache_append_fwd(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
    const Tensor& cache_seqlens, const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin,
    bool rotary_interleaved, const OptionalTensor& page_table, std::optional<double> softmax_scale,
    int64_t window_left, int64_t window_right, double softcap, const OptionalTensor& alibi_slopes,
    const OptionalTensor& cache_batch_idx, const OptionalTensor& cache_leftpad,
    const OptionalTensor& cu_seqlens_q, int64_t max_seqlen_q, int64_t num_splits, int64_t sm_margin,
    const OptionalTensor& rotary_seqlens, const OptionalTensor& cu_seqlens_k_new) {
  const OptionalTensor none;
  const ScoreArgs scores{alibi_slopes, none, softmax_scale, window_left, window_right, softcap, 0.};
  DecodeArgs args =
      kvcache_args(q, k_cache, v_cache, &cache_seqlens, page_table, scores, cache_batch_idx,
                   cache_leftpad, cu_seqlens_q, max_seqlen_q, num_splits, sm_margin);
  args.appends = true;
  const DecodeKernel kernel = plan_decode(args);
  if (!kernel) {
    return call_tiled<OutLse>("flash_attn_ext::kvcache_append_fwd", q, k_cache, v_cache, k, v,
                              cache_seqlens, rotary_cos, rotary_sin, rotary_interleaved, page_table,
                              softmax_scale, window_left, window_right, softcap, alibi_slopes,
                              cache_batch_idx, cache_leftpad, cu_seqlens_q, max_seqlen_q,
                              num_splits, sm_margin, rotary_seqlens, cu_seqlens_k_new);
  }
  const AppendKvArgs append{
      k_cache,    v_cache,          k,          v,          cache_seqlens,  cache_batch_idx,
      page_table, cu_seqlens_k_new, rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved};
  check_append_kv(append);
  const AppendKvParams sizes = append_kv_sizes(append);
  const PlannedKernel append_kernel = plan_append_kv(append, sizes);
  AppendedKeys appended;
  appended.same_position = window_left < 0 && window_right < 0;
  if (cu_seqlens_k_new) {
    appended.cu_seqlens_new =
        int32_vector("cu_seqlens_k_new", *cu_seqlens_k_new, q, kernel.problem.batch_size + 1);
  } else {
    appended.seqlen_new = to_int("seqlen", k.size(1));
  }
  // The launch of decode does it all where it can copy new keys 16 bytes at a time. wgmma's does
  // not: it begins while a launch before it appends.
  std::optional<Tensor> rotated;
  const bool is_decode = !is_prefill(args, kernel, appended);
  const bool is_wgmma = is_decode && kernel.planned.plan.tile_m == kDecodeWgmmaRows;
  if (is_decode && !is_wgmma && append_kernel.backend && append_kernel.plan.vectorized &&
      decode_launches(kernel) && k.numel() > 0) {
    appended.by_decode = append_kv_params(append_kernel, append, sizes);
  } else {
    rotated = append_and_rotate(append_kernel, append, sizes,
                                {q, cu_seqlens_q, max_seqlen_q, appended.same_position});
    if (rotated) appended.rotated_q = &*rotated;
    appended.overlaps = is_wgmma && append_kernel.backend && k.numel() > 0;
  }
  if (!is_decode) return prefill(args, appended);
  Tensor out = new_decode_out(args);
  Tensor lse = launch_decode(kernel, args, out, appended);
  return {out, lse};
}

}  // namespace
}  // namespace fa

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  m.impl("append_kv", TORCH_BOX(&fa::append_kv));
  m.impl("kvcache_fwd", TORCH_BOX(&fa::kvcache_fwd));
  m.impl("kvcache_append_fwd", TORCH_BOX(&fa::kvcache_append_fwd));
}
