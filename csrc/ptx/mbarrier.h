// mbarriers: counters in shared memory that complete a phase when all expected arrivals have come
// and all announced bytes have been copied.
//
// PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier". A barrier is 8
// bytes, 8-byte aligned, named by its shared address. Phases alternate between parity 0 and 1; the
// first has parity 0.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace fa::ptx {

// `arrivals` complete each phase. One thread calls it; fence_mbarrier_init and a barrier of the CTA
// come before the first use by others.
FA_DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to TMA. PTX ISA, "membar/fence: fence.mbarrier_init".
FA_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival; what this thread did before is visible behind a wait for the phase.
FA_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// One arrival, and `bytes` more that copies have to bring before the phase is complete.
FA_DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is complete. A barrier never runs more than one phase ahead
// of a thread that waits for it.
FA_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done;\n"
      "bra again;\n"
      "done:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

}  // namespace fa::ptx
