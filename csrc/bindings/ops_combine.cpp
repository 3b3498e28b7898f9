// Ops that merge partial results: combine and combine_out.
#include "bindings/device.h"
#include "bindings/stable_torch.h"
#include "bindings/tensor_checks.h"

namespace fa {
namespace {

// Partial tensors of [splits, batch, token, head, dim], or varlen [splits, token, head, dim].
struct CombineShape {
  bool varlen;
  int num_splits, batch_size, seqlen, num_heads, head_dim_v;
};

CombineShape combine_shape(const Tensor& out_partial, const Tensor& lse_partial) {
  const int64_t rank = out_partial.dim();
  FA_CHECK(rank == 4 || rank == 5, "out_partial: got ", rank,
           " dimensions, expected [splits, batch, seqlen, heads, head_dim] or "
           "[splits, total, heads, head_dim]");
  check_tensor("out_partial", out_partial, out_partial, rank);
  check_dtype("out_partial", out_partial, ScalarType::Float);
  check_dtype("lse_partial", lse_partial, ScalarType::Float);
  FA_CHECK(lse_partial.dim() == rank - 1, "lse_partial: got ", lse_partial.dim(),
           " dimensions, expected ", rank - 1);
  FA_CHECK(
      lse_partial.is_cuda() && lse_partial.get_device_index() == out_partial.get_device_index(),
      "lse_partial: got another device than out_partial");
  for (int64_t i = 0; i + 1 < rank; ++i)
    check_size("lse_partial", lse_partial, i, out_partial.size(i));
  const bool varlen = rank == 4;
  return {varlen,
          to_int("splits", out_partial.size(0)),
          varlen ? 1 : to_int("batch", out_partial.size(1)),
          to_int("seqlen", out_partial.size(rank - 3)),
          to_int("heads", out_partial.size(rank - 2)),
          to_int("head_dim", out_partial.size(rank - 1))};
}

PlannedKernel plan_combine(const CombineShape& shape, const Tensor& out_partial,
                           std::optional<DType> out_dtype, bool aligned) {
  if (!out_dtype) return {};
  Problem problem;
  problem.family = Family::kCombine;
  problem.dtype = *out_dtype;
  problem.head_dim = problem.head_dim_v = shape.head_dim_v;
  problem.batch_size = shape.batch_size;
  problem.seqlen_q = shape.seqlen;
  problem.num_heads_q = problem.num_heads_kv = shape.num_heads;
  problem.num_splits = shape.num_splits;
  problem.varlen = shape.varlen;
  problem.alignment_bytes = aligned ? 16 : 4;
  return plan_kernel(problem, out_partial.get_device_index());
}

// Launches into `out`; returns lse.
Tensor launch_combine(const PlannedKernel& kernel, const CombineShape& shape,
                      const Tensor& out_partial, const Tensor& lse_partial, const Tensor& out) {
  const Shape lse_shape = shape.varlen ? Shape{shape.seqlen, shape.num_heads}
                                       : Shape{shape.batch_size, shape.seqlen, shape.num_heads};
  Tensor lse = new_tensor(lse_partial, lse_shape);
  if (lse.numel() == 0) return lse;

  const int b = shape.varlen ? 0 : 1;  // dimensions before the token, beside the splits
  CombineParams p{};
  p.out_partial = static_cast<const float*>(out_partial.data_ptr());
  p.lse_partial = static_cast<const float*>(lse_partial.data_ptr());
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.out_partial_split_stride = out_partial.stride(0);
  p.out_partial_strides = {b ? out_partial.stride(1) : 0, out_partial.stride(1 + b),
                           out_partial.stride(2 + b)};
  p.lse_partial_split_stride = lse_partial.stride(0);
  p.lse_partial_batch_stride = b ? lse_partial.stride(1) : 0;
  p.lse_partial_token_stride = lse_partial.stride(1 + b);
  p.lse_partial_head_stride = lse_partial.stride(2 + b);
  p.out_strides = strides_of(out);
  p.num_splits = shape.num_splits;
  p.batch_size = shape.batch_size;
  p.seqlen = shape.seqlen;
  p.num_heads = shape.num_heads;
  p.head_dim_v = shape.head_dim_v;
  p.out_dtype = *dtype_of(out.scalar_type());
  p.vectorized = kernel.plan.vectorized;
  launch(*kernel.backend, kernel.backend->combine, p, out_partial.get_device_index());
  return lse;
}

std::tuple<Tensor, Tensor> combine(const Tensor& out_partial, const Tensor& lse_partial,
                                   std::optional<ScalarType> out_dtype) {
  const CombineShape shape = combine_shape(out_partial, lse_partial);
  const ScalarType type = out_dtype.value_or(ScalarType::Float);
  const PlannedKernel kernel =
      plan_combine(shape, out_partial, dtype_of(type), rows_aligned(out_partial, 16));
  if (kernel.backend == nullptr) {
    return call_tiled<std::tuple<Tensor, Tensor>>("flash_attn_ext::combine", out_partial,
                                                  lse_partial, out_dtype);
  }
  const Shape out_shape =
      shape.varlen ? Shape{shape.seqlen, shape.num_heads, shape.head_dim_v}
                   : Shape{shape.batch_size, shape.seqlen, shape.num_heads, shape.head_dim_v};
  Tensor out = new_tensor(out_partial, out_shape, type);
  Tensor lse = launch_combine(kernel, shape, out_partial, lse_partial, out);
  return {out, lse};
}

Tensor combine_out(const Tensor& out_partial, const Tensor& lse_partial, const Tensor& out) {
  const CombineShape shape = combine_shape(out_partial, lse_partial);
  check_tensor("out", out, out_partial, out_partial.dim() - 1);
  for (int64_t i = 0; i < out.dim(); ++i) check_size("out", out, i, out_partial.size(i + 1));
  const bool aligned = rows_aligned(out_partial, 16) && rows_aligned(out, 16);
  const PlannedKernel kernel =
      plan_combine(shape, out_partial, dtype_of(out.scalar_type()), aligned);
  if (kernel.backend == nullptr) {
    return call_tiled<Tensor>("flash_attn_ext::combine_out", out_partial, lse_partial, out);
  }
  return launch_combine(kernel, shape, out_partial, lse_partial, out);
}

}  // namespace
}  // namespace fa

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  m.impl("combine", TORCH_BOX(&fa::combine));
  m.impl("combine_out", TORCH_BOX(&fa::combine_out));
}
