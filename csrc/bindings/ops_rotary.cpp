// Ops of the rotary embedding: rotary and rotary_.
#include "bindings/device.h"
#include "bindings/rotary_op.h"
#include "bindings/rotary_table.h"
#include "bindings/stable_torch.h"
#include "bindings/tensor_checks.h"

namespace fa {
namespace {

// Arguments of both ops, in the order of the schema.
struct RotaryArgs {
  const Tensor &x, &cos, &sin;
  const OptionalTensor &seqlen_offsets, &cu_seqlens;
  int64_t max_seqlen;  // the kernel needs the total alone
  bool interleaved, conjugate, same_position;

  template <class Ret>
  Ret call_tiled(const char* name) const {
    return fa::call_tiled<Ret>(name, x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen,
                               interleaved, conjugate, same_position);
  }
};

PlannedKernel plan_rotary(const RotaryArgs& args) {
  const Tensor& x = args.x;
  const bool varlen = args.cu_seqlens.has_value();
  const int64_t rank = x.dim();
  FA_CHECK(rank == (varlen ? 3 : 4), "x: got ", rank,
           " dimensions, expected [batch, seqlen, heads, head_dim], or [total, heads, head_dim] "
           "with cu_seqlens");
  const std::optional<DType> dtype = dtype_of(x.scalar_type());
  if (!dtype) return {};
  Problem problem;
  problem.family = Family::kRotary;
  problem.dtype = *dtype;
  problem.head_dim = problem.head_dim_v = to_int("head_dim", x.size(rank - 1));
  problem.rotary_dim = 2 * to_int("rotary_dim", args.cos.size(args.cos.dim() - 1));
  problem.rotary_interleaved = args.interleaved;
  problem.batch_size = to_int("batch", varlen ? args.cu_seqlens->size(0) - 1 : x.size(0));
  problem.seqlen_q = to_int("seqlen", varlen ? x.size(0) : x.size(1));
  problem.num_heads_q = problem.num_heads_kv = to_int("heads", x.size(rank - 2));
  problem.varlen = varlen;
  // The output of the op that is not in place is contiguous, so its rows are aligned if x's are.
  const bool aligned =
      rows_aligned(x, 16) && rows_aligned(args.cos, 16) && rows_aligned(args.sin, 16);
  problem.alignment_bytes = aligned ? 16 : 1;
  return plan_kernel(problem, x.get_device_index());
}

// out: x itself, or a tensor of its shape.
RotaryParams rotary_params(const PlannedKernel& kernel, const RotaryArgs& args, const Tensor& out) {
  const Tensor& x = args.x;
  const bool varlen = args.cu_seqlens.has_value();
  const int64_t rank = x.dim();
  check_tensor("x", x, x, rank);
  RotaryParams p{};
  p.x = x.data_ptr();
  p.out = out.data_ptr();
  p.batch_size = to_int("batch", varlen ? args.cu_seqlens->size(0) - 1 : x.size(0));
  p.seqlen = to_int("seqlen", varlen ? x.size(0) : x.size(1));
  p.num_heads = to_int("heads", x.size(rank - 2));
  p.head_dim = to_int("head_dim", x.size(rank - 1));
  p.seqlen_offsets = int32_vector("seqlen_offsets", args.seqlen_offsets, x, p.batch_size);
  p.cu_seqlens = int32_vector("cu_seqlens", args.cu_seqlens, x, p.batch_size + 1);
  p.x_strides = strides_of(x);
  p.out_strides = strides_of(out);
  p.table = rotary_table(args.cos, args.sin, x, args.interleaved, args.conjugate);
  p.dtype = *dtype_of(x.scalar_type());
  p.same_position = args.same_position;
  p.vectorized = kernel.plan.vectorized;
  return p;
}

void launch_rotary(const PlannedKernel& kernel, const RotaryArgs& args, const Tensor& out) {
  const RotaryParams p = rotary_params(kernel, args, out);
  if (args.x.numel() == 0) return;
  launch(*kernel.backend, kernel.backend->rotary, p, args.x.get_device_index());
}

}  // namespace

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin,
              const OptionalTensor& seqlen_offsets, const OptionalTensor& cu_seqlens,
              int64_t max_seqlen, bool interleaved, bool conjugate, bool same_position) {
  const RotaryArgs args{x,          cos,         sin,       seqlen_offsets, cu_seqlens,
                        max_seqlen, interleaved, conjugate, same_position};
  const PlannedKernel kernel = plan_rotary(args);
  if (kernel.backend == nullptr) return args.call_tiled<Tensor>("flash_attn_ext::rotary");
  // Contiguous, whatever the strides of x: the fake implementation says the same.
  Tensor out = new_tensor(x, Shape(x));
  launch_rotary(kernel, args, out);
  return out;
}

std::optional<PlannedRotation> plan_rotation(const Tensor& x, const Tensor& cos, const Tensor& sin,
                                             const OptionalTensor& seqlen_offsets,
                                             const OptionalTensor& cu_seqlens, int64_t max_seqlen,
                                             bool interleaved, bool conjugate, bool same_position) {
  const RotaryArgs args{x,          cos,         sin,       seqlen_offsets, cu_seqlens,
                        max_seqlen, interleaved, conjugate, same_position};
  const PlannedKernel kernel = plan_rotary(args);
  if (kernel.backend == nullptr) return std::nullopt;
  Tensor out = new_tensor(x, Shape(x));
  return PlannedRotation{rotary_params(kernel, args, out), out};
}

namespace {

void rotary_in_place(const Tensor& x, const Tensor& cos, const Tensor& sin,
                     const OptionalTensor& seqlen_offsets, const OptionalTensor& cu_seqlens,
                     int64_t max_seqlen, bool interleaved, bool conjugate, bool same_position) {
  const RotaryArgs args{x,          cos,         sin,       seqlen_offsets, cu_seqlens,
                        max_seqlen, interleaved, conjugate, same_position};
  const PlannedKernel kernel = plan_rotary(args);
  if (kernel.backend == nullptr) return args.call_tiled<void>("flash_attn_ext::rotary_");
  launch_rotary(kernel, args, x);
}

}  // namespace
}  // namespace fa

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  m.impl("rotary", TORCH_BOX(&fa::rotary));
  m.impl("rotary_", TORCH_BOX(&fa::rotary_in_place));
}
