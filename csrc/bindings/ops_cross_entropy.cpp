// Ops of cross-entropy: cross_entropy_fwd, cross_entropy_bwd and cross_entropy_bwd_.
#include "bindings/device.h"
#include "bindings/stable_torch.h"
#include "bindings/tensor_checks.h"

namespace fa {
namespace {

// Arguments that all three ops end with, in the order of the schemas.
struct CrossEntropyOptions {
  double label_smoothing, logit_scale, lse_square_scale;
  int64_t ignore_index;
};

PlannedKernel plan_cross_entropy(Family family, const Tensor& logits) {
  check_tensor("logits", logits, logits, 2);
  const std::optional<DType> dtype = dtype_of(logits.scalar_type());
  if (!dtype || logits.numel() == 0) return {};
  Problem problem;
  problem.family = family;
  problem.dtype = *dtype;
  problem.seqlen_q = to_int("rows", logits.size(0));
  problem.head_dim = problem.head_dim_v = to_int("vocabulary", logits.size(1));
  return plan_kernel(problem, logits.get_device_index());
}

// fp32 [rows].
void check_statistic(const char* name, const Tensor& t, const Tensor& logits) {
  check_place(name, t, logits, 1);
  check_dtype(name, t, ScalarType::Float);
  check_size(name, t, 0, logits.size(0));
}
// The same, contiguous.
float* statistic(const char* name, const Tensor& t, const Tensor& logits) {
  check_statistic(name, t, logits);
  check_tensor(name, t, logits, 1);
  return static_cast<float*>(t.data_ptr());
}

CrossEntropyParams params_of(const Tensor& logits, const Tensor& labels,
                             const CrossEntropyOptions& options) {
  check_place("labels", labels, logits, 1);
  check_size("labels", labels, 0, logits.size(0));
  const bool is_int64 = labels.scalar_type() == ScalarType::Long;
  if (!is_int64) check_dtype("labels", labels, ScalarType::Int);
  CrossEntropyParams p{};
  p.logits = logits.data_ptr();
  p.labels = labels.data_ptr();
  p.rows = logits.size(0);
  p.logits_stride = logits.stride(0);
  p.labels_stride = labels.stride(0);
  p.ignore_index = options.ignore_index;
  p.vocabulary = to_int("vocabulary", logits.size(1));
  p.smoothing = static_cast<float>(options.label_smoothing);
  p.logit_scale = static_cast<float>(options.logit_scale);
  p.lse_square_scale = static_cast<float>(options.lse_square_scale);
  p.labels_are_int64 = is_int64;
  p.dtype = *dtype_of(logits.scalar_type());
  return p;
}

using FwdResult = std::tuple<Tensor, Tensor, Tensor>;

FwdResult cross_entropy_fwd(const Tensor& logits, const Tensor& labels,
                            const OptionalTensor& given_lse, double label_smoothing,
                            double logit_scale, double lse_square_scale, int64_t ignore_index) {
  const PlannedKernel kernel = plan_cross_entropy(Family::kCrossEntropyFwd, logits);
  if (kernel.backend == nullptr) {
    return call_tiled<FwdResult>("flash_attn_ext::cross_entropy_fwd", logits, labels, given_lse,
                                 label_smoothing, logit_scale, lse_square_scale, ignore_index);
  }
  CrossEntropyParams p =
      params_of(logits, labels, {label_smoothing, logit_scale, lse_square_scale, ignore_index});
  const Shape rows{logits.size(0)};
  Tensor loss = new_tensor(logits, rows, ScalarType::Float);
  Tensor z_loss = new_tensor(logits, rows, ScalarType::Float);
  Tensor lse = new_tensor(logits, rows, ScalarType::Float);
  p.given_lse = given_lse ? statistic("given_lse", *given_lse, logits) : nullptr;
  p.loss = static_cast<float*>(loss.data_ptr());
  p.z_loss = static_cast<float*>(z_loss.data_ptr());
  p.lse = static_cast<float*>(lse.data_ptr());
  launch(*kernel.backend, kernel.backend->cross_entropy_fwd, p, logits.get_device_index());
  return {loss, z_loss, lse};
}

// Launches into dlogits, which may be logits.
void launch_backward(const PlannedKernel& kernel, const Tensor& dloss, const Tensor& logits,
                     const Tensor& labels, const Tensor& lse, const Tensor& dlogits,
                     const CrossEntropyOptions& options) {
  CrossEntropyParams p = params_of(logits, labels, options);
  check_statistic("dloss", dloss, logits);
  p.lse = statistic("lse", lse, logits);
  p.dloss = static_cast<const float*>(dloss.data_ptr());
  p.dloss_stride = dloss.stride(0);
  p.dlogits = dlogits.data_ptr();
  p.dlogits_stride = dlogits.stride(0);
  launch(*kernel.backend, kernel.backend->cross_entropy_bwd, p, logits.get_device_index());
}

Tensor cross_entropy_bwd(const Tensor& dloss, const Tensor& logits, const Tensor& labels,
                         const Tensor& lse, double label_smoothing, double logit_scale,
                         double lse_square_scale, int64_t ignore_index) {
  const PlannedKernel kernel = plan_cross_entropy(Family::kCrossEntropyBwd, logits);
  if (kernel.backend == nullptr) {
    return call_tiled<Tensor>("flash_attn_ext::cross_entropy_bwd", dloss, logits, labels, lse,
                              label_smoothing, logit_scale, lse_square_scale, ignore_index);
  }
  Tensor dlogits = new_tensor(logits, Shape(logits));
  launch_backward(kernel, dloss, logits, labels, lse, dlogits,
                  {label_smoothing, logit_scale, lse_square_scale, ignore_index});
  return dlogits;
}

void cross_entropy_bwd_in_place(const Tensor& dloss, const Tensor& logits, const Tensor& labels,
                                const Tensor& lse, double label_smoothing, double logit_scale,
                                double lse_square_scale, int64_t ignore_index) {
  const PlannedKernel kernel = plan_cross_entropy(Family::kCrossEntropyBwd, logits);
  if (kernel.backend == nullptr) {
    return call_tiled<void>("flash_attn_ext::cross_entropy_bwd_", dloss, logits, labels, lse,
                            label_smoothing, logit_scale, lse_square_scale, ignore_index);
  }
  launch_backward(kernel, dloss, logits, labels, lse, logits,
                  {label_smoothing, logit_scale, lse_square_scale, ignore_index});
}

}  // namespace
}  // namespace fa

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&fa::cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&fa::cross_entropy_bwd));
  m.impl("cross_entropy_bwd_", TORCH_BOX(&fa::cross_entropy_bwd_in_place));
}
