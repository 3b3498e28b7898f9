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
