// What the ops of attention against a cache share: arguments checked once and turned into a Problem
// for the plan and into DecodeParams.
#pragma once
#include "bindings/aligned_rows.h"
#include "bindings/attention_args.h"
#include "core/tile_config.h"

namespace fa {

// Of kvcache_fwd and kvcache_append_fwd, and of varlen_fwd with page_table.
struct DecodeArgs {
  const Tensor &q, &k_cache, &v_cache;
  const Tensor *cache_seqlens = nullptr, *cache_batch_idx = nullptr, *cache_leftpad = nullptr;
  const Tensor* page_table = nullptr;
  const Tensor *cu_seqlens_q = nullptr, *seqused_q = nullptr, *cu_seqlens_k = nullptr;
  int64_t max_seqlen_q = 0;
  std::optional<int64_t> max_seqlen_k;  // varlen: no length is larger
  ScoreArgs scores;
  int64_t num_splits = 0, sm_margin = 0;
  bool appends = false;  // keys come with the call

  bool varlen() const { return cu_seqlens_q != nullptr; }
  int device_index() const { return q.get_device_index(); }
};

inline const Tensor* pointer_to(const OptionalTensor& t) {
  return t ? &*t : nullptr;
}

inline void check_decode(const DecodeArgs& a) {
  const int64_t rank = a.varlen() ? 3 : 4;
  check_place("q", a.q, a.q, rank);
  check_place("k_cache", a.k_cache, a.q, 4);
  check_place("v_cache", a.v_cache, a.q, 4);
  check_dtype("k_cache", a.k_cache, a.q);
  check_dtype("v_cache", a.v_cache, a.q);
  for (int64_t i = 0; i < 3; ++i) check_size("v_cache", a.v_cache, i, a.k_cache.size(i));
  check_size("k_cache", a.k_cache, 3, a.q.size(rank - 1));
  const int64_t heads_q = a.q.size(rank - 2), heads_kv = a.k_cache.size(2);
  FA_CHECK(heads_kv > 0 ? heads_q % heads_kv == 0 : heads_q == 0, "q: got ", heads_q,
           " heads, expected a multiple of the ", heads_kv, " of k_cache");
  if (a.page_table != nullptr) {
    check_place("page_table", *a.page_table, a.q, 2);
    check_dtype("page_table", *a.page_table, ScalarType::Int);
  }
}

// Tokens that one cache holds.
inline int64_t cache_capacity(const DecodeArgs& a) {
  const int64_t rows = a.k_cache.size(1);
  return a.page_table == nullptr ? rows : rows * a.page_table->size(1);
}

inline Problem decode_problem(const DecodeArgs& a) {
  check_decode(a);
  constexpr int64_t kMaxWindow = 1 << 30;  // beyond any length
  const int64_t rank = a.q.dim();
  Problem p;
  p.family = Family::kDecode;
  p.dtype = dtype_of(a.q.scalar_type()).value_or(DType::kFloat64);
  p.head_dim = to_int("head_dim", a.q.size(rank - 1));
  p.head_dim_v = to_int("head_dim_v", a.v_cache.size(3));
  p.num_heads_q = to_int("heads of q", a.q.size(rank - 2));
  p.num_heads_kv = to_int("heads of k_cache", a.k_cache.size(2));
  p.varlen = a.varlen();
  p.batch_size = to_int("batch", p.varlen ? a.cu_seqlens_q->size(0) - 1 : a.q.size(0));
  p.seqlen_q = to_int("max_seqlen_q", p.varlen ? a.max_seqlen_q : a.q.size(1));
  p.total_q = p.varlen ? to_int("total_q", a.q.size(0)) : 0;
  const int64_t capacity = cache_capacity(a);
  p.seqlen_k = to_int("cache length", a.max_seqlen_k ? min(capacity, *a.max_seqlen_k) : capacity);
  p.page_size = a.page_table == nullptr ? 0 : to_int("page_size", a.k_cache.size(1));
  p.window_left = static_cast<int>(clamp<int64_t>(a.scores.window_left, kUnbounded, kMaxWindow));
  p.window_right = static_cast<int>(clamp<int64_t>(a.scores.window_right, kUnbounded, kMaxWindow));
  p.leftpad = a.cache_leftpad != nullptr;
  p.appends = a.appends;
  p.broadcast = is_broadcast(a.k_cache) || is_broadcast(a.v_cache);
  p.softcap = a.scores.softcap != 0.;
  p.alibi = a.scores.alibi_slopes.has_value();
  p.dropout = keep_threshold(a.scores.dropout_p) < 256;
  p.positive_scale = static_cast<float>(a.scores.softmax_scale.value_or(1.)) > 0.f;
  p.num_splits = to_int("num_splits", a.num_splits);
  const auto is_readable = [](const Tensor& cache) {
    return rows_aligned(cache, kRowBytes) && (cache.stride(3) == 1 || cache.size(3) == 1);
  };
  const bool table_is_readable =
      a.page_table == nullptr || a.page_table->stride(1) == 1 || a.page_table->size(1) <= 1;
  p.alignment_bytes =
      is_readable(a.k_cache) && is_readable(a.v_cache) && table_is_readable ? kRowBytes : 1;
  return p;
}

struct DecodeKernel {
  Problem problem;
  PlannedKernel planned;
  explicit operator bool() const { return planned.backend && planned.backend->decode; }
};
inline DecodeKernel plan_decode(const DecodeArgs& args) {
  Problem problem = decode_problem(args);
  return {problem, plan_kernel(problem, args.device_index(), args.sm_margin)};
}

inline Tensor new_decode_out(const DecodeArgs& a) {
  Shape shape(a.q);
  shape.last() = a.v_cache.size(3);
  return new_tensor(a.q, shape);
}

// Keys that are appended: every length of cache_seqlens grows by them.
struct AppendedKeys {
  int seqlen_new = 0;
  const int* cu_seqlens_new = nullptr;  // [batch + 1]; nullptr: seqlen_new for each
  AppendKvParams by_decode{};           // k is nullptr: they are in the cache already
  bool same_position = false;           // DecodeParams
  const Tensor* rotated_q = nullptr;    // in place of q
  bool overlaps = false;                // DecodeParams
};

// Whether the launch reads a key or writes an output at all.
inline bool decode_launches(const DecodeKernel& kernel) {
  const Problem& p = kernel.problem;
  const int64_t rows = p.varlen ? p.total_q : int64_t{p.batch_size} * p.seqlen_q;
  return rows * p.num_heads_q > 0 && kernel.planned.plan.num_ctas > 0;
}

// Writes `out`; returns lse, [batch, heads, seqlen_q] or [heads, total_q].
inline Tensor launch_decode(const DecodeKernel& kernel, const DecodeArgs& a, const Tensor& out,
                            AppendedKeys appended = {}) {
  const Problem& problem = kernel.problem;
  const Plan& plan = kernel.planned.plan;
  const int batch_size = problem.batch_size;
  const Shape lse_shape = problem.varlen ? Shape{problem.num_heads_q, problem.total_q}
                                         : Shape{batch_size, problem.num_heads_q, problem.seqlen_q};
  Tensor lse = new_tensor(a.q, lse_shape, ScalarType::Float);
  if (lse.numel() == 0) return lse;  // no row of q

  DecodeParams p{};
  const auto vector = [&](const char* name, const Tensor* t, int size) {
    return t == nullptr ? nullptr : int32_vector(name, *t, a.q, size);
  };
  p.seqlens_q = {vector("cu_seqlens_q", a.cu_seqlens_q, batch_size + 1),
                 vector("seqused_q", a.seqused_q, batch_size), nullptr, problem.seqlen_q};
  p.seqlens_k = {vector("cu_seqlens_k", a.cu_seqlens_k, batch_size + 1),
                 vector("cache_seqlens", a.cache_seqlens, batch_size),
                 vector("cache_leftpad", a.cache_leftpad, batch_size), problem.seqlen_k};
  p.cu_seqlens_new = appended.cu_seqlens_new;
  p.seqlen_new = appended.seqlen_new;
  p.append = appended.by_decode;
  p.same_position = appended.same_position;
  p.overlaps = appended.overlaps;
  p.cache_batch_idx = vector("cache_batch_idx", a.cache_batch_idx, batch_size);
  if (a.page_table != nullptr) {
    p.page_table = static_cast<const int*>(a.page_table->data_ptr());
    p.page_table_batch_stride = a.page_table->stride(0);
    p.page_table_rows = to_int("page_table rows", a.page_table->size(0));
  }
  const AttentionArgs attention{a.q, a.k_cache, a.v_cache, nullptr, a.page_table, a.scores};
  p.score = score_params(attention, problem);
  p.batch_size = batch_size;
  p.num_heads_q = problem.num_heads_q;
  p.num_heads_kv = problem.num_heads_kv;
  p.head_dim = problem.head_dim;
  p.head_dim_v = problem.head_dim_v;
  p.total_q = problem.varlen ? problem.total_q : batch_size * problem.seqlen_q;
  p.num_caches = to_int("caches", a.k_cache.size(0));
  p.page_size = problem.page_size;
  p.tile_m = plan.tile_m;
  p.tile_n = plan.tile_n;
  p.num_threads = plan.num_threads;
  p.num_splits = problem.num_splits;
  p.num_ctas = static_cast<int>(plan.num_ctas);
  p.dtype = problem.dtype;
  const Scratch workspace(plan.workspace_bytes, a.device_index());
  p.partial = static_cast<float*>(workspace.data());

  const Tensor q = readable_rows(appended.rotated_q == nullptr ? a.q : *appended.rotated_q);
  Tensor written = writable_rows(out);
  p.lse = static_cast<float*>(lse.data_ptr());
  p.q = q.data_ptr();
  p.k = a.k_cache.data_ptr();
  p.v = a.v_cache.data_ptr();
  p.out = written.data_ptr();
  p.q_strides = strides_of(q);
  p.k_strides = strides_of(a.k_cache);
  p.v_strides = strides_of(a.v_cache);
  p.out_strides = strides_of(written);
  const Backend& backend = *kernel.planned.backend;
  launch(backend, backend.decode, p, a.device_index());
  store_rows(written, out);
  return lse;
}

}  // namespace fa
