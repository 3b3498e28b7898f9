// What the forward and the backward of LayerNorm and RMSNorm do with a row: load and store it, drop
// elements of it, sum it up.
#pragma once
#include "core/norm.h"
#include "kernels/launch.h"
#include "ptx/cp_async.h"
#include "tile/vec.h"

namespace fa {

// The columns of a thread: kColumns of them in vectors of kNormVec, `lanes` vectors apart, so that
// neighbouring threads touch neighbouring bytes. kAligned: every row of every tensor starts at a
// multiple of 16 bytes and hidden_size is one of kNormVec; else elements move one by one.
template <int kColumns, bool kAligned>
struct NormColumns {
  static constexpr int kVectors = kColumns / kNormVec;
  int lane, lanes, size;

  FA_DEVICE int column(int v) const { return (v * lanes + lane) * kNormVec; }
  // Elements of vector v inside the row; 0 or less: none.
  FA_DEVICE int count(int v) const { return size - column(v); }
  FA_DEVICE bool is_inside(int v, int i) const { return (kAligned ? 0 : i) < count(v); }

  // Vector v of the row at p. Past the end of the row it has other elements of the row or zeros, so
  // that no load waits for a branch.
  template <class T>
  FA_DEVICE Vec<T, kNormVec> load(const T* p, int v) const {
    if constexpr (kAligned) {
      return load_vec<kNormVec>(p + min(column(v), size - kNormVec));
    } else {
      Vec<T, kNormVec> x;
      FA_UNROLL
      for (int i = 0; i < kNormVec; ++i)
        x.x[i] = i < count(v) ? p[column(v) + i] : static_cast<T>(0.f);
      return x;
    }
  }
  template <class T>
  FA_DEVICE void store(T* p, int v, const float (&x)[kNormVec]) const {
    Vec<T, kNormVec> rounded;
    from_float(x, rounded);
    if constexpr (kAligned) {
      if (count(v) > 0) store_vec(p + column(v), rounded);
    } else {
      FA_UNROLL
      for (int i = 0; i < kNormVec; ++i)
        if (i < count(v)) p[column(v) + i] = rounded.x[i];
    }
  }
  // Vector v of weight or bias, in T or fp32; read by many CTAs.
  template <class T>
  FA_DEVICE void load_weights(const void* weights, bool is_fp32, int v,
                              float (&x)[kNormVec]) const {
    if (is_fp32) {
      load_weights_of(static_cast<const float*>(weights), v, x);
    } else {
      load_weights_of(static_cast<const T*>(weights), v, x);
    }
  }

 private:
  template <class W>
  FA_DEVICE void load_weights_of(const W* p, int v, float (&x)[kNormVec]) const {
    if constexpr (kAligned) {
      to_float(load_vec_l1<kNormVec>(p + min(column(v), size - kNormVec)), x);
    } else {
      to_float(load(p, v), x);
    }
  }
};

// A row's elements as they are in memory, those of one thread.
template <class T, class Columns>
struct NormVectors {
  Vec<T, kNormVec> v[Columns::kVectors];

  FA_DEVICE void load(const void* rows, int64_t stride, int64_t row, Columns columns) {
    const T* p = static_cast<const T*>(rows) + row * stride;
    FA_UNROLL
    for (int i = 0; i < Columns::kVectors; ++i) v[i] = columns.load(p, i);
  }
};

// The ring of rows of one tensor in shared memory. A thread copies its own columns there and reads
// them itself, so that there is no barrier.
template <class T, class Columns>
struct RingRows {
  static constexpr int kChunks = kNormVec / kVecSize<T>;  // of 16 bytes in a vector
  static constexpr int kSlots = kNormRingStages * Columns::kVectors * kChunks;

  const T* rows;
  int64_t stride;
  uint4* slots;  // [kSlots][threads], from this thread's on
  int threads;

  // The slots of the next tensor.
  FA_DEVICE uint4* end() const { return slots + kSlots * threads; }
  // Past the end of the row: other elements of it.
  FA_DEVICE void fetch(int64_t row, Columns columns, int stage) const {
    FA_UNROLL
    for (int v = 0; v < Columns::kVectors; ++v) {
      const T* p = rows + row * stride + min(columns.column(v), columns.size - kNormVec);
      FA_UNROLL
      for (int c = 0; c < kChunks; ++c)
        ptx::cp_async_cg_16(ptx::cvta_to_shared(slot(stage, v, c)), p + c * kVecSize<T>, 16);
    }
  }
  FA_DEVICE void read(int stage, int v, float (&x)[kNormVec]) const {
    Vec<T, kNormVec> raw;
    FA_UNROLL
    for (int c = 0; c < kChunks; ++c)
      *reinterpret_cast<uint4*>(&raw.x[c * kVecSize<T>]) = *slot(stage, v, c);
    to_float(raw, x);
  }

 private:
  FA_DEVICE uint4* slot(int stage, int v, int c) const {
    return slots + ((stage * Columns::kVectors + v) * kChunks + c) * threads;
  }
};

// Of the kernels with a ring, beside it: what the warps of a row exchange in two rows.
constexpr int kNormScratchBytes = 2 * 2 * kWarpSize * static_cast<int>(sizeof(float));

// fp32 goes without: a thread would copy 16 bytes of each 32, half a sector at a time.
template <class T, class Sum>
constexpr bool kHasNormRing = sizeof(T) == 2 && sizeof(Sum) == 2;

// Lets kKernel have a ring of any size that the current device has room for.
template <auto kKernel>
cudaError_t allow_norm_ring() {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error == cudaSuccess ? allow_dynamic_smem<kKernel>(most - kNormScratchBytes) : error;
}
// CTAs of a kernel whose threads, threads_per_sm of them, stay for all rows.
inline cudaError_t resident_norm_ctas(NormShare share, int64_t rows, int threads_per_sm,
                                      int& ctas) {
  int num_sms = 0;
  const cudaError_t error = num_multiprocessors(num_sms);
  if (error == cudaSuccess)
    ctas = static_cast<int>(norm_ctas(share, rows, num_sms, threads_per_sm));
  return error;
}

// What dropout does to a row.
struct NormDropout {
  uint64_t seed, offset;
  int keep_threshold;
  float scale;

  FA_DEVICE NormDropout(const int64_t* rng_state, int keep_threshold)
      : keep_threshold(keep_threshold) {
    seed = static_cast<uint64_t>(rng_state[0]);
    offset = static_cast<uint64_t>(rng_state[1]);
    scale = static_cast<float>(kNormKeepAll) / static_cast<float>(keep_threshold);
  }

  // Multiplies the elements from `column` on, a multiple of kNormVec, by scale or 0.
  FA_DEVICE void apply(int64_t row, int column, float (&x)[kNormVec]) const {
    static_assert(kNormDropoutColumns == kNormVec);
    const Philox4 words = norm_dropout_words(seed, offset, row, column / kNormDropoutColumns);
    FA_UNROLL
    for (int i = 0; i < kNormVec; ++i)
      x[i] *= norm_dropout_bits(words, i) < keep_threshold ? scale : 0.f;
  }
};

// Sums over groups of kLanes lanes, each in all of them.
template <int kLanes, int kN>
FA_DEVICE void add_lanes(float (&x)[kN]) {
  FA_UNROLL
  for (int step = kLanes / 2; step > 0; step /= 2) {
    FA_UNROLL
    for (int i = 0; i < kN; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], step);
  }
}
// The same over the lanes of a row inside a warp.
template <int kN>
FA_DEVICE void add_row_lanes(float (&x)[kN], int lanes) {
  if (lanes >= kWarpSize) return add_lanes<kWarpSize>(x);
  for (int step = lanes / 2; step > 0; step /= 2) {
    FA_UNROLL
    for (int i = 0; i < kN; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], step);
  }
}

// What the warps of a row exchange.
struct RowWarps {
  int count, width;  // width: a power of two, whose lanes add up `count` of them
  int first;         // of this row among the warps of the CTA

  FA_DEVICE RowWarps(int lanes, int group)
      : count(lanes / kWarpSize), width(count <= 8 ? 8 : kWarpSize), first(group * count) {}
  // The warp of the row that this lane looks at; count or more: none.
  FA_DEVICE int other() const { return static_cast<int>(threadIdx.x) % width; }
  template <int kN>
  FA_DEVICE void add(float (&x)[kN]) const {
    if (width == 8) {
      add_lanes<8>(x);
    } else {
      add_lanes<kWarpSize>(x);
    }
  }
};

// Sums over the lanes of a row, each in all of its threads. All threads of the CTA take part.
// scratch: [kN][kWarpSize], not the one of the call before: its last readers may still be there.
template <int kN>
FA_DEVICE void sum_over_row(float (&x)[kN], int lanes, int group, float* scratch) {
  add_row_lanes(x, lanes);
  if (lanes <= kWarpSize) return;
  const RowWarps warps(lanes, group);
  FA_UNROLL
  for (int i = 0; i < kN; ++i)
    if (threadIdx.x % kWarpSize == 0) scratch[i * kWarpSize + threadIdx.x / kWarpSize] = x[i];
  __syncthreads();  // the warps of a row see each other's sums
  FA_UNROLL
  for (int i = 0; i < kN; ++i)
    x[i] = warps.other() < warps.count ? scratch[i * kWarpSize + warps.first + warps.other()] : 0.f;
  warps.add(x);
}

}  // namespace fa
