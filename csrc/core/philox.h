// Dropout's random bits: Philox4x32-7, and which byte of it belongs to which score.
//
// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11; constants as in Random123.
// Seven rounds are the fewest that pass BigCrush, and as many as FlashAttention-2 has.
// The byte is a function of (seed, offset, batch, head, row, column) alone, so the mask is the same
// on every architecture, for every tile size, and in the PyTorch backend (_philox.py).
//
// One call gives 16 bytes: the 16 accumulator registers that one lane of a warp holds of a 16 x 32
// tile of scores (accum_layout.h). A score is kept iff its byte < keep_threshold, and kept
// probabilities are multiplied by 256 / keep_threshold, the exact inverse of their probability.
#pragma once
#include "core/host_device.h"

namespace fa {

struct Philox4 {
  uint32_t word[4];
};

FA_HD constexpr Philox4 philox4x32_7(Philox4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 7; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter.word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9;  // golden ratio
    key1 += 0xBB67AE85;  // sqrt(3) - 1
  }
  return counter;
}

constexpr int kDropoutTileRows = 16, kDropoutTileCols = 32;

// The 16 bytes of lane `lane` in the 16 x 32 tile (row_tile, col_tile) of the scores of one head.
// batch_head = batch * num_heads_q + head; rows and columns count inside the sequence.
FA_HD constexpr Philox4 dropout_bytes(uint64_t seed, uint64_t offset, uint32_t batch_head,
                                      uint32_t row_tile, uint32_t col_tile, uint32_t lane) {
  const uint32_t offset_low = static_cast<uint32_t>(offset);
  const uint32_t offset_high = static_cast<uint32_t>(offset >> 32);
  return philox4x32_7({{row_tile, col_tile * kDropoutTileCols + lane, batch_head, offset_low}},
                      static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32) ^ offset_high);
}

// Byte `reg` in [0, 16): the one of accumulator register `reg`.
FA_HD constexpr int philox_byte(Philox4 bytes, int reg) {
  return static_cast<int>(bytes.word[reg / 4] >> (reg % 4 * 8) & 0xFF);
}

// The byte of one score, in [0, 256).
FA_HD constexpr int dropout_byte(uint64_t seed, uint64_t offset, uint32_t batch_head, int row,
                                 int col) {
  const int r = row % kDropoutTileRows, c = col % kDropoutTileCols;
  const int lane = r % 8 * 4 + c % 8 / 2, reg = c / 8 * 4 + r / 8 * 2 + c % 2;
  const Philox4 bytes =
      dropout_bytes(seed, offset, batch_head, static_cast<uint32_t>(row / kDropoutTileRows),
                    static_cast<uint32_t>(col / kDropoutTileCols), static_cast<uint32_t>(lane));
  return philox_byte(bytes, reg);
}

// Bytes below this are kept: round half up of (1 - dropout_p) * 256, in [1, 256]. 256: no dropout.
FA_HD constexpr int keep_threshold(double dropout_p) {
  return clamp(static_cast<int>((1. - dropout_p) * 256. + 0.5), 1, 256);
}

// Known answers of Random123 (kat_vectors, philox4x32 7).
FA_HD constexpr bool equal(Philox4 a, Philox4 b) {
  return a.word[0] == b.word[0] && a.word[1] == b.word[1] && a.word[2] == b.word[2] &&
         a.word[3] == b.word[3];
}
static_assert(equal(philox4x32_7({{0, 0, 0, 0}}, 0, 0),
                    {{0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48}}));
static_assert(equal(philox4x32_7({{0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF}}, 0xFFFFFFFF,
                                 0xFFFFFFFF),
                    {{0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662}}));
static_assert(equal(philox4x32_7({{0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}}, 0xA4093822,
                                 0x299F31D0),
                    {{0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A}}));
static_assert(keep_threshold(0.) == 256 && keep_threshold(0.5) == 128 &&
              keep_threshold(0.1) == 230);

}  // namespace fa
