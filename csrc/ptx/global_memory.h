// Global memory loads and stores of 16 and 8 bytes.
//
// PTX ISA, "Data Movement and Conversion Instructions: ld, st". L1::no_allocate is for rows that
// are touched once and in whole cache lines.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace fa::ptx {

// 16 bytes. Preconditions: ptr is a multiple of 16 bytes in global memory; what it points to is not
// written in this kernel before the load (the compiler may move the load, so that several are in
// flight).
FA_DEVICE uint4 ld_global_no_allocate_v4(const void* ptr) {
  uint4 v;
  asm("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(ptr));
  return v;
}

// 16 bytes, through L1. Preconditions: as above.
FA_DEVICE uint4 ld_global_v4(const void* ptr) {
  uint4 v;
  asm("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(ptr));
  return v;
}

// 8 bytes, through L1. Preconditions: as above, but a multiple of 8 bytes.
FA_DEVICE uint2 ld_global_v2(const void* ptr) {
  uint2 v;
  asm("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(ptr));
  return v;
}

// 16 bytes. Precondition: ptr is a multiple of 16 bytes in global memory.
FA_DEVICE void st_global_u32(void* ptr, uint32_t v) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(ptr), "r"(v) : "memory");
}
FA_DEVICE void st_global_v4(void* ptr, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(ptr), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// 8 bytes. Precondition: ptr is a multiple of 8 bytes in global memory.
FA_DEVICE void st_global_v2(void* ptr, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(ptr), "r"(v.x), "r"(v.y) : "memory");
}

}  // namespace fa::ptx
