// LayerNorm and RMSNorm backward.
//
//   n = (sum - mean) * rstd        g = dout * weight
//   dresidual = (g - n * average(g n) - average(g)) * rstd + dsum        RMSNorm: no average(g)
//   dx = dropout(dresidual) * rowscale
//   dweight = sum over rows of dout n        dbias = sum over rows of dout
//
// The CTAs that the GPU runs at once share the rows out evenly. Each thread adds up its columns'
// parts of dweight and dbias over all rows of the CTA; another kernel adds up the parts of the
// CTAs. Every sum has a fixed order.
//
// norm_bwd_ring_kernel: the parts are in registers, and the next row comes into shared memory while
// this one is computed. Memory: smem [of dout, of sum, of dsum][stages][vectors][threads] of 16
// bytes, then the parts. norm_bwd_kernel, for rows that are not aligned or do not fit: the parts
// are in smem [of weight, of bias][2 * vectors][threads] of float4. Rows of up to
// kMaxNormBwdRegisterSize stay in registers; wider ones are read a second time, from L2.
#pragma once
#include <cuda_runtime.h>

#include "core/params.h"
#include "kernels/common/norm_row.h"

namespace fa {

constexpr int kSmemBytesUnasked = 47 * 1024;  // of dynamic shared memory, beside `scratch`

// A thread's part of the gradient of weight or bias, in shared memory.
struct NormParts {
  float4* slots;  // [2 * vectors][threads], from this thread's on
  int vectors, threads;

  FA_DEVICE void clear() const {
    for (int i = 0; i < 2 * vectors; ++i) slots[i * threads] = float4{};
  }
  FA_DEVICE void set(int v, const float (&x)[kNormVec]) const {
    FA_UNROLL
    for (int half = 0; half < 2; ++half)
      slots[(2 * v + half) * threads] = {x[4 * half], x[4 * half + 1], x[4 * half + 2],
                                         x[4 * half + 3]};
  }
  FA_DEVICE void add(int v, const float (&x)[kNormVec]) const {
    FA_UNROLL
    for (int half = 0; half < 2; ++half) {
      float4& slot = slots[(2 * v + half) * threads];
      const float4 old = slot;
      slot = {old.x + x[4 * half], old.y + x[4 * half + 1], old.z + x[4 * half + 2],
              old.w + x[4 * half + 3]};
    }
  }
  // Group 0 adds up the groups of the CTA and writes the row of partial gradients.
  template <class Columns>
  FA_DEVICE void store(Columns columns, int group, float* partial) const {
    if (group > 0) return;
    for (int v = 0; v < vectors; ++v) {
      if (columns.count(v) <= 0) continue;
      FA_UNROLL
      for (int half = 0; half < 2; ++half) {
        float4 total{};
        for (int other = 0; other < threads; other += columns.lanes) {
          const float4 part = slots[(2 * v + half) * threads + other];
          total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
        }
        *reinterpret_cast<float4*>(partial + columns.column(v) + 4 * half) = total;
      }
    }
  }
};

// kWide: a thread has several vectors of a row; else one, which it keeps.
template <class T, class Sum, bool kAligned, bool kWide>
__global__ void __launch_bounds__(kMaxNormBwdThreads)
    norm_bwd_kernel(const __grid_constant__ NormBwdParams p, int lanes) {
  using Columns = NormColumns<kNormVec, kAligned>;
  extern __shared__ float4 smem[];
  __shared__ float scratch[2][2 * kWarpSize];
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int group = thread / lanes, groups = threads / lanes;
  const Columns columns{thread % lanes, lanes, p.hidden_size};
  const int vectors = kWide ? norm_bwd_vectors(p.hidden_size) : 1;
  const float inverse_size = 1.f / static_cast<float>(p.hidden_size);
  const int64_t step = int64_t{gridDim.x} * groups;

  const NormParts dweight{smem + thread, vectors, threads};
  const NormParts dbias{dweight.slots + 2 * vectors * threads, vectors, threads};
  dweight.clear();
  if (p.dbias != nullptr) dbias.clear();

  int buffer = 0;
  // All groups take as many steps, because they meet at the barriers.
  for (int64_t begin = int64_t{blockIdx.x} * groups; begin < p.rows; begin += step) {
    const int64_t row = begin + group, read_row = min(row, p.rows - 1);
    const T* dout = static_cast<const T*>(p.dout) + read_row * p.dout_stride;
    const Sum* sum = static_cast<const Sum*>(p.sum) + read_row * p.sum_stride;
    const Sum* dsum = static_cast<const Sum*>(p.dsum) + read_row * p.dsum_stride;
    const float mean = p.mean == nullptr ? 0.f : p.mean[read_row], rstd = p.rstd[read_row];

    float n[kNormVec], g[kNormVec];
    Vec<Sum, kNormVec> ds_in;
    // n and dout (in g) of vector v; 0 outside the row and past the last one.
    const auto read = [&](int v, bool with_dsum) {
      const Vec<T, kNormVec> g_in = columns.load(dout, v);
      const Vec<Sum, kNormVec> n_in = columns.load(sum, v);
      if (with_dsum && p.dsum != nullptr) ds_in = columns.load(dsum, v);
      to_float(n_in, n);
      to_float(g_in, g);
      FA_UNROLL
      for (int i = 0; i < kNormVec; ++i) {
        n[i] = (n[i] - mean) * rstd;
        if (!columns.is_inside(v, i) || row >= p.rows) g[i] = 0.f;
      }
    };
    const auto weigh = [&](int v) {
      float weight[kNormVec];
      columns.template load_weights<T>(p.weight, p.weight_is_fp32, v, weight);
      FA_UNROLL
      for (int i = 0; i < kNormVec; ++i) g[i] *= weight[i] + p.weight_offset;
    };

    float sums[2] = {};  // of g n, of g
    for (int v = 0; v < vectors; ++v) {
      read(v, !kWide);
      float dw[kNormVec];
      FA_UNROLL
      for (int i = 0; i < kNormVec; ++i) dw[i] = g[i] * n[i];
      dweight.add(v, dw);
      if (p.dbias != nullptr) dbias.add(v, g);
      weigh(v);
      FA_UNROLL
      for (int i = 0; i < kNormVec; ++i) {
        sums[0] += g[i] * n[i];
        sums[1] += g[i];
      }
    }
    sum_over_row(sums, lanes, group, scratch[buffer]);
    buffer ^= 1;
    if (row >= p.rows) continue;

    const float along = sums[0] * inverse_size;
    const float average = p.mean == nullptr ? 0.f : sums[1] * inverse_size;
    const float scale = p.rowscale == nullptr ? 1.f : p.rowscale[row];
    const int64_t at = row * p.hidden_size;
    for (int v = 0; v < vectors; ++v) {
      if (kWide) {
        read(v, true);
        weigh(v);
      }
      float ds[kNormVec] = {};
      if (p.dsum != nullptr) to_float(ds_in, ds);
      FA_UNROLL
      for (int i = 0; i < kNormVec; ++i) ds[i] += (g[i] - n[i] * along - average) * rstd;
      if (p.dresidual != nullptr) columns.store(static_cast<Sum*>(p.dresidual) + at, v, ds);
      if (p.keep_threshold < kNormKeepAll)
        NormDropout(p.rng_state, p.keep_threshold).apply(row, columns.column(v), ds);
      FA_UNROLL
      for (float& d : ds) d *= scale;
      columns.store(static_cast<T*>(p.dx) + at, v, ds);
    }
  }

  if (groups > 1) __syncthreads();  // the parts of all groups are complete
  const int64_t partial_size = int64_t{gridDim.x} * norm_partial_stride(p.hidden_size);
  float* partial = p.partial + int64_t{blockIdx.x} * norm_partial_stride(p.hidden_size);
  dweight.store(columns, group, partial);
  if (p.dbias != nullptr) dbias.store(columns, group, partial + partial_size);
}

// Rows are aligned and have at most kMaxNormBwdRegisterSize elements, of 16 bits, in all tensors.
template <class T>
__global__ void __launch_bounds__(kMaxNormRingThreads)
    norm_bwd_ring_kernel(const __grid_constant__ NormBwdParams p, int lanes) {
  using Columns = NormColumns<kNormBwdRingColumns, true>;
  constexpr int kVectors = Columns::kVectors;
  extern __shared__ float4 smem[];
  __shared__ float scratch[2][2 * kWarpSize];
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int group = thread / lanes, groups = threads / lanes;
  const Columns columns{thread % lanes, lanes, p.hidden_size};
  const int64_t step = int64_t{gridDim.x} * groups;

  const RingRows<T, Columns> douts{static_cast<const T*>(p.dout), p.dout_stride,
                                   reinterpret_cast<uint4*>(smem) + thread, threads};
  const RingRows<T, Columns> sums{static_cast<const T*>(p.sum), p.sum_stride, douts.end(), threads};
  const RingRows<T, Columns> dsums{static_cast<const T*>(p.dsum), p.dsum_stride, sums.end(),
                                   threads};
  float next_mean = 0.f, next_rstd = 0.f;
  const auto fetch = [&](int64_t row, int stage) {
    if (row < p.rows) {
      douts.fetch(row, columns, stage);
      sums.fetch(row, columns, stage);
      if (p.dsum != nullptr) dsums.fetch(row, columns, stage);
      if (p.mean != nullptr) next_mean = p.mean[row];
      next_rstd = p.rstd[row];
    }
    ptx::cp_async_commit_group();
  };
  int64_t begin = int64_t{blockIdx.x} * groups;
  fetch(begin + group, 0);

  // A weight past the end of the row is 0, and with it what the row's sums get from there.
  float weight[kVectors][kNormVec], dweight[kVectors][kNormVec] = {},
                                    dbias[kVectors][kNormVec] = {};
  FA_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    columns.template load_weights<T>(p.weight, p.weight_is_fp32, v, weight[v]);
    FA_UNROLL
    for (float& w : weight[v]) w = columns.count(v) > 0 ? w + p.weight_offset : 0.f;
  }

  const float inverse_size = 1.f / static_cast<float>(p.hidden_size);
  int stage = 0;
  // All groups take as many steps, because they meet at the barriers.
  for (; begin < p.rows; begin += step, stage ^= 1) {
    const int64_t row = begin + group;
    const float rstd = next_rstd, shift = -next_mean * rstd;
    ptx::cp_async_wait_group<0>();
    fetch(row + step, stage ^ 1);  // where the row before was, which is used up by now
    float n[kVectors][kNormVec], g[kVectors][kNormVec], totals[2] = {};  // of g n, of g
    if (row < p.rows) {
      FA_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        douts.read(stage, v, g[v]);
        sums.read(stage, v, n[v]);
        FA_UNROLL
        for (int i = 0; i < kNormVec; ++i) {
          n[v][i] = n[v][i] * rstd + shift;
          dweight[v][i] += g[v][i] * n[v][i];
          dbias[v][i] += g[v][i];
          g[v][i] *= weight[v][i];
          totals[0] += g[v][i] * n[v][i];
          totals[1] += g[v][i];
        }
      }
    }
    sum_over_row(totals, lanes, group, scratch[stage]);
    if (row >= p.rows) continue;

    const float along = -totals[0] * inverse_size * rstd;
    const float average = p.mean == nullptr ? 0.f : -totals[1] * inverse_size * rstd;
    const float scale = p.rowscale == nullptr ? 1.f : p.rowscale[row];
    const int64_t at = row * p.hidden_size;
    FA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float ds[kNormVec] = {};
      if (p.dsum != nullptr) dsums.read(stage, v, ds);
      FA_UNROLL
      for (int i = 0; i < kNormVec; ++i) ds[i] += g[v][i] * rstd + (n[v][i] * along + average);
      if (p.dresidual != nullptr) columns.store(static_cast<T*>(p.dresidual) + at, v, ds);
      if (p.keep_threshold < kNormKeepAll)
        NormDropout(p.rng_state, p.keep_threshold).apply(row, columns.column(v), ds);
      FA_UNROLL
      for (float& d : ds) d *= scale;
      columns.store(static_cast<T*>(p.dx) + at, v, ds);
    }
  }

  // A thread's slots of the parts are its own of the rows, which are used up.
  const NormParts weight_parts{smem + thread, kVectors, threads};
  const NormParts bias_parts{weight_parts.slots + 2 * kVectors * threads, kVectors, threads};
  FA_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    weight_parts.set(v, dweight[v]);
    bias_parts.set(v, dbias[v]);
  }
  if (groups > 1) __syncthreads();  // the parts of all groups are complete
  const int64_t partial_size = int64_t{gridDim.x} * norm_partial_stride(p.hidden_size);
  float* partial = p.partial + int64_t{blockIdx.x} * norm_partial_stride(p.hidden_size);
  weight_parts.store(columns, group, partial);
  if (p.dbias != nullptr) bias_parts.store(columns, group, partial + partial_size);
}

// Adds up the parts of the CTAs: blockIdx.y 0 those of dweight, 1 those of dbias.
template <class Weight>
__global__ void __launch_bounds__(kNormReduceColumns* kNormReduceRows)
    norm_reduce_kernel(const __grid_constant__ NormBwdParams p) {
  __shared__ float totals[kNormReduceRows][kNormReduceColumns + 1];
  const int column = static_cast<int>(blockIdx.x) * kNormReduceColumns + threadIdx.x;
  float total = 0.f;
  if (column < p.hidden_size) {
    const int64_t stride = norm_partial_stride(p.hidden_size);
    const float* partial = p.partial + int64_t{blockIdx.y} * p.num_ctas * stride + column;
    for (int cta = threadIdx.y; cta < p.num_ctas; cta += kNormReduceRows)
      total += partial[cta * stride];
  }
  totals[threadIdx.y][threadIdx.x] = total;
  __syncthreads();  // one warp adds up a column
  total = totals[threadIdx.x][threadIdx.y];
  FA_UNROLL
  for (int step = kWarpSize / 2; step > 0; step /= 2)
    total += __shfl_xor_sync(0xffffffffu, total, step);
  const int summed = static_cast<int>(blockIdx.x) * kNormReduceColumns + threadIdx.y;
  if (threadIdx.x != 0 || summed >= p.hidden_size) return;
  const float x[1] = {total};
  Vec<Weight, 1> rounded;
  from_float(x, rounded);
  static_cast<Weight*>(blockIdx.y == 0 ? p.dweight : p.dbias)[summed] = rounded.x[0];
}

template <class T, class Sum, bool kAligned, bool kWide>
int launch_norm_bwd_kernel(const NormBwdParams& p, cudaStream_t stream) {
  const NormShare share = norm_bwd_share(p.hidden_size);
  const int smem_bytes = norm_bwd_smem_bytes(p.hidden_size, p.dbias != nullptr);
  const auto kernel = norm_bwd_kernel<T, Sum, kAligned, kWide>;
  if (smem_bytes > kSmemBytesUnasked) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(p.num_ctas), share.num_threads(), smem_bytes, stream>>>(
      p, share.lanes);
  return cudaGetLastError();
}

template <class T, class Sum>
bool has_norm_bwd_ring(const NormBwdParams& p) {
  if constexpr (kHasNormRing<T, Sum>)
    return p.vectorized && p.hidden_size <= kMaxNormBwdRegisterSize &&
           norm_bwd_ring_smem_bytes(p.hidden_size, p.dsum != nullptr) + kNormScratchBytes <=
               p.max_smem_bytes;
  return false;
}
template <class T>
int launch_norm_bwd_ring(const NormBwdParams& p, cudaStream_t stream) {
  constexpr auto kKernel = norm_bwd_ring_kernel<T>;
  const NormShare share = norm_bwd_ring_share(p.hidden_size);
  const cudaError_t error = allow_norm_ring<kKernel>();
  if (error != cudaSuccess) return error;
  kKernel<<<p.num_ctas, share.num_threads(),
            norm_bwd_ring_smem_bytes(p.hidden_size, p.dsum != nullptr), stream>>>(p, share.lanes);
  return cudaGetLastError();
}

// Wide rows are aligned: the plan takes no others.
template <class T, class Sum>
int launch_norm_bwd_rows(NormBwdParams p, cudaStream_t stream) {
  const bool ring = has_norm_bwd_ring<T, Sum>(p);
  int ctas = 0;
  int error =
      resident_norm_ctas(ring ? norm_bwd_ring_share(p.hidden_size) : norm_bwd_share(p.hidden_size),
                         p.rows, ring ? kMaxNormRingThreads : kMaxNormBwdThreads, ctas);
  if (error != cudaSuccess) return error;
  p.num_ctas = min(p.num_ctas, ctas);
  if constexpr (kHasNormRing<T, Sum>) {
    if (ring) error = launch_norm_bwd_ring<T>(p, stream);
  }
  if (!ring)
    error = p.hidden_size > kMaxNormBwdRegisterSize
                ? launch_norm_bwd_kernel<T, Sum, true, true>(p, stream)
            : p.vectorized ? launch_norm_bwd_kernel<T, Sum, true, false>(p, stream)
                           : launch_norm_bwd_kernel<T, Sum, false, false>(p, stream);
  if (error != cudaSuccess) return error;
  const dim3 grid(ceil_div(p.hidden_size, kNormReduceColumns), p.dbias == nullptr ? 1 : 2);
  const auto reduce = p.weight_is_fp32 ? norm_reduce_kernel<float> : norm_reduce_kernel<T>;
  reduce<<<grid, dim3(kNormReduceColumns, kNormReduceRows), 0, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
int launch_norm_bwd(const NormBwdParams& p, cudaStream_t stream) {
  return p.sum_dtype == p.dtype ? launch_norm_bwd_rows<T, T>(p, stream)
                                : launch_norm_bwd_rows<T, float>(p, stream);
}

}  // namespace fa
