// Asynchronous copies of 16 bytes from global to shared memory, and groups of them.
//
// PTX ISA, "Data Movement and Conversion Instructions: cp.async". Data of a group are visible to
// the thread that issued it after its wait; other threads need a barrier behind that wait.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace fa::ptx {

// The 32-bit address of a generic pointer into shared memory.
FA_DEVICE uint32_t cvta_to_shared(const void* ptr) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(ptr));
}

// cp.async.cg: through L2 only. Copies src_bytes bytes (0 or 16) and fills the other of 16 with
// zeros. Preconditions: both addresses are multiples of 16; with src_bytes == 0, src is not read
// but still has to be a valid address. kWholeLines: L2 fetches the line of 128 bytes around it,
// else what is asked for.
template <bool kWholeLines = true>
FA_DEVICE void cp_async_cg_16(uint32_t smem, const void* src, int src_bytes) {
  if constexpr (kWholeLines) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem), "l"(src),
                 "r"(src_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(src),
                 "r"(src_bytes)
                 : "memory");
  }
}

FA_DEVICE void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups are still under way.
template <int kPending>
FA_DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace fa::ptx
