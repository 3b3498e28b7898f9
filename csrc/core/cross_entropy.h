// Cross-entropy: how a CTA walks a row of logits, which may begin anywhere.
#pragma once
#include "core/host_device.h"

namespace fa {

constexpr int kCrossEntropyThreads = 512;
constexpr int kCrossEntropyUnroll = 4;  // vectors that a thread reads before it uses the first
constexpr int kCrossEntropyVectorBytes = 16;

// A row cut at the first multiple of 16 bytes: `head` elements one by one, `vectors` of `vec`
// elements, from `tail` on one by one again.
struct RowPieces {
  int head, vectors, tail;
};
// address: of the row's first element; a multiple of element_bytes.
FA_HD constexpr RowPieces row_pieces(uint64_t address, int element_bytes, int size) {
  const int misplaced = static_cast<int>(address % kCrossEntropyVectorBytes);
  const int vec = kCrossEntropyVectorBytes / element_bytes;
  const int head = min(size, misplaced == 0 ? 0 : vec - misplaced / element_bytes);
  const int vectors = (size - head) / vec;
  return {head, vectors, head + vectors * vec};
}

static_assert(row_pieces(32, 2, 20).head == 0 && row_pieces(32, 2, 20).vectors == 2);
static_assert(row_pieces(34, 2, 20).head == 7 && row_pieces(34, 2, 20).tail == 15);
static_assert(row_pieces(36, 4, 2).head == 2 && row_pieces(36, 4, 2).tail == 2);

}  // namespace fa
