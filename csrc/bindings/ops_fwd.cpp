// Ops of the attention forward: fwd, varlen_fwd, and their forms that write into a given `out`.
#include "bindings/aligned_rows.h"
#include "bindings/attention_args.h"
#include "bindings/decode_args.h"
#include "bindings/prefill.h"

namespace fa {
namespace {

constexpr int kDmaskStep = 128;  // rows and columns of dmask are multiples of it

struct FwdArgs {
  AttentionArgs attention;
  bool return_dmask;
  int64_t num_splits, sm_margin;
  const SeqlenArgs* seqlens_k = nullptr;  // of keys in a cache, in place of their fixed length

  // The tiled overload of op `name`: `head`, then the arguments that all four ops end with.
  template <class Ret, class... Head>
  Ret call_tiled(const char* name, const Head&... head) const {
    const ScoreArgs& s = attention.scores;
    return fa::call_tiled<Ret>(name, head..., s.alibi_slopes, s.rng_state, s.softmax_scale,
                               s.window_left, s.window_right, s.softcap, s.dropout_p, return_dmask,
                               num_splits, sm_margin);
  }
};

struct FwdKernel {
  Problem problem;
  PlannedKernel planned;
  explicit operator bool() const { return planned.backend && planned.backend->fwd; }
};

FwdKernel plan_fwd(const FwdArgs& args) {
  Problem problem = attention_problem(Family::kFwd, args.attention);
  problem.num_splits = to_int("num_splits", args.num_splits);
  problem.dmask = args.return_dmask;
  return {problem, plan_kernel(problem, args.attention.device_index())};
}

Tensor new_out(const Tensor& q, const Tensor& v) {
  Shape shape(q);
  shape.last() = v.size(v.dim() - 1);
  return new_tensor(q, shape);
}

// [batch, heads, seqlen_q] or [heads, total_q].
Tensor new_lse(const Tensor& q, const Problem& p) {
  const Shape shape =
      p.varlen ? Shape{p.num_heads_q, p.total_q} : Shape{p.batch_size, p.num_heads_q, p.seqlen_q};
  return new_tensor(q, shape, ScalarType::Float);
}

// lse and dmask of a launch into `out`.
std::tuple<Tensor, Tensor> launch_fwd(const FwdKernel& kernel, const FwdArgs& args,
                                      const Tensor& out) {
  const AttentionArgs& a = args.attention;
  const Problem& problem = kernel.problem;
  FwdParams p{};
  fill_common(p, a, problem, kernel.planned.plan);
  if (args.seqlens_k != nullptr) p.seqlens_k = *args.seqlens_k;
  p.sm90_tile = kernel.planned.plan.sm90_tile;
  p.sm_margin = to_int("sm_margin", args.sm_margin);

  Tensor lse = new_lse(a.q, problem);
  p.lse = static_cast<float*>(lse.data_ptr());
  p.dmask_rows = args.return_dmask ? round_up(problem.seqlen_q, kDmaskStep) : 0;
  p.dmask_cols = args.return_dmask ? round_up(problem.seqlen_k, kDmaskStep) : 0;
  Tensor dmask =
      args.return_dmask
          ? zero_tensor(a.q, {problem.batch_size, problem.num_heads_q, p.dmask_rows, p.dmask_cols})
          : new_tensor(a.q, {0});
  if (dmask.numel() > 0) p.dmask = dmask.data_ptr();
  if (lse.numel() == 0) return {lse, dmask};  // no row of q

  const Tensor q = readable_rows(a.q), k = readable_rows(a.k), v = readable_rows(a.v);
  Tensor written = writable_rows(out);
  p.q = q.data_ptr();
  p.k = k.data_ptr();
  p.v = v.data_ptr();
  p.out = written.data_ptr();
  p.q_strides = strides_of(q);
  p.k_strides = strides_of(k);
  p.v_strides = strides_of(v);
  p.out_strides = strides_of(written);
  const Backend& backend = *kernel.planned.backend;
  launch(backend, backend.fwd, p, a.device_index());
  store_rows(written, out);
  return {lse, dmask};
}

std::tuple<Tensor, Tensor, Tensor> launch_fwd(const FwdKernel& kernel, const FwdArgs& args) {
  Tensor out = new_out(args.attention.q, args.attention.v);
  auto [lse, dmask] = launch_fwd(kernel, args, out);
  return {out, lse, dmask};
}

void check_out(const AttentionArgs& a, const Tensor& out) {
  const int64_t rank = a.q.dim();
  check_place("out", out, a.q, rank);
  check_dtype("out", out, a.q);
  for (int64_t i = 0; i + 1 < rank; ++i) check_size("out", out, i, a.q.size(i));
  check_size("out", out, rank - 1, a.v.size(a.v.dim() - 1));
}

// The keys of varlen_fwd in pages: the decode kernels have them.
DecodeArgs paged_args(const FwdArgs& args) {
  const AttentionArgs& a = args.attention;
  const LengthArgs& l = *a.lengths;
  return {a.q,
          a.k,
          a.v,
          pointer_to(l.seqused_k),
          nullptr,
          nullptr,
          a.page_table,
          &l.cu_seqlens_q,
          pointer_to(l.seqused_q),
          pointer_to(l.cu_seqlens_k),
          l.max_seqlen_q,
          l.max_seqlen_k,
          a.scores,
          args.num_splits,
          args.sm_margin};
}

using OutLseDmask = std::tuple<Tensor, Tensor, Tensor>;
using LseDmask = std::tuple<Tensor, Tensor>;

OutLseDmask fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                const OptionalTensor& alibi_slopes, const OptionalTensor& rng_state,
                std::optional<double> softmax_scale, int64_t window_left, int64_t window_right,
                double softcap, double dropout_p, bool return_dmask, int64_t num_splits,
                int64_t sm_margin) {
  const ScoreArgs scores{alibi_slopes, rng_state, softmax_scale, window_left,
                         window_right, softcap,   dropout_p};
  const FwdArgs args{{q, k, v, nullptr, nullptr, scores}, return_dmask, num_splits, sm_margin};
  const FwdKernel kernel = plan_fwd(args);
  if (!kernel) return args.call_tiled<OutLseDmask>("flash_attn_ext::fwd", q, k, v);
  return launch_fwd(kernel, args);
}

LseDmask fwd_out(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                 const OptionalTensor& alibi_slopes, const OptionalTensor& rng_state,
                 std::optional<double> softmax_scale, int64_t window_left, int64_t window_right,
                 double softcap, double dropout_p, bool return_dmask, int64_t num_splits,
                 int64_t sm_margin) {
  const ScoreArgs scores{alibi_slopes, rng_state, softmax_scale, window_left,
                         window_right, softcap,   dropout_p};
  const FwdArgs args{{q, k, v, nullptr, nullptr, scores}, return_dmask, num_splits, sm_margin};
  const FwdKernel kernel = plan_fwd(args);
  check_out(args.attention, out);
  if (!kernel) return args.call_tiled<LseDmask>("flash_attn_ext::fwd_out", q, k, v, out);
  return launch_fwd(kernel, args, out);
}

OutLseDmask varlen_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                       const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                       const OptionalTensor& seqused_q, const OptionalTensor& seqused_k,
                       const OptionalTensor& page_table, int64_t max_seqlen_q, int64_t max_seqlen_k,
                       const OptionalTensor& alibi_slopes, const OptionalTensor& rng_state,
                       std::optional<double> softmax_scale, int64_t window_left,
                       int64_t window_right, double softcap, double dropout_p, bool return_dmask,
                       int64_t num_splits, int64_t sm_margin) {
  const LengthArgs lengths{cu_seqlens_q, cu_seqlens_k, seqused_q,
                           seqused_k,    max_seqlen_q, max_seqlen_k};
  const ScoreArgs scores{alibi_slopes, rng_state, softmax_scale, window_left,
                         window_right, softcap,   dropout_p};
  const FwdArgs args{{q, k, v, &lengths, page_table ? &*page_table : nullptr, scores},
                     return_dmask,
                     num_splits,
                     sm_margin};
  if (page_table && !return_dmask) {
    const DecodeArgs paged = paged_args(args);
    if (const DecodeKernel decode = plan_decode(paged)) {
      Tensor out = new_decode_out(paged);
      Tensor lse = launch_decode(decode, paged, out);
      return {out, lse, new_tensor(q, {0})};
    }
  }
  const FwdKernel kernel = page_table ? FwdKernel{} : plan_fwd(args);
  if (!kernel) {
    return args.call_tiled<OutLseDmask>("flash_attn_ext::varlen_fwd", q, k, v, cu_seqlens_q,
                                        cu_seqlens_k, seqused_q, seqused_k, page_table,
                                        max_seqlen_q, max_seqlen_k);
  }
  return launch_fwd(kernel, args);
}

LseDmask varlen_fwd_out(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                        const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                        const OptionalTensor& seqused_q, const OptionalTensor& seqused_k,
                        const OptionalTensor& page_table, int64_t max_seqlen_q,
                        int64_t max_seqlen_k, const OptionalTensor& alibi_slopes,
                        const OptionalTensor& rng_state, std::optional<double> softmax_scale,
                        int64_t window_left, int64_t window_right, double softcap, double dropout_p,
                        bool return_dmask, int64_t num_splits, int64_t sm_margin) {
  const LengthArgs lengths{cu_seqlens_q, cu_seqlens_k, seqused_q,
                           seqused_k,    max_seqlen_q, max_seqlen_k};
  const ScoreArgs scores{alibi_slopes, rng_state, softmax_scale, window_left,
                         window_right, softcap,   dropout_p};
  const FwdArgs args{{q, k, v, &lengths, page_table ? &*page_table : nullptr, scores},
                     return_dmask,
                     num_splits,
                     sm_margin};
  check_out(args.attention, out);
  if (page_table && !return_dmask) {
    const DecodeArgs paged = paged_args(args);
    if (const DecodeKernel decode = plan_decode(paged))
      return {launch_decode(decode, paged, out), new_tensor(q, {0})};
  }
  const FwdKernel kernel = page_table ? FwdKernel{} : plan_fwd(args);
  if (!kernel) {
    return args.call_tiled<LseDmask>("flash_attn_ext::varlen_fwd_out", q, k, v, out, cu_seqlens_q,
                                     cu_seqlens_k, seqused_q, seqused_k, page_table, max_seqlen_q,
                                     max_seqlen_k);
  }
  return launch_fwd(kernel, args, out);
}

// The keys of a cache, as far as they fit the forward.
FwdArgs prefill_args(const DecodeArgs& a, const Tensor& q) {
  return {{q, a.k_cache, a.v_cache, nullptr, nullptr, a.scores}, false, a.num_splits, a.sm_margin};
}

}  // namespace

bool is_prefill(const DecodeArgs& a, const DecodeKernel& decode, const AppendedKeys& appended) {
  constexpr int64_t kSmallestTile =
      128;  // rows; decode of a few queries needs no plan of a forward
  if (!a.varlen() && 2 * a.q.size(1) <= kSmallestTile) return false;
  const bool is_contiguous = a.page_table == nullptr && a.cache_batch_idx == nullptr;
  const bool is_even = !a.varlen() && appended.cu_seqlens_new == nullptr;
  // One split promises the same bits whatever the number of queries.
  if (!is_contiguous || !is_even || a.num_splits != 0 || a.q.size(0) != a.k_cache.size(0) ||
      !has_whole_rows(a.k_cache) || !has_whole_rows(a.v_cache))
    return false;
  const FwdKernel kernel = plan_fwd(prefill_args(a, a.q));
  if (!kernel || kernel.planned.backend->arch != 90) return false;
  // It gives every query head tiles of its own: more than half full, and for half of the SMs; for
  // most of them where decode has wgmma too.
  const Problem& problem = kernel.problem;
  const int tile_m = kernel.planned.plan.tile_m;
  const int64_t tiles =
      int64_t{problem.batch_size} * problem.num_heads_q * ceil_div(problem.seqlen_q, tile_m);
  const int64_t percent = decode.planned.plan.tile_m == kDecodeWgmmaRows ? 80 : 50;
  return 2 * problem.seqlen_q > tile_m &&
         100 * tiles >= percent * device_facts(a.device_index()).num_sms;
}

std::tuple<Tensor, Tensor> prefill(const DecodeArgs& a, const AppendedKeys& appended) {
  FwdArgs args = prefill_args(a, appended.rotated_q == nullptr ? a.q : *appended.rotated_q);
  const FwdKernel kernel = plan_fwd(args);
  const auto vector = [&](const char* name, const Tensor* t) {
    return t == nullptr ? nullptr : int32_vector(name, *t, a.q, kernel.problem.batch_size);
  };
  const SeqlenArgs lengths{nullptr, vector("cache_seqlens", a.cache_seqlens),
                           vector("cache_leftpad", a.cache_leftpad), kernel.problem.seqlen_k,
                           appended.seqlen_new};
  args.seqlens_k = &lengths;
  auto [out, lse, dmask] = launch_fwd(kernel, args);
  return {out, lse};
}

}  // namespace fa

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  m.impl("fwd", TORCH_BOX(&fa::fwd));
  m.impl("fwd_out", TORCH_BOX(&fa::fwd_out));
  m.impl("varlen_fwd", TORCH_BOX(&fa::varlen_fwd));
  m.impl("varlen_fwd_out", TORCH_BOX(&fa::varlen_fwd_out));
}
