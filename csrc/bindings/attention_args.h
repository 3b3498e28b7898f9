// What the attention ops share: arguments in the order of the schemas, checked once and turned into
// a Problem for the plan and the common fields of FwdParams and BwdParams.
#pragma once
#include <cmath>

#include "bindings/device.h"
#include "bindings/tensor_checks.h"
#include "core/philox.h"

namespace fa {

struct LengthArgs {  // of the varlen ops
  const Tensor& cu_seqlens_q;
  const OptionalTensor &cu_seqlens_k, &seqused_q, &seqused_k;
  int64_t max_seqlen_q, max_seqlen_k;
};

struct ScoreArgs {
  const OptionalTensor &alibi_slopes, &rng_state;
  std::optional<double> softmax_scale;  // nullopt: 1 / sqrt(head_dim)
  int64_t window_left, window_right;
  double softcap, dropout_p;
};

struct AttentionArgs {
  const Tensor &q, &k, &v;
  const LengthArgs* lengths;  // nullptr: fixed length
  const Tensor* page_table;   // nullptr: not paged
  ScoreArgs scores;

  int device_index() const { return q.get_device_index(); }
  float softmax_scale() const {
    if (scores.softmax_scale) return static_cast<float>(*scores.softmax_scale);
    return static_cast<float>(1. / std::sqrt(static_cast<double>(q.size(q.dim() - 1))));
  }
};

// Rank, device, element type and sizes of q, k and v.
inline void check_attention(const AttentionArgs& a) {
  const int64_t rank = a.lengths ? 3 : 4, rank_k = a.page_table ? 4 : rank;
  check_place("q", a.q, a.q, rank);
  check_place("k", a.k, a.q, rank_k);
  check_place("v", a.v, a.q, rank_k);
  check_dtype("k", a.k, a.q);
  check_dtype("v", a.v, a.q);
  const auto q_size = a.q.sizes(), k_size = a.k.sizes();
  for (int64_t i = 0; i + 1 < rank_k; ++i) check_size("v", a.v, i, k_size[i]);
  if (!a.lengths) check_size("k", a.k, 0, q_size[0]);
  check_size("k", a.k, rank_k - 1, q_size[rank - 1]);
  const int64_t heads_q = q_size[rank - 2], heads_kv = k_size[rank_k - 2];
  FA_CHECK(heads_kv > 0 ? heads_q % heads_kv == 0 : heads_q == 0, "q: got ", heads_q,
           " heads, expected a multiple of the ", heads_kv, " of k");
}

inline Problem attention_problem(Family family, const AttentionArgs& a) {
  check_attention(a);
  constexpr int64_t kMaxWindow = 1 << 30;  // beyond any length
  const int64_t rank = a.q.dim(), rank_k = a.k.dim();
  Problem p;
  p.family = family;
  p.dtype = dtype_of(a.q.scalar_type()).value_or(DType::kFloat64);
  p.head_dim = to_int("head_dim", a.q.size(rank - 1));
  p.head_dim_v = to_int("head_dim_v", a.v.size(rank_k - 1));
  p.num_heads_q = to_int("heads of q", a.q.size(rank - 2));
  p.num_heads_kv = to_int("heads of k", a.k.size(rank_k - 2));
  p.varlen = a.lengths != nullptr;
  if (p.varlen) {
    p.batch_size = to_int("batch", a.lengths->cu_seqlens_q.size(0) - 1);
    p.seqlen_q = to_int("max_seqlen_q", a.lengths->max_seqlen_q);
    p.seqlen_k = to_int("max_seqlen_k", a.lengths->max_seqlen_k);
    p.total_q = to_int("total_q", a.q.size(0));
    p.total_k = a.page_table ? 0 : to_int("total_k", a.k.size(0));
    p.page_size = a.page_table ? to_int("page_size", a.k.size(1)) : 0;
  } else {
    p.batch_size = to_int("batch", a.q.size(0));
    p.seqlen_q = to_int("seqlen_q", a.q.size(1));
    p.seqlen_k = to_int("seqlen_k", a.k.size(1));
  }
  p.window_left = static_cast<int>(clamp<int64_t>(a.scores.window_left, kUnbounded, kMaxWindow));
  p.window_right = static_cast<int>(clamp<int64_t>(a.scores.window_right, kUnbounded, kMaxWindow));
  p.softcap = a.scores.softcap != 0.;
  p.alibi = a.scores.alibi_slopes.has_value();
  p.dropout = keep_threshold(a.scores.dropout_p) < 256;
  p.positive_scale = a.softmax_scale() > 0.f;
  return p;
}

inline ScoreParams score_params(const AttentionArgs& a, const Problem& problem) {
  const ScoreArgs& scores = a.scores;
  FA_CHECK(scores.softcap >= 0., "softcap: got ", scores.softcap, ", expected 0 (off) or more");
  FA_CHECK(0. <= scores.dropout_p && scores.dropout_p < 1., "dropout_p: got ", scores.dropout_p,
           ", expected 0 <= dropout_p < 1");
  ScoreParams p{};
  p.softmax_scale = a.softmax_scale();
  p.softcap = static_cast<float>(scores.softcap);
  p.window_left = problem.window_left;
  p.window_right = problem.window_right;
  p.keep_threshold = keep_threshold(scores.dropout_p);
  if (scores.alibi_slopes) {
    const Tensor& slopes = *scores.alibi_slopes;
    const int64_t rank = slopes.dim() == 2 ? 2 : 1;
    check_tensor("alibi_slopes", slopes, a.q, rank);
    check_dtype("alibi_slopes", slopes, ScalarType::Float);
    check_size("alibi_slopes", slopes, rank - 1, problem.num_heads_q);
    if (rank == 2) check_size("alibi_slopes", slopes, 0, problem.batch_size);
    p.alibi_slopes = static_cast<const float*>(slopes.data_ptr());
    p.alibi_batch_stride = rank == 2 ? slopes.stride(0) : 0;
  }
  if (problem.dropout) {
    FA_CHECK(scores.rng_state.has_value(), "rng_state: got None, expected (seed, offset)");
    check_tensor("rng_state", *scores.rng_state, a.q, 1);
    check_dtype("rng_state", *scores.rng_state, ScalarType::Long);
    check_size("rng_state", *scores.rng_state, 0, 2);
    p.rng_state = static_cast<const int64_t*>(scores.rng_state->data_ptr());
  }
  return p;
}

// Rows of 16-bit elements are copied 16 bytes at a time, so head dimensions are whole multiples.
constexpr int kHeadDimStep = 8;

// The fields that FwdParams and BwdParams share, except tensors and their strides.
template <class Params>
void fill_common(Params& p, const AttentionArgs& a, const Problem& problem, const Plan& plan) {
  const int batch_size = problem.batch_size;
  p.seqlens_q.max_seqlen = problem.seqlen_q;
  p.seqlens_k.max_seqlen = problem.seqlen_k;
  if (a.lengths) {
    const LengthArgs& l = *a.lengths;
    FA_CHECK(l.cu_seqlens_k.has_value(), "cu_seqlens_k: got None, expected [batch + 1]");
    p.seqlens_q.cu_seqlens = int32_vector("cu_seqlens_q", l.cu_seqlens_q, a.q, batch_size + 1);
    p.seqlens_k.cu_seqlens = int32_vector("cu_seqlens_k", l.cu_seqlens_k, a.q, batch_size + 1);
    p.seqlens_q.seqused = int32_vector("seqused_q", l.seqused_q, a.q, batch_size);
    p.seqlens_k.seqused = int32_vector("seqused_k", l.seqused_k, a.q, batch_size);
  }
  p.score = score_params(a, problem);
  p.batch_size = batch_size;
  p.num_heads_q = problem.num_heads_q;
  p.num_heads_kv = problem.num_heads_kv;
  p.head_dim = round_up(problem.head_dim, kHeadDimStep);
  p.head_dim_v = round_up(problem.head_dim_v, kHeadDimStep);
  p.total_q = problem.varlen ? problem.total_q : batch_size * problem.seqlen_q;
  p.total_k = problem.varlen ? problem.total_k : batch_size * problem.seqlen_k;
  p.dtype = problem.dtype;
  p.tiles = plan.tiles;
}

}  // namespace fa
