// Ops of the attention backward: bwd and varlen_bwd.
#include "bindings/aligned_rows.h"
#include "bindings/attention_args.h"
#include "bindings/bwd_preprocess.h"
#include "core/bwd_workspace.h"
#include "core/tile_config.h"

namespace fa {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // of q, k, v

struct BwdArgs {
  const Tensor &dout, &out, &lse;
  const OptionalTensor& dlse;
  AttentionArgs attention;
  bool deterministic;
  int64_t sm_margin;
};

void check_results(const BwdArgs& args, const Problem& p) {
  const AttentionArgs& a = args.attention;
  const int64_t rank = a.q.dim();
  const auto check_like_out = [&](const char* name, const Tensor& t) {
    check_place(name, t, a.q, rank);
    check_dtype(name, t, a.q);
    for (int64_t i = 0; i + 1 < rank; ++i) check_size(name, t, i, a.q.size(i));
    check_size(name, t, rank - 1, p.head_dim_v);
  };
  check_like_out("dout", args.dout);
  check_like_out("out", args.out);
  check_place("lse", args.lse, a.q, rank - 1);
  check_dtype("lse", args.lse, ScalarType::Float);
  if (!p.varlen) check_size("lse", args.lse, 0, p.batch_size);
  check_size("lse", args.lse, rank - 3, p.num_heads_q);
  check_size("lse", args.lse, rank - 2, p.varlen ? p.total_q : p.seqlen_q);
}

// Where the kernel adds up dQ in fp32, in tiles of its own, unless a tile of keys has all of it;
// and dK and dV, if CTAs share heads.
struct Workspace {
  OptionalTensor dq_accum, dq_semaphore, dk_accum, dv_accum, dkv_semaphore;
};

Workspace new_workspace(const Tensor& q, const Problem& p, const BwdParams& params,
                        const Plan& plan) {
  const auto zeros = [&](int64_t size, ScalarType type) { return zero_tensor(q, {size}, type); };
  Workspace w;
  if (plan.adds_dq) {
    const int64_t rows =
        bwd_dq_accum_rows(p.varlen, p.batch_size, p.seqlen_q, p.total_q, plan.tile_m);
    const int built = built_head_dim(max(p.head_dim, p.head_dim_v));
    const int64_t elements = bwd_dq_accum_elements(rows, p.num_heads_q, built);
    w.dq_accum = plan.complete_dq ? new_tensor(q, {elements}, ScalarType::Float)
                                  : zeros(elements, ScalarType::Float);
    if (p.deterministic || plan.complete_dq)
      w.dq_semaphore = zeros(bwd_dq_semaphores(rows, p.num_heads_q, plan.tile_m), ScalarType::Int);
  }
  if (plan.head_splits > 1) {
    const int64_t heads = int64_t{params.total_k} * p.num_heads_kv;
    w.dk_accum = zeros(heads * params.head_dim, ScalarType::Float);
    w.dv_accum = zeros(heads * params.head_dim_v, ScalarType::Float);
    if (p.deterministic)
      w.dkv_semaphore = zeros(bwd_dkv_semaphores(p.varlen, p.batch_size, p.seqlen_k, p.total_k,
                                                 p.num_heads_kv, plan.tile_n),
                              ScalarType::Int);
  }
  return w;
}

template <class T>
T* data_of(const OptionalTensor& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

Tensor contiguous_rows(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

Gradients launch_bwd(const PlannedKernel& kernel, const BwdArgs& args, const Problem& problem) {
  const AttentionArgs& a = args.attention;
  check_results(args, problem);
  if (a.q.numel() == 0 || a.k.numel() == 0) {  // nobody sees a key
    const auto zeros = [](const Tensor& t) { return zero_tensor(t, Shape(t)); };
    return {zeros(a.q), zeros(a.k), zeros(a.v)};
  }
  BwdParams p{};
  fill_common(p, a, problem, kernel.plan);
  p.sm_margin = to_int("sm_margin", args.sm_margin);

  const Tensor lse = args.lse.is_contiguous() ? args.lse : torch::stable::contiguous(args.lse);
  const Tensor contiguous_dout = contiguous_rows(args.dout);
  const Tensor delta = bwd_preprocess(contiguous_rows(args.out), contiguous_dout, args.dlse);
  p.head_splits = kernel.plan.head_splits;
  p.complete_dq = kernel.plan.complete_dq;
  const Workspace workspace = new_workspace(a.q, problem, p, kernel.plan);
  p.lse = static_cast<const float*>(lse.data_ptr());
  p.delta = static_cast<const float*>(delta.data_ptr());
  p.dq_accum = data_of<float>(workspace.dq_accum);
  p.dq_semaphore = data_of<int>(workspace.dq_semaphore);
  p.dk_accum = data_of<float>(workspace.dk_accum);
  p.dv_accum = data_of<float>(workspace.dv_accum);
  p.dkv_semaphore = data_of<int>(workspace.dkv_semaphore);

  const Tensor dout = readable_rows(contiguous_dout);
  const Tensor q = readable_rows(a.q), k = readable_rows(a.k), v = readable_rows(a.v);
  Tensor dq = new_tensor(a.q, Shape(a.q));
  Tensor dk = new_tensor(a.k, Shape(a.k));
  Tensor dv = new_tensor(a.v, Shape(a.v));
  Tensor written_dq = writable_rows(dq), written_dk = writable_rows(dk),
         written_dv = writable_rows(dv);
  p.dout = dout.data_ptr();
  p.q = q.data_ptr();
  p.k = k.data_ptr();
  p.v = v.data_ptr();
  p.dq = written_dq.data_ptr();
  p.dk = written_dk.data_ptr();
  p.dv = written_dv.data_ptr();
  p.dout_strides = strides_of(dout);
  p.q_strides = strides_of(q);
  p.k_strides = strides_of(k);
  p.v_strides = strides_of(v);
  p.dq_strides = strides_of(written_dq);
  p.dk_strides = strides_of(written_dk);
  p.dv_strides = strides_of(written_dv);
  launch(*kernel.backend, kernel.backend->bwd, p, a.device_index());
  store_rows(written_dq, dq);
  store_rows(written_dk, dk);
  store_rows(written_dv, dv);
  return {dq, dk, dv};
}

Problem bwd_problem(const BwdArgs& args) {
  Problem problem = attention_problem(Family::kBwd, args.attention);
  problem.deterministic = args.deterministic;
  return problem;
}

// The kernel for a problem; without a backend if its library has none.
PlannedKernel plan_bwd(const Problem& problem, int device_index) {
  const PlannedKernel kernel = plan_kernel(problem, device_index);
  return kernel.backend && kernel.backend->bwd ? kernel : PlannedKernel{};
}

Gradients bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
              const Tensor& out, const Tensor& lse, const OptionalTensor& dlse,
              const OptionalTensor& alibi_slopes, const OptionalTensor& rng_state,
              std::optional<double> softmax_scale, int64_t window_left, int64_t window_right,
              double softcap, double dropout_p, bool deterministic, int64_t sm_margin) {
  const ScoreArgs scores{alibi_slopes, rng_state, softmax_scale, window_left,
                         window_right, softcap,   dropout_p};
  const BwdArgs args{dout,          out,      lse, dlse, {q, k, v, nullptr, nullptr, scores},
                     deterministic, sm_margin};
  const Problem problem = bwd_problem(args);
  const PlannedKernel kernel = plan_bwd(problem, q.get_device_index());
  if (kernel.backend == nullptr) {
    return call_tiled<Gradients>("flash_attn_ext::bwd", dout, q, k, v, out, lse, dlse, alibi_slopes,
                                 rng_state, softmax_scale, window_left, window_right, softcap,
                                 dropout_p, deterministic, sm_margin);
  }
  return launch_bwd(kernel, args, problem);
}

Gradients varlen_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& out, const Tensor& lse, const OptionalTensor& dlse,
                     const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                     const OptionalTensor& seqused_q, const OptionalTensor& seqused_k,
                     int64_t max_seqlen_q, int64_t max_seqlen_k, const OptionalTensor& alibi_slopes,
                     const OptionalTensor& rng_state, std::optional<double> softmax_scale,
                     int64_t window_left, int64_t window_right, double softcap, double dropout_p,
                     bool deterministic, int64_t sm_margin) {
  const LengthArgs lengths{cu_seqlens_q, cu_seqlens_k, seqused_q,
                           seqused_k,    max_seqlen_q, max_seqlen_k};
  const ScoreArgs scores{alibi_slopes, rng_state, softmax_scale, window_left,
                         window_right, softcap,   dropout_p};
  const BwdArgs args{dout,          out,      lse, dlse, {q, k, v, &lengths, nullptr, scores},
                     deterministic, sm_margin};
  const Problem problem = bwd_problem(args);
  const PlannedKernel kernel = plan_bwd(problem, q.get_device_index());
  if (kernel.backend == nullptr) {
    return call_tiled<Gradients>("flash_attn_ext::varlen_bwd", dout, q, k, v, out, lse, dlse,
                                 cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q,
                                 max_seqlen_k, alibi_slopes, rng_state, softmax_scale, window_left,
                                 window_right, softcap, dropout_p, deterministic, sm_margin);
  }
  return launch_bwd(kernel, args, problem);
}

}  // namespace
}  // namespace fa

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  m.impl("bwd", TORCH_BOX(&fa::bwd));
  m.impl("varlen_bwd", TORCH_BOX(&fa::varlen_bwd));
}
