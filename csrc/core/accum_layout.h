// Where the registers of a matrix multiplication lie in the tile, and back.
//
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "Register Fragments for
// wgmma.mma_async.m64nNk16" (accumulator D). Both place the registers of a warp alike; warp w of a
// warpgroup owns rows [16 w, 16 w + 16).
#pragma once
#include "core/host_device.h"

namespace fa {

struct RowCol {
  int row, col;
};

// Who holds an element: register `reg` of thread `thread` (the lane of a warp, or the thread of a
// warpgroup).
struct AccumSlot {
  int thread, reg;
};

// Register `reg` of lane `lane` in one warp's 16 x n accumulator; reg in [0, n / 2).
FA_HD constexpr RowCol accum_coord(int lane, int reg) {
  return {lane / 4 + (reg % 4 >= 2 ? 8 : 0), reg / 4 * 8 + lane % 4 * 2 + reg % 2};
}
FA_HD constexpr AccumSlot accum_slot(int row, int col) {
  return {row % 8 * 4 + col % 8 / 2, col / 8 * 4 + row / 8 * 2 + col % 2};
}

// Register `reg` of thread `thread` in one warpgroup's 64 x n accumulator; reg in [0, n / 2).
FA_HD constexpr RowCol wgmma_accum_coord(int thread, int reg) {
  const RowCol in_warp = accum_coord(thread % kWarpSize, reg);
  return {thread / kWarpSize * 16 + in_warp.row, in_warp.col};
}
FA_HD constexpr AccumSlot wgmma_accum_slot(int row, int col) {
  const AccumSlot in_warp = accum_slot(row % 16, col);
  return {row / 16 * kWarpSize + in_warp.thread, in_warp.reg};
}

// Element `i` in [0, 8) of a lane's 16 x 16 A operand (two elements to a register). It lies where
// accumulator register i of 16 columns lies, so P becomes an A operand by conversion alone: element
// i of k-step s is accumulator register 8 s + i.
FA_HD constexpr RowCol a_operand_coord(int lane, int i) {
  return {lane / 4 + (i / 2 % 2 ? 8 : 0), lane % 4 * 2 + i % 2 + (i / 4 ? 8 : 0)};
}

// Element `i` in [0, 4) of a lane's 16 x 8 (k x n) B operand; row is k.
FA_HD constexpr RowCol b_operand_coord(int lane, int i) {
  return {lane % 4 * 2 + i % 2 + (i / 2 ? 8 : 0), lane / 4};
}

// Which row of a 16 x 16 block of shared memory each lane hands to ldmatrix.x4, and where in it the
// lane's 16 bytes begin (column, elements). Two orders of the four 8 x 8 matrices serve all
// operands:
//   by rows     (0, 0) (8, 0) (0, 8) (8, 8)   A from [row][k]; with .trans, two B from [k][n]
//   by columns  (0, 0) (0, 8) (8, 0) (8, 8)   two B from [n][k]; with .trans, A from [k][row]
// Then registers 0..3 are an A operand, or registers 0, 1 and 2, 3 two B operands of 8 columns.
FA_HD constexpr RowCol ldmatrix_lane_by_rows(int lane) {
  return {lane % 16, lane / 16 * 8};
}
FA_HD constexpr RowCol ldmatrix_lane_by_columns(int lane) {
  return {lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8};
}

static_assert(accum_coord(0, 0).row == 0 && accum_coord(31, 3).row == 15);
static_assert(accum_slot(15, 7).thread == 31 && accum_slot(15, 7).reg == 3);
static_assert(wgmma_accum_coord(127, 3).row == 63);

}  // namespace fa
