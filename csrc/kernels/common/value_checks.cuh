// Checks the values of index tensors on the device, for FLASH_ATTN_EXT_DEBUG=1.
//
// One CTA in all, so that the smallest violation is known without memory that has to be zeroed
// before; a warp takes a sequence, its lanes the pages of it. The first violation goes to p.record,
// for the host to read; without a record (in a CUDA graph there is no host to read it) it is
// printed, and the kernel traps, so that no kernel behind it in the stream runs.
#pragma once
#include <cuda_runtime.h>

#include <cstdio>

#include "core/value_checks.h"

namespace fa {

FA_DEVICE void write_record(int64_t* record, const Violation& v) {
  const int64_t words[kRecordWords] = {v.check, v.sequence, v.row, v.column, v.got, v.low, v.high};
  FA_UNROLL
  for (int i = 0; i < kRecordWords; ++i) record[i] = words[i];
}

// The words of the Python package's message.
__device__ __noinline__ void print_violation(const ValueCheck check, const Violation& v) {
  const auto got = static_cast<long long>(v.got), low = static_cast<long long>(v.low);
  const auto high = static_cast<long long>(v.high);
  if (v.column < 0) {
    printf("flash_attn_ext: %s[%d]: got %lld, expected %lld to %lld, %s; sequence %d\n", check.name,
           v.row, got, low, high, check.text, v.sequence);
  } else {
    printf("flash_attn_ext: %s[%d, %d]: got %lld, expected %lld to %lld, %s; sequence %d\n",
           check.name, v.row, v.column, got, low, high, check.text, v.sequence);
  }
}

__global__ void __launch_bounds__(kValueCheckThreads)
    value_checks_kernel(const __grid_constant__ ValueCheckParams p) {
  constexpr int kWarps = kValueCheckThreads / kWarpSize;
  __shared__ unsigned long long smallest;
  __shared__ int num_tellers;
  if (threadIdx.x == 0) {
    smallest = violation_order(kNoViolation);
    num_tellers = 0;
  }
  __syncthreads();  // thread 0's values, before any thread lowers or counts

  // Sequences ascend, so the first violation of a thread is its smallest.
  Violation found = kNoViolation;
  for (int sequence = threadIdx.x / kWarpSize; sequence < p.batch_size && found.check < 0;
       sequence += kWarps)
    found = first_violation(p, sequence, threadIdx.x % kWarpSize, kWarpSize);
  const uint64_t order = violation_order(found);
  if (found.check >= 0) atomicMin(&smallest, order);
  __syncthreads();  // every thread's minimum, before anyone compares

  // All lanes of a warp find what is not a page; one of them tells.
  if (order != smallest || atomicAdd(&num_tellers, 1) > 0) return;
  if (p.record != nullptr) {
    write_record(p.record, found);
  } else if (found.check >= 0) {
    print_violation(p.checks[found.check], found);
    __trap();
  }
}

inline int launch_value_checks(const ValueCheckParams& p, cudaStream_t stream) {
  value_checks_kernel<<<1, kValueCheckThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace fa
