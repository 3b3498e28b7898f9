// Counters from which the CTAs of a persistent kernel draw their tiles: zero before and after every
// launch, so that no launch has to clear one.
#pragma once
#include <cuda_runtime.h>

#include <mutex>
#include <unordered_map>

namespace fa {

constexpr int kNumTileCounters = 1 << 15;
constexpr int kNoTileCounter = -1;

// Of the kernels in one instance file, on each device.
static __device__ int tile_counters[kNumTileCounters];

// The index of a counter that no launch uses at the same time: each stream has one, as its launches
// run one after the other, and each captured launch has its own, as it may run on any stream.
// kNoTileCounter if all are taken.
inline cudaError_t tile_counter(cudaStream_t stream, int& index) {
  static std::mutex mutex;
  static std::unordered_map<unsigned long long, int> of_stream;
  static int num_taken = 0;
  const auto take = [] { return num_taken < kNumTileCounters ? num_taken++ : kNoTileCounter; };

  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;  // of a stream handle, which may be used again for another stream
  cudaError_t error = cudaStreamIsCapturing(stream, &capture);
  if (error == cudaSuccess && capture == cudaStreamCaptureStatusNone)
    error = cudaStreamGetId(stream, &id);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (capture != cudaStreamCaptureStatusNone) {
    index = take();
  } else if (const auto found = of_stream.find(id); found != of_stream.end()) {
    index = found->second;
  } else {
    index = of_stream[id] = take();
  }
  return cudaSuccess;
}

}  // namespace fa
