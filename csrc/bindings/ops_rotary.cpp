// Ops of the rotary embedding: rotary and rotary_.
#include "bindings/device.h"
#include "bindings/rotary_table.h"
#include "bindings/stable_torch.h"
#include "bindings/tensor_checks.h"

namespace fa {
namespace {

PlannedKernel plan_rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
                          const OptionalTensor& cu_seqlens, bool interleaved) {
  const int64_t rank = x.dim();
  FA_CHECK(rank == (cu_seqlens ? 3 : 4), "x: got ", rank,
           " dimensions, expected [batch, seqlen, heads, head_dim], or [total, heads, head_dim] "
           "with cu_seqlens");
  const std::optional<DType> dtype = dtype_of(x.scalar_type());
  if (!dtype) return {};
  Problem problem;
  problem.family = Family::kRotary;
  problem.dtype = *dtype;
  problem.head_dim = problem.head_dim_v = to_int("head_dim", x.size(rank - 1));
  problem.rotary_dim = 2 * to_int("rotary_dim", cos.size(cos.dim() - 1));
  problem.batch_size = to_int("batch", cu_seqlens ? cu_seqlens->size(0) - 1 : x.size(0));
  problem.seqlen_q = to_int("seqlen", cu_seqlens ? x.size(0) : x.size(1));
  problem.num_heads_q = problem.num_heads_kv = to_int("heads", x.size(rank - 2));
  problem.varlen = cu_seqlens.has_value();
  problem.rotary_interleaved = interleaved;
  // The output of the op that is not in place is contiguous, so its rows are aligned if x's are.
  const bool aligned = rows_aligned(x, 16) && rows_aligned(cos, 16) && rows_aligned(sin, 16);
  problem.alignment_bytes = aligned ? 16 : 1;
  return plan_kernel(problem, x.get_device_index());
}

void launch_rotary(const PlannedKernel& kernel, const Tensor& x, const Tensor& out, const Tensor& cos,
                   const Tensor& sin, const OptionalTensor& seqlen_offsets,
                   const OptionalTensor& cu_seqlens, bool interleaved, bool conjugate,
                   bool same_position) {
  const int64_t rank = x.dim();
  check_tensor("x", x, x, rank);
  RotaryParams p{};
  p.x = x.data_ptr();
  p.out = out.data_ptr();
  p.batch_size = to_int("batch", cu_seqlens ? cu_seqlens->size(0) - 1 : x.size(0));
  p.seqlen = to_int("seqlen", cu_seqlens ? x.size(0) : x.size(1));
  p.num_heads = to_int("heads", x.size(rank - 2));
  p.head_dim = to_int("head_dim", x.size(rank - 1));
  p.seqlen_offsets = int32_vector("seqlen_offsets", seqlen_offsets, x, p.batch_size);
  p.cu_seqlens = int32_vector("cu_seqlens", cu_seqlens, x, p.batch_size + 1);
  p.x_strides = strides_of(x);
  p.out_strides = strides_of(out);
  p.table = rotary_table(cos, sin, x, interleaved, conjugate);
  p.dtype = *dtype_of(x.scalar_type());
  p.same_position = same_position;
  p.vectorized = kernel.plan.vectorized;
  if (x.numel() == 0) return;
  launch(*kernel.backend, kernel.backend->rotary, p, x.get_device_index());
}

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
              const OptionalTensor& seqlen_offsets, const OptionalTensor& cu_seqlens,
              int64_t max_seqlen, bool interleaved, bool conjugate, bool same_position) {
  const PlannedKernel kernel = plan_rotary(x, cos, sin, cu_seqlens, interleaved);
  if (kernel.backend == nullptr) {
    return call_tiled<Tensor>("flash_attn_ext::rotary", x, cos, sin, seqlen_offsets, cu_seqlens,
                              max_seqlen, interleaved, conjugate, same_position);
  }
  // Contiguous, whatever the strides of x: the fake implementation says the same.
  Tensor out = torch::stable::new_empty(x, x.sizes());
  launch_rotary(kernel, x, out, cos, sin, seqlen_offsets, cu_seqlens, interleaved, conjugate,
                same_position);
  return out;
}

void rotary_in_place(const Tensor& x, const Tensor& cos, const Tensor& sin,
                     const OptionalTensor& seqlen_offsets, const OptionalTensor& cu_seqlens,
                     int64_t max_seqlen, bool interleaved, bool conjugate, bool same_position) {
  const PlannedKernel kernel = plan_rotary(x, cos, sin, cu_seqlens, interleaved);
  if (kernel.backend == nullptr) {
    return call_tiled<void>("flash_attn_ext::rotary_", x, cos, sin, seqlen_offsets, cu_seqlens,
                            max_seqlen, interleaved, conjugate, same_position);
  }
  launch_rotary(kernel, x, x, cos, sin, seqlen_offsets, cu_seqlens, interleaved, conjugate,
                same_position);
}

}  // namespace
}  // namespace fa

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  m.impl("rotary", TORCH_BOX(&fa::rotary));
  m.impl("rotary_", TORCH_BOX(&fa::rotary_in_place));
}
