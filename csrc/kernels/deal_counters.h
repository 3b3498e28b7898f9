// Which counter of kernels/tile_counter.h a launch has. Included once a library, by its backend's
// instance file: the headers of locks and maps take longer to compile than some kernels.
#pragma once
#include <cuda_runtime.h>

#include <mutex>
#include <unordered_map>

#include "kernels/tile_counter.h"

namespace fa {

cudaError_t tile_counter(cudaStream_t stream, int& index) {
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
