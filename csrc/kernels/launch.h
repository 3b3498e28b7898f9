// Launch helpers: shared memory beyond what a CTA has without asking, and the size of the GPU.
#pragma once
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace fa {

// Lets kKernel use smem_bytes of dynamic shared memory on the current device; asks CUDA once a
// device (up to 64 of them).
template <auto kKernel>
cudaError_t allow_dynamic_smem(int smem_bytes) {
  static std::atomic<uint64_t> allowed{0};  // bit: device
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (error != cudaSuccess || allowed.load(std::memory_order_relaxed) & bit) return error;
  error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// A launch that may begin while the one before it ends (ptx/grid_dependency.h).
struct LaunchConfig {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute overlaps{};

  LaunchConfig(unsigned num_ctas, unsigned num_threads, size_t smem_bytes, cudaStream_t stream) {
    config.gridDim = dim3(num_ctas);
    config.blockDim = dim3(num_threads);
    config.dynamicSmemBytes = smem_bytes;
    config.stream = stream;
  }
  void overlap() {
    overlaps.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlaps.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlaps;
    config.numAttrs = 1;
  }
  const cudaLaunchConfig_t* get() const { return &config; }
};

// Multiprocessors of the current device.
inline cudaError_t num_multiprocessors(int& number) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess
             ? error
             : cudaDeviceGetAttribute(&number, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace fa
