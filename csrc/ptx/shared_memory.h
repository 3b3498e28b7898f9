// Loads and stores of shared memory by 32-bit address.
//
// PTX ISA, "Data Movement and Conversion Instructions: ld, st".
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace fa::ptx {

// 4 bytes. Precondition: smem is a multiple of 4.
FA_DEVICE void st_shared_u32(uint32_t smem, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(smem), "r"(v) : "memory");
}

FA_DEVICE void st_shared_f32(uint32_t smem, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(smem), "f"(v) : "memory");
}

// 4 bytes. Precondition: smem is a multiple of 4.
FA_DEVICE uint32_t ld_shared_u32(uint32_t smem) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(smem) : "memory");
  return v;
}

// 8 bytes. Precondition: smem is a multiple of 8.
FA_DEVICE float2 ld_shared_v2_f32(uint32_t smem) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(smem) : "memory");
  return v;
}

// 16 bytes. Precondition: smem is a multiple of 16.
FA_DEVICE void st_shared_v4(uint32_t smem, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// 16 bytes. Precondition: smem is a multiple of 16.
FA_DEVICE uint4 ld_shared_v4(uint32_t smem) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(smem)
               : "memory");
  return v;
}

}  // namespace fa::ptx
