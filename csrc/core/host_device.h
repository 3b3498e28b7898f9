// Lets one definition compile for the GPU (nvcc) and for the CPU (g++), and the integer helpers
// that every layer uses.
//
// Nothing in core/ includes a CUDA or Torch header: plain g++ compiles it, which is how it is
// tested. FA_HD marks everything, also functions used only in constant expressions, because nvcc
// refuses a host constexpr function inside a kernel.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FA_HD __host__ __device__ __forceinline__
#define FA_DEVICE __device__ __forceinline__
#define FA_UNROLL _Pragma("unroll")
#else
#define FA_HD inline
#define FA_UNROLL
#endif

namespace fa {

constexpr int kWarpSize = 32;        // lanes
constexpr int kWarpgroupSize = 128;  // threads that issue one wgmma

template <class T>
FA_HD constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
FA_HD constexpr T max(T a, T b) {
  return a < b ? b : a;
}
// x moved into [low, high]; low <= high.
template <class T>
FA_HD constexpr T clamp(T x, T low, T high) {
  return max(low, min(x, high));
}

// Smallest integer >= a / b. a >= 0, b > 0, a + b - 1 fits T.
template <class T>
FA_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
// Smallest multiple of b that is >= a. Same preconditions.
template <class T>
FA_HD constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}
// Largest multiple of b that is <= a. a >= 0, b > 0.
template <class T>
FA_HD constexpr T round_down(T a, T b) {
  return a / b * b;
}
// Smallest power of two >= a. 1 <= a <= 2^30.
FA_HD constexpr int next_power_of_two(int a) {
  int p = 1;
  while (p < a) p *= 2;
  return p;
}

// Half-open range [begin, end) of positions or blocks; begin <= end always.
struct Range {
  int begin, end;
  FA_HD constexpr int size() const { return end - begin; }
  FA_HD constexpr bool contains(int i) const { return begin <= i && i < end; }
};

static_assert(ceil_div(0, 8) == 0 && ceil_div(8, 8) == 1 && ceil_div(9, 8) == 2);
static_assert(round_up(9, 8) == 16 && round_down(15, 8) == 8);
static_assert(next_power_of_two(1) == 1 && next_power_of_two(5) == 8);

}  // namespace fa
