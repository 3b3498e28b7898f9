// The op bwd_preprocess.
#include "bindings/bwd_preprocess.h"

#include "bindings/device.h"
#include "bindings/tensor_checks.h"

namespace fa {

Tensor bwd_preprocess(const Tensor& out, const Tensor& dout, const OptionalTensor& dlse) {
  const int64_t rank = out.dim();
  FA_CHECK(rank == 3 || rank == 4, "out: got ", rank,
           " dimensions, expected [batch, seqlen, heads, head_dim] or [total, heads, head_dim]");
  check_tensor("out", out, out, rank);
  check_tensor("dout", dout, out, rank);
  check_dtype("dout", dout, out);
  for (int64_t i = 0; i < rank; ++i) check_size("dout", dout, i, out.size(i));

  const bool varlen = rank == 3;
  const std::optional<DType> dtype = dtype_of(out.scalar_type());
  Problem problem;
  problem.family = Family::kBwdPreprocess;
  problem.dtype = dtype.value_or(DType::kFloat64);
  problem.head_dim = problem.head_dim_v = to_int("head_dim", out.size(rank - 1));
  problem.batch_size = varlen ? 1 : to_int("batch", out.size(0));
  problem.seqlen_q = to_int("seqlen", out.size(rank - 3));
  problem.num_heads_q = problem.num_heads_kv = to_int("heads", out.size(rank - 2));
  problem.varlen = varlen;
  problem.alignment_bytes = rows_aligned(out, 16) && rows_aligned(dout, 16) ? 16 : 1;
  const PlannedKernel kernel = plan_kernel(problem, out.get_device_index());
  if (kernel.backend == nullptr) {
    return call_tiled<Tensor>("flash_attn_ext::bwd_preprocess", out, dout, dlse);
  }

  BwdPreprocessParams p{};
  if (dlse) {
    check_dtype("dlse", *dlse, ScalarType::Float);
    FA_CHECK(dlse->dim() == rank - 1 && dlse->is_cuda() &&
                 dlse->get_device_index() == out.get_device_index(),
             "dlse: got ", dlse->dim(), " dimensions or another device, expected ", rank - 1,
             " on the device of out");
    if (!varlen) check_size("dlse", *dlse, 0, problem.batch_size);
    check_size("dlse", *dlse, rank - 3, problem.num_heads_q);
    check_size("dlse", *dlse, rank - 2, problem.seqlen_q);
    p.dlse = static_cast<const float*>(dlse->data_ptr());
    p.dlse_batch_stride = varlen ? 0 : dlse->stride(0);
    p.dlse_head_stride = dlse->stride(rank - 3);
    p.dlse_token_stride = dlse->stride(rank - 2);
  }
  const Shape shape = varlen ? Shape{problem.num_heads_q, problem.seqlen_q}
                             : Shape{problem.batch_size, problem.num_heads_q, problem.seqlen_q};
  Tensor delta = new_tensor(out, shape, ScalarType::Float);
  if (delta.numel() == 0) return delta;
  p.out = out.data_ptr();
  p.dout = dout.data_ptr();
  p.delta = static_cast<float*>(delta.data_ptr());
  p.out_strides = strides_of(out);
  p.dout_strides = strides_of(dout);
  p.batch_size = problem.batch_size;
  p.seqlen = problem.seqlen_q;
  p.num_heads = problem.num_heads_q;
  p.head_dim_v = problem.head_dim_v;
  p.dtype = *dtype;
  p.vectorized = kernel.plan.vectorized;
  launch(*kernel.backend, kernel.backend->bwd_preprocess, p, out.get_device_index());
  return delta;
}

}  // namespace fa

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  m.impl("bwd_preprocess", TORCH_BOX(&fa::bwd_preprocess));
}
