// Global memory loads and stores of 16 and 8 bytes for data that is touched once.
//
// PTX ISA, "Data Movement and Conversion Instructions: ld, st". L1::no_allocate keeps streamed rows
// from evicting the small tables that the same kernels read many times.
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

// 16 bytes. Precondition: ptr is a multiple of 16 bytes in global memory.
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
