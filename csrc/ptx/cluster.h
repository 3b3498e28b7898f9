// Clusters: CTAs that run at the same time on neighbouring SMs and reach each other's shared memory.
//
// PTX ISA, "Parallel Synchronization and Communication Instructions: barrier.cluster, mbarrier" and
// "Data Movement and Conversion Instructions: mapa, cp.async.bulk". An address of another CTA's
// shared memory comes from cluster_address(); that CTA must still run.
#pragma once
#include "ptx/tma.h"

namespace fa::ptx {

// Which CTA of its cluster this is.
FA_DEVICE int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster that have not ended meet; what they wrote before is visible behind it.
FA_DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Where `smem` of this CTA lies in the CTA of this rank.
FA_DEVICE uint32_t cluster_address(uint32_t smem, int rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem), "r"(rank));
  return address;
}

// Stores 4 bytes at a cluster address.
FA_DEVICE void st_cluster_s32(uint32_t address, int x) {
  asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// mbarrier_arrive() and mbarrier_arrive_expect_tx() on any CTA's barrier, a cluster address.
FA_DEVICE void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
               : "memory");
}
FA_DEVICE void mbarrier_arrive_expect_tx_cluster(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(
                   barrier),
               "r"(bytes)
               : "memory");
}

// mbarrier_wait() for a barrier of this CTA on which threads of others arrive.
FA_DEVICE void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%0], %1;\n"
      "@complete bra done;\n"
      "bra again;\n"
      "done:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// cp_async_bulk_tensor_4d() to the same place in every CTA of `ranks` (a bit each), counted there on
// the barrier that lies where `barrier` does in this one.
FA_DEVICE void cp_async_bulk_tensor_4d_multicast(uint32_t smem, const void* map, BoxOrigin at,
                                                 uint32_t barrier, uint16_t ranks,
                                                 uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7, %8;" ::"r"(smem),
      "l"(map), "r"(at.column), "r"(at.row), "r"(at.head), "r"(at.batch), "r"(barrier), "h"(ranks),
      "l"(l2_policy)
      : "memory");
}

// Copies `bytes` of this CTA's shared memory to dst and counts them on `barrier`, both cluster
// addresses of one CTA. Preconditions: addresses and bytes are multiples of 16.
FA_DEVICE void cp_async_bulk_to_cluster(uint32_t dst, uint32_t smem, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(dst),
      "r"(smem), "r"(bytes), "r"(barrier)
      : "memory");
}

}  // namespace fa::ptx
