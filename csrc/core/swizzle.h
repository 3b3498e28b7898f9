// Shared-memory swizzles: 16-byte chunks of a row are XORed with bits of the row number, so that
// the 8 rows that one ldmatrix or wgmma phase reads fall into 8 different groups of 4 banks.
//
// A tile is [rows][row_bytes] with rows of 128, 64 or 32 bytes. The patterns are those of TMA and
// of the wgmma descriptor (SWIZZLE_128B, _64B, _32B; PTX ISA, "Swizzling Modes"), so SM80
// (cp.async, ldmatrix) and SM90 (TMA, wgmma) share one layout. Chunks never leave a group of 8
// bank-group rows: the pattern repeats every 1024, 512 or 256 bytes, the alignment a tile needs.
#pragma once
#include "core/host_device.h"

namespace fa {

constexpr int kSwizzleChunkBytes = 16;  // what one lane of ldmatrix reads, one cp.async copies

// Byte offset of (row, byte_in_row) in a tile with rows of kRowBytes.
template <int kRowBytes>
FA_HD constexpr int swizzle(int row, int byte_in_row) {
  static_assert(kRowBytes == 128 || kRowBytes == 64 || kRowBytes == 32);
  const int offset = row * kRowBytes + byte_in_row;
  // Bits 7.. count 128-byte lines; as many of them as a row has chunks select the chunk.
  const int line = offset / 128 % (kRowBytes / kSwizzleChunkBytes);
  return offset ^ (line * kSwizzleChunkBytes);
}

// Alignment of the tile's first byte.
FA_HD constexpr int swizzle_alignment(int row_bytes) {
  return 8 * row_bytes;
}

FA_HD constexpr int swizzle_128b(int row, int byte_in_row) {
  return swizzle<128>(row, byte_in_row);
}
FA_HD constexpr int swizzle_64b(int row, int byte_in_row) {
  return swizzle<64>(row, byte_in_row);
}
FA_HD constexpr int swizzle_32b(int row, int byte_in_row) {
  return swizzle<32>(row, byte_in_row);
}

// The same idea for whole rows of any multiple of 64 bytes, one behind the other (SM80, where no
// hardware prescribes a pattern): chunk c of row r stands at chunk c ^ row_swizzle(r). 8 rows of
// one column of chunks, from a multiple of 8 on, fall into 8 different bank groups.
template <int kRowBytes>
FA_HD constexpr int row_swizzle(int row) {
  static_assert(kRowBytes % 64 == 0);
  // Rows of an odd number of 64 bytes begin in either half of the banks by turns.
  return kRowBytes % 128 == 0 ? row % 8 : row / 2 % 4;
}
// Byte offset of (row, byte_in_row).
template <int kRowBytes>
FA_HD constexpr int swizzle_row(int row, int byte_in_row) {
  return row * kRowBytes + (byte_in_row ^ (row_swizzle<kRowBytes>(row) * kSwizzleChunkBytes));
}

static_assert(swizzle_128b(0, 32) == 32 && swizzle_128b(1, 0) == 128 + 16);
static_assert(swizzle_64b(1, 0) == 64 && swizzle_64b(2, 0) == 128 + 16);
static_assert(swizzle_row<256>(9, 0) == 9 * 256 + 16 && swizzle_row<192>(2, 0) == 2 * 192 + 16);
static_assert(swizzle_32b(3, 0) == 96 && swizzle_32b(4, 0) == 128 + 16);

}  // namespace fa
