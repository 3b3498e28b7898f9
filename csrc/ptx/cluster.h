// Clusters: CTAs that run at the same time on neighbouring SMs and reach each other's shared
// memory.
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
  asm volatile(
      "mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier),
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
