// Shared-memory swizzles, accumulator layouts, rotary pairs, dropout bits and the tile table.
#include <cmath>
#include <set>
#include <utility>
#include <vector>

#include "core/accum_layout.h"
#include "core/philox.h"
#include "core/rotary.h"
#include "core/swizzle.h"
#include "core/tile_config.h"
#include "tests/check.h"

using namespace fa;

namespace {

template <int kRowBytes>
void test_swizzle() {
  constexpr int kRows = 64;
  std::set<int> seen;
  for (int row = 0; row < kRows; ++row)
    for (int byte = 0; byte < kRowBytes; ++byte) {
      const int offset = swizzle<kRowBytes>(row, byte);
      CHECK(0 <= offset && offset < kRows * kRowBytes, "%d: outside row=%d byte=%d", kRowBytes, row,
            byte);
      CHECK(offset / 128 == (row * kRowBytes + byte) / 128, "%d: left its 128-byte line row=%d",
            kRowBytes, row);
      CHECK(offset % 16 == byte % 16, "%d: chunk torn row=%d byte=%d", kRowBytes, row, byte);
      CHECK(seen.insert(offset).second, "%d: collision row=%d byte=%d", kRowBytes, row, byte);
      // TMA's pattern, as address bits: bits [4, 4 + n) ^= bits [7, 7 + n).
      const int address = row * kRowBytes + byte, n_bits_mask = kRowBytes / 16 - 1;
      CHECK(offset == (address ^ ((address >> 7 & n_bits_mask) << 4)),
            "%d: not TMA's row=%d byte=%d", kRowBytes, row, byte);
      CHECK(swizzle<kRowBytes>(row + swizzle_alignment(kRowBytes) / kRowBytes, byte) ==
                offset + swizzle_alignment(kRowBytes),
            "%d: period row=%d", kRowBytes, row);
    }
  // One ldmatrix phase reads one 16-byte column of 8 rows: 8 different groups of 4 banks.
  for (int row = 0; row < kRows; row += 8)
    for (int byte = 0; byte < kRowBytes; byte += 16) {
      std::set<int> bank_groups;
      for (int i = 0; i < 8; ++i) bank_groups.insert(swizzle<kRowBytes>(row + i, byte) / 16 % 8);
      CHECK(bank_groups.size() == 8, "%d: bank conflict row=%d byte=%d", kRowBytes, row, byte);
    }
}

void test_accum_layout() {
  for (int n : {8, 64, 128, 256}) {
    std::set<std::pair<int, int>> warp, warpgroup;
    for (int reg = 0; reg < n / 2; ++reg) {
      for (int lane = 0; lane < kWarpSize; ++lane) {
        const RowCol c = accum_coord(lane, reg);
        CHECK(0 <= c.row && c.row < 16 && 0 <= c.col && c.col < n, "outside");
        CHECK(warp.insert({c.row, c.col}).second, "twice: lane=%d reg=%d", lane, reg);
        const AccumSlot slot = accum_slot(c.row, c.col);
        CHECK(slot.thread == lane && slot.reg == reg, "inverse: lane=%d reg=%d", lane, reg);
      }
      for (int thread = 0; thread < kWarpgroupSize; ++thread) {
        const RowCol c = wgmma_accum_coord(thread, reg);
        CHECK(warpgroup.insert({c.row, c.col}).second, "twice: thread=%d reg=%d", thread, reg);
        CHECK(c.row / 16 == thread / 32 && c.row < 64 && c.col < n, "rows of a warp");
        const AccumSlot slot = wgmma_accum_slot(c.row, c.col);
        CHECK(slot.thread == thread && slot.reg == reg, "inverse: thread=%d reg=%d", thread, reg);
      }
    }
    CHECK(static_cast<int>(warp.size()) == 16 * n, "cover %d", n);
    CHECK(static_cast<int>(warpgroup.size()) == 64 * n, "cover %d", n);
  }
  // A row belongs to 4 neighbouring lanes: what the row maximum's two shuffles rely on.
  for (int lane = 0; lane < kWarpSize; ++lane)
    CHECK(accum_coord(lane, 0).row == accum_coord(lane ^ 3, 1).row, "quad lane=%d", lane);
}

// Spot values of the figures in the PTX ISA.
void test_operand_layouts() {
  std::set<std::pair<int, int>> a, b;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const RowCol c = a_operand_coord(lane, i);
      a.insert({c.row, c.col});
      const RowCol accum = accum_coord(lane, i);
      CHECK(c.row == accum.row && c.col == accum.col, "P renames to A: lane=%d i=%d", lane, i);
    }
    for (int i = 0; i < 4; ++i) {
      const RowCol c = b_operand_coord(lane, i);
      CHECK(c.row < 16 && c.col < 8, "outside");
      b.insert({c.row, c.col});
    }
  }
  CHECK(a.size() == 256 && b.size() == 128, "cover");
  CHECK(a_operand_coord(5, 7).row == 9 && a_operand_coord(5, 7).col == 11, "a7 of lane 5");
  CHECK(b_operand_coord(5, 3).row == 11 && b_operand_coord(5, 3).col == 1, "b3 of lane 5");
  CHECK(accum_coord(6, 3).row == 9 && accum_coord(6, 3).col == 5, "c3 of lane 6");
}

void test_rotary_pairs() {
  for (int rotary_dim : {2, 4, 16, 64})
    for (bool interleaved : {false, true}) {
      std::set<int> elements;
      for (int pair = 0; pair < rotary_dim / 2; ++pair) {
        const RotaryPair p = rotary_pair(pair, rotary_dim, interleaved);
        elements.insert(p.first);
        elements.insert(p.second);
        for (int element : {p.first, p.second}) {
          CHECK(0 <= element && element < rotary_dim, "outside");
          CHECK(rotary_column(element, rotary_dim, interleaved) == pair, "column dim=%d pair=%d",
                rotary_dim, pair);
          CHECK(is_second_of_pair(element, rotary_dim, interleaved) == (element == p.second),
                "second dim=%d pair=%d", rotary_dim, pair);
        }
        CHECK(p.second - p.first == (interleaved ? 1 : rotary_dim / 2), "distance");
      }
      CHECK(static_cast<int>(elements.size()) == rotary_dim, "cover dim=%d", rotary_dim);
    }
  CHECK(rotary_position(10, 3, false) == 13 && rotary_position(10, 3, true) == 10, "position");
}

// The bytes of a 16 x 32 tile are those that the accumulator registers of a warp need.
void test_dropout_layout() {
  const uint64_t seed = 0x123456789ABCDEF0, offset = 0x0FEDCBA987654321;
  for (int row_tile : {0, 1, 9})
    for (int col_tile : {0, 3})
      for (int lane = 0; lane < kWarpSize; ++lane) {
        const Philox4 bytes =
            dropout_bytes(seed, offset, 77, static_cast<uint32_t>(row_tile),
                          static_cast<uint32_t>(col_tile), static_cast<uint32_t>(lane));
        for (int reg = 0; reg < 16; ++reg) {
          const RowCol c = accum_coord(lane, reg);
          const int byte =
              dropout_byte(seed, offset, 77, row_tile * 16 + c.row, col_tile * 32 + c.col);
          CHECK(byte == philox_byte(bytes, reg), "lane=%d reg=%d", lane, reg);
          CHECK(0 <= byte && byte < 256, "range");
        }
      }
  // Each of seed, offset, batch_head, row and column matters, in both halves.
  const auto row = [](uint64_t s, uint64_t o, uint32_t bh, int q) {
    std::vector<int> bytes;
    for (int col = 0; col < 64; ++col) bytes.push_back(dropout_byte(s, o, bh, q, col));
    return bytes;
  };
  const std::set<std::vector<int>> different = {row(1, 2, 3, 4),
                                                row(2, 2, 3, 4),
                                                row(1, 3, 3, 4),
                                                row(1 + (1ull << 40), 2, 3, 4),
                                                row(1, 2 + (1ull << 41), 3, 4),
                                                row(1, 2, 4, 4),
                                                row(1, 2, 3, 5),
                                                row(1, 2, 3, 4 + 16)};
  CHECK(different.size() == 8, "an input is ignored");
}

// Keeping a score and rescaling by 256 / threshold is unbiased for the quantised probability, and
// the bytes are uniform enough to see a wrong threshold.
void test_dropout_rate() {
  for (double p : {0., 0.001, 0.1, 0.17, 0.5, 0.9, 0.999, 0.9999}) {
    const int threshold = keep_threshold(p);
    CHECK(1 <= threshold && threshold <= 256, "p=%g", p);
    CHECK(std::fabs(threshold / 256. - (1 - p)) <= 0.5 / 256 || threshold == 1, "p=%g", p);
    long kept = 0, total = 0;
    for (int row = 0; row < 256; ++row)
      for (int col = 0; col < 256; ++col, ++total)
        kept += dropout_byte(5, 6, 7, row, col) < threshold;
    const double expected = threshold / 256.;
    const double deviation = std::sqrt(expected * (1 - expected) * total);
    CHECK(std::fabs(kept - expected * total) <= 4 * deviation, "p=%g kept=%ld", p, kept);
  }
  CHECK(keep_threshold(1. - 127.5 / 256) == 128, "round half up");
}

constexpr int kHeadDims[] = {64, 96, 128, 192, 256};

void test_tile_configs() {
  for (Arch arch : {Arch::kSm80, Arch::kSm89, Arch::kSm90})
    for (MaskKind mask : {MaskKind::kFull, MaskKind::kBordered})
      for (int head_dim : kHeadDims) {
        const char* text = "%s head_dim=%d: %d";
        const bool sm90 = arch == Arch::kSm90;
        const FwdTileConfig f =
            sm90 ? sm90_fwd_tile_config({head_dim, head_dim}, mask == MaskKind::kFull
                                                                  ? Sm90FwdTile::kLong
                                                                  : Sm90FwdTile::kFine)
                 : fwd_tile_config(arch, head_dim);
        const int fwd_smem = sm90 ? sm90_fwd_smem_bytes(f, {head_dim, head_dim})
                                  : fwd_smem_bytes(f, head_dim, head_dim);
        CHECK(fwd_smem <= max_smem_bytes(arch), text, arch_name(arch), head_dim, fwd_smem);
        CHECK(fwd_accum_regs(f, head_dim) <= 200, text, arch_name(arch), head_dim,
              fwd_accum_regs(f, head_dim));
        CHECK(f.tile_m % (sm90 ? 64 : 16) == 0 && f.tile_n % 16 == 0, text, arch_name(arch),
              head_dim, f.tile_m);
        CHECK(f.num_stages >= 1 && f.num_q_stages >= 1 && f.num_warps % 4 == 0, text,
              arch_name(arch), head_dim, f.num_warps);
        CHECK(fwd_num_threads(arch, f) <= 1024, text, arch_name(arch), head_dim, 0);
        const BwdTileConfig b = bwd_tile_config(arch, head_dim);
        CHECK(bwd_smem_bytes(b, head_dim) <= max_smem_bytes(arch), text, arch_name(arch), head_dim,
              bwd_smem_bytes(b, head_dim));
        CHECK(bwd_accum_regs(b, head_dim) <= 224, text, arch_name(arch), head_dim,
              bwd_accum_regs(b, head_dim));
        CHECK(b.tile_m % 16 == 0 && b.tile_n % 16 == 0 && b.num_warps % 4 == 0, text,
              arch_name(arch), head_dim, b.tile_m);
        // V that has no buffer of its own passes through those of Q and dO.
        CHECK(!b.v_in_regs || b.tile_n <= (b.num_q_stages + b.num_dout_stages) * b.tile_m, text,
              arch_name(arch), head_dim, b.tile_n);
      }
  // The measured choices.
  const FwdTileConfig full = sm90_fwd_tile_config({128, 128}, Sm90FwdTile::kLong);
  CHECK(full.tile_m == 192 && full.tile_n == 80 && full.num_stages == 3, "sm90 d 128 full");
  const FwdTileConfig causal = sm90_fwd_tile_config({128, 128}, Sm90FwdTile::kFine);
  CHECK(causal.tile_m == 128 && causal.tile_n == 128 && causal.num_q_stages == 2, "sm90 causal");
  const FwdTileConfig d64 = sm90_fwd_tile_config({64, 64}, Sm90FwdTile::kFine);
  CHECK(d64.tile_m == 256 && d64.tile_n == 64 && d64.num_warps == 16, "sm90 d 64");
  CHECK(fwd_smem_bytes(full, 128, 128) == 172032, "hand-computed: (192 + 2 * 3 * 80) * 256");
  CHECK(sm90_fwd_smem_bytes({64, 64, 2, 1, 4, false}, {96, 96}) == 81920 + kFwdBarrierBytes,
        "96 columns take the place of 128: (64 + 2 * 2 * 64) * 256");
  CHECK(fwd_smem_bytes({64, 64, 2, 1, 4, false}, 192, 128) == 2 * (64 * 192 + 128 * 320), "d, dv");
  CHECK(fwd_smem_bytes({128, 16, 1, 1, 8, true}, 128, 128) == 2 * 128 * 128, "Q passes through");
  CHECK(fwd_accum_regs(full, 128) == 104, "64 x (80 + 128) / 128");
  CHECK(bwd_smem_bytes(bwd_tile_config(Arch::kSm90, 128), 128) == 229376,
        "hand-computed: 64 KB + 96 KB + 32 KB + 32 KB");
  CHECK(sm90_bwd_smem_bytes(bwd_tile_config(Arch::kSm90, 96), 96) ==
            64 * 1024 + 96 * 1024 + 32 * 1024 + 24 * 1024 + 1536 + 512,
        "rows of 256 bytes, dQ of 96 columns");
}

void test_built_head_dim() {
  for (int head_dim = -1; head_dim <= 300; ++head_dim) {
    int expected = 0;
    for (int built : kHeadDims)
      if (expected == 0 && head_dim >= 1 && head_dim <= built) expected = built;
    CHECK(built_head_dim(head_dim) == expected, "head_dim=%d", head_dim);
  }
}

void test_warpgroup_registers() {
  for (int consumers = 1; consumers <= 4; ++consumers) {
    const WarpgroupRegisters r = warpgroup_registers(consumers);
    CHECK((consumers + 1) * kWarpgroupSize * r.at_launch <= 65536, "launch %d", consumers);
    CHECK(r.producer + consumers * r.consumer <= 512, "pool %d", consumers);
    CHECK(r.producer >= 24 && r.consumer <= 256, "range %d", consumers);
  }
}

}  // namespace

int main() {
  test_swizzle<128>();
  test_swizzle<64>();
  test_swizzle<32>();
  test_accum_layout();
  test_operand_layouts();
  test_rotary_pairs();
  test_dropout_layout();
  test_dropout_rate();
  test_built_head_dim();
  test_tile_configs();
  test_warpgroup_registers();
  return report();
}
