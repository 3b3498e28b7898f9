// LayerNorm and RMSNorm: limits, how threads share a row, and dropout's random bits.
//
// A row is one vector of hidden_size elements. A group of threads keeps it in registers, so that it
// is read once, and then goes on to another row, which is on its way into shared memory meanwhile
// (a ring of rows): in 16 bits, where rows are aligned and shared memory has room. Rows of fp32
// have enough bytes under way without. The backward without a ring keeps the weights' gradients of
// a CTA's columns in shared memory.
#pragma once
#include "core/philox.h"

namespace fa {

constexpr int kNormVec = 8;            // elements that a thread moves at once
constexpr int kNormRowAlignment = 16;  // bytes, of rows that are moved in vectors
// With a ring.
constexpr int kNormRingStages = 2;        // rows of a group in shared memory
constexpr int kMaxNormRingThreads = 512;  // of an SM, of a CTA: 128 registers a thread
constexpr int kNormFwdRingColumns = 32;   // of a row, a thread
constexpr int kNormBwdRingColumns = 16;
constexpr int kNormFwdRingThreads = 128;  // of a CTA whose rows need fewer
constexpr int kNormBwdRingThreads = 256;

// Without. A thread of the backward keeps one vector of each row: two would spill at 64 registers.
// Rows that are wider than that are read twice.
constexpr int kMaxNormFwdThreads = 1024;
constexpr int kNormFwdColumns = 16;
constexpr int kMaxNormBwdThreads = 1024;  // of an SM, of a CTA
constexpr int kNormThreads = 256;         // of a CTA whose rows need fewer
constexpr int kMaxNormSize = kNormFwdColumns * kMaxNormFwdThreads;
constexpr int kMaxNormBwdRegisterSize = kNormVec * kMaxNormBwdThreads;
static_assert(kMaxNormSize == kNormFwdRingColumns * kMaxNormRingThreads);
static_assert(kMaxNormBwdRegisterSize == kNormBwdRingColumns * kMaxNormRingThreads);

constexpr int kNormReduceColumns = 32, kNormReduceRows = 32;  // threads of the last reduction

// Threads that share a row, and rows that a CTA takes at a time.
struct NormShare {
  int lanes, rows;
  FA_HD constexpr int num_threads() const { return lanes * rows; }
};
// Lanes: a power of two inside a warp, else whole warps. threads: of a CTA whose rows need fewer.
FA_HD constexpr NormShare norm_share(int hidden_size, int columns, int threads) {
  const int wanted = max(1, ceil_div(hidden_size, columns));
  const int lanes = wanted <= kWarpSize ? next_power_of_two(wanted) : round_up(wanted, kWarpSize);
  return {lanes, max(1, threads / lanes)};
}

FA_HD constexpr NormShare norm_fwd_ring_share(int hidden_size) {
  return norm_share(hidden_size, kNormFwdRingColumns, kNormFwdRingThreads);
}
FA_HD constexpr NormShare norm_fwd_share(int hidden_size) {
  return norm_share(hidden_size, kNormFwdColumns, kNormThreads);
}
FA_HD constexpr NormShare norm_bwd_ring_share(int hidden_size) {
  return norm_share(hidden_size, kNormBwdRingColumns, kNormBwdRingThreads);
}
FA_HD constexpr NormShare norm_bwd_share(int hidden_size) {
  return norm_share(min(hidden_size, kMaxNormBwdRegisterSize), kNormVec, kNormThreads);
}
// Bytes of a ring whose rows have `bytes` for each column, in all tensors together.
FA_HD constexpr int norm_ring_smem_bytes(NormShare share, int columns, int bytes) {
  return kNormRingStages * share.num_threads() * columns * bytes;
}
// Vectors of a row that a thread of the backward has.
FA_HD constexpr int norm_bwd_vectors(int hidden_size) {
  return ceil_div(hidden_size, norm_bwd_share(hidden_size).lanes * kNormVec);
}

// Bytes of the backward's ring, where the weights' gradients are in the end.
FA_HD constexpr int norm_bwd_ring_smem_bytes(int hidden_size, bool has_dsum) {
  return norm_ring_smem_bytes(norm_bwd_ring_share(hidden_size), kNormBwdRingColumns,
                              has_dsum ? 3 * 2 : 2 * 2);
}
static_assert(kNormRingStages * 2 * 2 >= 2 * sizeof(float), "room for two gradients of a column");

// CTAs: as many as the GPU runs at once, each with a share of the rows and, in the backward, one
// partial gradient of the weights.
FA_HD constexpr int64_t norm_ctas(NormShare share, int64_t rows, int num_sms, int threads_per_sm) {
  const int64_t at_once = int64_t{num_sms} * max(1, threads_per_sm / share.num_threads());
  return clamp(ceil_div<int64_t>(rows, share.rows), int64_t{1}, at_once);
}
FA_HD constexpr int64_t norm_bwd_ctas(int hidden_size, int64_t rows, int num_sms) {
  return norm_ctas(norm_bwd_share(hidden_size), rows, num_sms, kMaxNormBwdThreads);
}
// Elements of a row of the partial gradients.
FA_HD constexpr int norm_partial_stride(int hidden_size) {
  return round_up(hidden_size, kNormVec);
}
// Parts of the gradients of weight and bias in a CTA of the backward.
FA_HD constexpr int norm_bwd_smem_bytes(int hidden_size, bool has_bias) {
  return (has_bias ? 2 : 1) * norm_bwd_vectors(hidden_size) * kNormVec *
         norm_bwd_share(hidden_size).num_threads() * static_cast<int>(sizeof(float));
}

// Dropout: 16 random bits to an element; one call of Philox gives those of 8 neighbouring columns.
//
//   key     = (seed low word, seed high word ^ offset high word)
//   counter = (column // 8, row low word, row high word, offset low word)
//
// Element `column` has half word column % 8, and is kept iff it is below the threshold.
constexpr int kNormDropoutColumns = 8;

FA_HD constexpr Philox4 norm_dropout_words(uint64_t seed, uint64_t offset, int64_t row,
                                           int column_group) {
  return philox4x32_7({{static_cast<uint32_t>(column_group), static_cast<uint32_t>(row),
                        static_cast<uint32_t>(row >> 32), static_cast<uint32_t>(offset)}},
                      static_cast<uint32_t>(seed),
                      static_cast<uint32_t>(seed >> 32) ^ static_cast<uint32_t>(offset >> 32));
}
FA_HD constexpr int norm_dropout_bits(Philox4 words, int column) {
  return static_cast<int>(words.word[column % kNormDropoutColumns / 2] >> column % 2 * 16 & 0xFFFF);
}
// Half words below this are kept: round half up of (1 - dropout_p) * 65536, in [1, 65536]. 65536:
// no dropout. What is kept is multiplied by 65536 / threshold.
constexpr int kNormKeepAll = 65536;
FA_HD constexpr int norm_keep_threshold(double dropout_p) {
  return clamp(static_cast<int>((1. - dropout_p) * kNormKeepAll + 0.5), 1, kNormKeepAll);
}

static_assert(norm_share(64, 16, 256).lanes == 4 && norm_share(1, 16, 256).lanes == 1);
static_assert(norm_share(1536, 16, 256).lanes == 96 && norm_share(1536, 16, 256).rows == 2);
static_assert(norm_keep_threshold(0.) == 65536 && norm_keep_threshold(0.25) == 49152);

}  // namespace fa
