// Tensor maps: what TMA has to know of a tensor, put together on the host by the driver.
//
// CUDA Driver API, "Tensor Map Object Management: cuTensorMapEncodeTiled".
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "core/params.h"

namespace fa {

// The driver's function, found at run time so that nothing links libcuda; nullptr: too old.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                     &found);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

// A [batch, token, head, dim] tensor of 16-bit elements whose rows start at multiples of 16 bytes.
struct HeadTensor {
  const void* data;
  Strides strides;
  int batch_size, num_tokens, num_heads, head_dim;
};

// Rows of a side: packed sequences are one batch entry.
inline HeadTensor head_tensor(const void* data, const Strides& strides, const SeqlenArgs& seqlens,
                              int total, int batch_size, int num_heads, int head_dim) {
  const bool varlen = seqlens.cu_seqlens != nullptr;
  return {data,      strides, varlen ? 1 : batch_size, varlen ? total : seqlens.max_seqlen,
          num_heads, head_dim};
}

// Boxes of box_rows tokens x 64 elements of a head, rows swizzled over 128 bytes, zeros outside the
// tensor. Order of coordinates: ptx::BoxOrigin. promotion: of what L2 fetches from memory.
inline cudaError_t encode_tensor_map(
    CUtensorMap& map, DType dtype, const HeadTensor& t, int box_rows,
    CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  const auto encoder = tensor_map_encoder();
  if (encoder == nullptr) return cudaErrorNotSupported;
  const auto size = [](int n) { return static_cast<cuuint64_t>(max(n, 1)); };
  // The stride of a dimension of size 1 counts for nothing, but has to be a multiple of 16 bytes.
  const auto bytes = [](int n, int64_t stride) {
    return n <= 1 ? cuuint64_t{16} : static_cast<cuuint64_t>(2 * stride);
  };
  const cuuint64_t sizes[] = {size(t.head_dim), size(t.num_tokens), size(t.num_heads),
                              size(t.batch_size)};
  const cuuint64_t strides[] = {bytes(t.num_tokens, t.strides.token),
                                bytes(t.num_heads, t.strides.head),
                                bytes(t.batch_size, t.strides.batch)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t element_strides[] = {1, 1, 1, 1};
  const CUtensorMapDataType type =
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encoder(&map, type, 4, const_cast<void*>(t.data), sizes, strides, box, element_strides,
              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, promotion,
              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace fa
