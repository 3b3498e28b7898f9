// Counters from which the CTAs of a persistent kernel draw their tiles: zero before and after every
// launch, so that no launch has to clear one.
#pragma once
#include <cuda_runtime.h>

namespace fa {

constexpr int kNumTileCounters = 1 << 15;
constexpr int kNoTileCounter = -1;

// Of the kernels in one instance file, on each device.
static __device__ int tile_counters[kNumTileCounters];

// The index of a counter that no launch uses at the same time: each stream has one, as its launches
// run one after the other, and each captured launch has its own, as it may run on any stream.
// kNoTileCounter if all are taken. Defined in kernels/deal_counters.h.
cudaError_t tile_counter(cudaStream_t stream, int& index);

}  // namespace fa
