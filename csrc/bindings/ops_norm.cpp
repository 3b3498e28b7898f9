// Ops of LayerNorm and RMSNorm: norm_fwd and norm_bwd.
#include "bindings/device.h"
#include "bindings/stable_torch.h"
#include "bindings/tensor_checks.h"
#include "core/norm.h"

namespace fa {
namespace {

bool is_fp32(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float;
}
bool aligned(const OptionalTensor& t) {
  return !t || rows_aligned(*t, kNormRowAlignment);
}

// [rows, hidden_size], as `like`.
void check_rows(const char* name, const Tensor& t, const Tensor& like) {
  check_tensor(name, t, like, 2);
  for (int64_t i = 0; i < 2; ++i) check_size(name, t, i, like.size(i));
}
void check_weights(const char* name, const Tensor& t, const Tensor& rows) {
  check_tensor(name, t, rows, 1);
  check_size(name, t, 0, rows.size(1));
}
// fp32 [rows], contiguous.
const float* statistic(const char* name, const Tensor& t, const Tensor& rows) {
  check_tensor(name, t, rows, 1);
  check_dtype(name, t, ScalarType::Float);
  check_size(name, t, 0, rows.size(0));
  return static_cast<const float*>(t.data_ptr());
}
const int64_t* rng_pointer(const OptionalTensor& rng_state, const Tensor& rows, double dropout_p) {
  FA_CHECK(rng_state.has_value() == (dropout_p > 0), "rng_state: got ",
           rng_state ? "a tensor" : "None", ", expected one iff dropout_p > 0");
  if (!rng_state) return nullptr;
  check_tensor("rng_state", *rng_state, rows, 1);
  check_dtype("rng_state", *rng_state, ScalarType::Long);
  check_size("rng_state", *rng_state, 0, 2);
  return static_cast<const int64_t*>(rng_state->data_ptr());
}

// The kernel for these rows, if the types are some that it reads: the sum and the weights have
// fp32 or the type of the rows.
PlannedKernel plan_norm(Family family, const Tensor& rows, bool types_fit, bool is_aligned,
                        bool bias) {
  const std::optional<DType> dtype = dtype_of(rows.scalar_type());
  if (!dtype || !types_fit || rows.numel() == 0) return {};
  Problem problem;
  problem.family = family;
  problem.dtype = *dtype;
  problem.seqlen_q = to_int("rows", rows.size(0));
  problem.head_dim = problem.head_dim_v = to_int("hidden_size", rows.size(1));
  problem.bias = bias;
  problem.alignment_bytes = is_aligned ? kNormRowAlignment : 1;
  return plan_kernel(problem, rows.get_device_index());
}

bool fits(const Tensor& t, const Tensor& rows) {
  return is_fp32(t) || dtype_number(t) == dtype_number(rows);
}

using FwdResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

FwdResult norm_fwd(const Tensor& x, const OptionalTensor& residual, const Tensor& weight,
                   const OptionalTensor& bias, const OptionalTensor& rowscale,
                   const OptionalTensor& rng_state, double eps, double dropout_p, bool is_rms_norm,
                   double weight_offset, bool store_sum, bool sum_in_fp32) {
  check_tensor("x", x, x, 2);
  if (residual) check_rows("residual", *residual, x);
  check_weights("weight", weight, x);
  if (bias) check_weights("bias", *bias, x);
  if (bias) check_dtype("bias", *bias, weight);
  const bool is_aligned = aligned(x) && aligned(residual) && aligned(weight) && aligned(bias);
  const bool types_fit = fits(weight, x) && (!residual || fits(*residual, x));
  const PlannedKernel kernel = plan_norm(Family::kNormFwd, x, types_fit, is_aligned, false);
  if (kernel.backend == nullptr) {
    return call_tiled<FwdResult>("flash_attn_ext::norm_fwd", x, residual, weight, bias, rowscale,
                                 rng_state, eps, dropout_p, is_rms_norm, weight_offset, store_sum,
                                 sum_in_fp32);
  }
  const bool wide_sum = residual ? is_fp32(*residual) : store_sum && sum_in_fp32;
  const ScalarType sum_type = wide_sum ? ScalarType::Float : x.scalar_type();
  Tensor out = new_tensor(x, Shape(x));
  Tensor sum = new_tensor(x, store_sum ? Shape(x) : Shape{0}, sum_type);
  Tensor mean = new_tensor(x, Shape{is_rms_norm ? 0 : x.size(0)}, ScalarType::Float);
  Tensor rstd = new_tensor(x, Shape{x.size(0)}, ScalarType::Float);

  NormFwdParams p{};
  p.x = x.data_ptr();
  p.residual = residual ? residual->data_ptr() : nullptr;
  p.weight = weight.data_ptr();
  p.bias = bias ? bias->data_ptr() : nullptr;
  p.rowscale = rowscale ? statistic("rowscale", *rowscale, x) : nullptr;
  p.rng_state = rng_pointer(rng_state, x, dropout_p);
  p.out = out.data_ptr();
  p.sum = store_sum ? sum.data_ptr() : nullptr;
  p.mean = is_rms_norm ? nullptr : static_cast<float*>(mean.data_ptr());
  p.rstd = static_cast<float*>(rstd.data_ptr());
  p.rows = x.size(0);
  p.x_stride = x.stride(0);
  p.residual_stride = residual ? residual->stride(0) : 0;
  p.hidden_size = to_int("hidden_size", x.size(1));
  p.max_smem_bytes = device_facts(x.get_device_index()).max_smem_bytes;
  p.keep_threshold = norm_keep_threshold(dropout_p);
  p.eps = static_cast<float>(eps);
  p.weight_offset = static_cast<float>(weight_offset);
  p.dtype = *dtype_of(x.scalar_type());
  p.sum_dtype = *dtype_of(sum_type);
  p.weight_is_fp32 = is_fp32(weight);
  p.vectorized = kernel.plan.vectorized;
  launch(*kernel.backend, kernel.backend->norm_fwd, p, x.get_device_index());
  return {out, sum, mean, rstd};
}

using BwdResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

BwdResult norm_bwd(const Tensor& dout, const Tensor& sum, const OptionalTensor& dsum,
                   const Tensor& weight, const OptionalTensor& rowscale,
                   const OptionalTensor& rng_state, const Tensor& mean, const Tensor& rstd,
                   double dropout_p, bool is_rms_norm, double weight_offset, bool has_bias,
                   bool separate_residual) {
  check_tensor("dout", dout, dout, 2);
  check_rows("sum", sum, dout);
  if (dsum) check_rows("dsum", *dsum, dout);
  if (dsum) check_dtype("dsum", *dsum, sum);
  check_weights("weight", weight, dout);
  const bool is_aligned = aligned(dout) && aligned(sum) && aligned(dsum) && aligned(weight);
  const bool types_fit = fits(weight, dout) && fits(sum, dout);
  const PlannedKernel kernel = plan_norm(Family::kNormBwd, dout, types_fit, is_aligned, has_bias);
  if (kernel.backend == nullptr) {
    return call_tiled<BwdResult>("flash_attn_ext::norm_bwd", dout, sum, dsum, weight, rowscale,
                                 rng_state, mean, rstd, dropout_p, is_rms_norm, weight_offset,
                                 has_bias, separate_residual);
  }
  const int hidden_size = to_int("hidden_size", dout.size(1));
  Tensor dx = new_tensor(dout, Shape(dout));
  Tensor dresidual = new_tensor(sum, separate_residual ? Shape(sum) : Shape{0});
  Tensor dweight = new_tensor(weight, Shape{hidden_size});
  Tensor dbias = new_tensor(weight, Shape{has_bias ? hidden_size : 0});
  const int64_t words = kernel.plan.workspace_bytes / static_cast<int64_t>(sizeof(float));
  Tensor partial = new_tensor(dout, Shape{words}, ScalarType::Float);

  NormBwdParams p{};
  p.dout = dout.data_ptr();
  p.sum = sum.data_ptr();
  p.dsum = dsum ? dsum->data_ptr() : nullptr;
  p.weight = weight.data_ptr();
  p.rowscale = rowscale ? statistic("rowscale", *rowscale, dout) : nullptr;
  p.rng_state = rng_pointer(rng_state, dout, dropout_p);
  p.mean = is_rms_norm ? nullptr : statistic("mean", mean, dout);
  p.rstd = statistic("rstd", rstd, dout);
  p.dx = dx.data_ptr();
  p.dresidual = separate_residual ? dresidual.data_ptr() : nullptr;
  p.dweight = dweight.data_ptr();
  p.dbias = has_bias ? dbias.data_ptr() : nullptr;
  p.partial = static_cast<float*>(partial.data_ptr());
  p.rows = dout.size(0);
  p.dout_stride = dout.stride(0);
  p.sum_stride = sum.stride(0);
  p.dsum_stride = dsum ? dsum->stride(0) : 0;
  p.hidden_size = hidden_size;
  p.num_ctas = static_cast<int>(kernel.plan.num_ctas);
  p.max_smem_bytes = device_facts(dout.get_device_index()).max_smem_bytes;
  p.keep_threshold = norm_keep_threshold(dropout_p);
  p.weight_offset = static_cast<float>(weight_offset);
  p.dtype = *dtype_of(dout.scalar_type());
  p.sum_dtype = *dtype_of(sum.scalar_type());
  p.weight_is_fp32 = is_fp32(weight);
  p.vectorized = kernel.plan.vectorized;
  launch(*kernel.backend, kernel.backend->norm_bwd, p, dout.get_device_index());
  return {dx, dresidual, dweight, dbias};
}

}  // namespace
}  // namespace fa

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  m.impl("norm_fwd", TORCH_BOX(&fa::norm_fwd));
  m.impl("norm_bwd", TORCH_BOX(&fa::norm_bwd));
}
