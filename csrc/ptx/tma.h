// The tensor memory accelerator: one thread starts the copy of a whole box of a tensor, or adds a
// run of floats to global memory.
//
// PTX ISA, "Data Movement and Conversion Instructions: cp.async.bulk.tensor, cp.reduce.async.bulk,
// prefetch.tensormap, fence.proxy.async". `map` points to a CUtensorMap in the kernel's parameters
// (__grid_constant__).
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace fa::ptx {

// How long lines of a copy are to stay in L2: the encoded policies that createpolicy.fractional
// returns for evict_first and evict_last of all lines.
constexpr uint64_t kL2EvictFirst = 0x12F0000000000000;
constexpr uint64_t kL2EvictLast = 0x14F0000000000000;

FA_DEVICE void prefetch_tensormap(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// First element of a box in a tensor of rank 4, the contiguous dimension first.
struct BoxOrigin {
  int column, row, head, batch;
};

// Copies a box to shared memory and counts its bytes on `barrier`; elements outside the tensor
// arrive as zeros and count. Preconditions: smem is a multiple of the swizzle's period.
FA_DEVICE void cp_async_bulk_tensor_4d(uint32_t smem, const void* map, BoxOrigin at,
                                       uint32_t barrier, uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(smem),
      "l"(map), "r"(at.column), "r"(at.row), "r"(at.head), "r"(at.batch), "r"(barrier),
      "l"(l2_policy)
      : "memory");
}

// Copies a box from shared memory, as part of this thread's group; elements outside the tensor are
// not written. Preconditions: as above; what other threads wrote there is behind fence_proxy_async.
FA_DEVICE void cp_async_bulk_tensor_4d_store(const void* map, BoxOrigin at, uint32_t smem) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::
          "l"(map),
      "r"(at.column), "r"(at.row), "r"(at.head), "r"(at.batch), "r"(smem)
      : "memory");
}

// Adds `bytes` of floats in shared memory to those at dst, in L2, as part of this thread's group.
// Preconditions: both addresses and bytes are multiples of 16.
FA_DEVICE void cp_reduce_async_bulk_add_f32(float* dst, uint32_t smem, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst),
      "r"(smem), "r"(bytes)
      : "memory");
}
// Copies `bytes` from shared memory to dst, as part of this thread's group. Preconditions: as
// above.
FA_DEVICE void cp_async_bulk_store(void* dst, uint32_t smem, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(smem),
               "r"(bytes)
               : "memory");
}
// Copies `bytes` at src to shared memory and counts them on `barrier`. Preconditions: as above.
FA_DEVICE void cp_async_bulk_load(uint32_t smem, const void* src, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(smem),
      "l"(src), "r"(bytes), "r"(barrier)
      : "memory");
}
FA_DEVICE void cp_async_bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Waits until at most kPending of this thread's groups still read shared memory.
template <int kPending>
FA_DEVICE void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Waits until at most kPending of this thread's groups are not complete.
template <int kPending>
FA_DEVICE void cp_async_bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Orders this thread's accesses to shared memory before accesses by TMA and wgmma that are issued
// behind a barrier.
FA_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Orders this thread's accesses to global memory, and those it has learnt of, before accesses by
// TMA that it issues.
FA_DEVICE void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

}  // namespace fa::ptx
