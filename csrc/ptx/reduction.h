// Additions in global memory that return nothing, and counters that order them.
//
// PTX ISA, "Parallel Synchronization and Communication Instructions: red" and "Memory Consistency
// Model".
#pragma once
#include "core/host_device.h"

namespace fa::ptx {

// *ptr += x, in L2. ptr is in global memory.
FA_DEVICE void red_global_add_f32(float* ptr, float x) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(ptr), "f"(x) : "memory");
}

// Two at once: one instruction from compute capability 9.0 on. ptr is a multiple of 8 bytes.
FA_DEVICE void red_global_add_v2_f32(float* ptr, float x, float y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(ptr), "f"(x), "f"(y)
               : "memory");
#else
  red_global_add_f32(ptr, x);
  red_global_add_f32(ptr + 1, y);
#endif
}

// Four at once, compute capability 9.0. ptr is a multiple of 16 bytes.
FA_DEVICE void red_global_add_v4_f32(float* ptr, const float (&x)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(ptr), "f"(x[0]),
               "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}

// *ptr += x; what this thread and those it has synchronised with wrote before is visible to whoever
// reads the sum with ld_acquire_gpu.
FA_DEVICE void red_release_gpu_add_s32(int* ptr, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(ptr), "r"(x) : "memory");
}

// The same, and returns what *ptr was; what was written before additions that it sees is visible to
// this thread and those it synchronises with after it.
FA_DEVICE int atom_add_acq_rel_gpu_s32(int* ptr, int x) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(ptr), "r"(x)
               : "memory");
  return before;
}

FA_DEVICE int ld_acquire_gpu_s32(const int* ptr) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(ptr) : "memory");
  return x;
}

}  // namespace fa::ptx
