// A ring of buffers between a producer, whose copies fill them, and consumers, who release them.
//
// Each buffer has two mbarriers: `full` completes when its bytes have arrived, `empty` when all
// consumers have released it. Both sides walk over the stages in the same order; the parity of the
// phase that a side waits for flips at every turn. The producer starts with parity 1: a wait for
// the phase before the first passes at once, so empty buffers need no first release.
#pragma once
#include "ptx/mbarrier.h"

namespace fa {

// One side's place in the ring.
template <int kStages>
struct Pipeline {
  static constexpr int kBarrierBytes = 2 * kStages * 8;

  uint32_t barriers;  // shared address: kStages full ones, then kStages empty ones
  int stage;
  uint32_t parity;

  static FA_DEVICE Pipeline producer(uint32_t barriers) { return {barriers, 0, 1}; }
  static FA_DEVICE Pipeline consumer(uint32_t barriers) { return {barriers, 0, 0}; }

  // A side's place after `turn` buffers, for those who count for several rings at once. kStages is
  // a power of two.
  static FA_DEVICE Pipeline producer_at(uint32_t barriers, uint32_t turn) {
    return {barriers, static_cast<int>(turn % kStages), turn / kStages % 2 ^ 1};
  }
  static FA_DEVICE Pipeline consumer_at(uint32_t barriers, uint32_t turn) {
    return {barriers, static_cast<int>(turn % kStages), turn / kStages % 2};
  }

  // num_releases: arrivals that empty a buffer; num_fills: that fill one. One thread calls it.
  static FA_DEVICE void init(uint32_t barriers, int num_releases, int num_fills = 1) {
    FA_UNROLL
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(barriers + 8 * i, num_fills);
      ptx::mbarrier_init(barriers + 8 * (kStages + i), num_releases);
    }
  }

  FA_DEVICE uint32_t full() const { return barriers + 8 * stage; }
  FA_DEVICE uint32_t empty() const { return full() + 8 * kStages; }
  FA_DEVICE void wait_full() const { ptx::mbarrier_wait(full(), parity); }
  FA_DEVICE void wait_empty() const { ptx::mbarrier_wait(empty(), parity); }
  FA_DEVICE void release() const { ptx::mbarrier_arrive(empty()); }

  FA_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace fa
