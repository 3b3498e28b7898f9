// Named barriers: meeting points of some of a CTA's warps.
//
// PTX ISA, "Parallel Synchronization and Communication Instructions: bar". Barrier 0 is
// __syncthreads(). A barrier is complete when `threads` threads (a multiple of 32) have arrived,
// waiting ones included; shared memory written before an arrival is visible behind a wait. All
// lanes of a warp take part.
#pragma once
#include "core/host_device.h"

namespace fa::ptx {

// Arrives and waits. id in [1, 15].
FA_DEVICE void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives without waiting.
FA_DEVICE void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives, waits, and tells whether the predicate of any arriving thread is true.
FA_DEVICE bool bar_red_or(int id, int threads, bool predicate) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred p, q;\n"
      "setp.ne.s32 p, %3, 0;\n"
      "bar.red.or.pred q, %1, %2, p;\n"
      "selp.s32 %0, 1, 0, q;\n"
      "}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<int>(predicate))
      : "memory");
  return any != 0;
}

}  // namespace fa::ptx
