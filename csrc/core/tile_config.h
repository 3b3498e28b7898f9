// The one table of tile sizes of the attention kernels. Kernels, plans and tests read it.
//
// Rows are chosen by head_dim rounded up to a built size (64, 96, 128, 192, 256). kSm80 rows are
// for 163 KB of shared memory; kSm89 rows for 99 KB, which is what GPUs of compute capability 8.6,
// 8.9 and 12.0 have. "Bordered" is a causal or window mask, where smaller tiles waste less on the
// border; a kernel family that needs one tile for all masks takes kFull. The numbers are starting
// values: change one together with the measurement that shows the gain.
#pragma once
#include "core/arch.h"

namespace fa {

constexpr int kMaxHeadDim = 256;

// The built size that runs head_dim; 0: none does.
FA_HD constexpr int built_head_dim(int head_dim) {
  const int built[] = {64, 96, 128, 192, kMaxHeadDim};
  for (int size : built)
    if (0 < head_dim && head_dim <= size) return size;
  return 0;
}

enum class MaskKind { kFull, kBordered };

struct FwdTileConfig {
  int tile_m, tile_n;     // rows of Q, rows of K and V per step
  int num_stages;         // K and V buffers in flight
  int num_q_stages;       // Q buffers: 2 = the next tile's Q loads while this one computes
  int num_warps;          // that compute; SM90 adds one producer warpgroup
  bool q_in_regs;         // Q passes through the K buffers into registers and keeps no buffer
  int warps_per_row = 1;  // 2: a pair of warps shares rows, each half of the keys of S and of the
                          // columns of O; P goes through shared memory
};

FA_HD constexpr bool same_tile(FwdTileConfig a, FwdTileConfig b) {
  return a.tile_m == b.tile_m && a.tile_n == b.tile_n && a.num_stages == b.num_stages &&
         a.num_q_stages == b.num_q_stages && a.num_warps == b.num_warps &&
         a.q_in_regs == b.q_in_regs && a.warps_per_row == b.warps_per_row;
}

// The rows of the table for a mask; SM90 has some for each.
FA_HD constexpr MaskKind mask_kind(int window_left, int window_right) {
  return window_left >= 0 || window_right >= 0 ? MaskKind::kBordered : MaskKind::kFull;
}

// The built sizes that run (head_dim, head_dim_v) on SM90.
struct BuiltHeadDims {
  int head_dim, head_dim_v;
};
FA_HD constexpr BuiltHeadDims sm90_fwd_built_head_dims(int head_dim, int head_dim_v) {
  const int built = built_head_dim(max(head_dim, head_dim_v));
  return {built, built == 192 && head_dim_v <= 128 ? 128 : built};
}

// Which of SM90's tiles of a head_dim.
enum class Sm90FwdTile : int {
  kLong,     // many keys for every row: three consumer warpgroups
  kFine,     // begins and ends faster, wastes less on a border; may be the same as kLong
  kScoreMod  // softcap, ALiBi, dropout: tile_n is a multiple of 32, which share a call of Philox
};

// Every consumer warpgroup owns 64 rows; P stays in registers. Shared memory holds columns in slabs
// of 64, so 96 take the place of 128.
FA_HD constexpr FwdTileConfig sm90_fwd_tile_config(BuiltHeadDims built, Sm90FwdTile which) {
  const bool is_long = which == Sm90FwdTile::kLong, score_mod = which == Sm90FwdTile::kScoreMod;
  // clang-format off
  switch (built.head_dim) {
    // More than two warpgroups hide the exponentials, which take as long as the products here.
    // kLong: twice the keys a step, for which barriers and descriptors cost the same (145 KB).
    // kFine: tile_n 80 does not compile without serialised wgmma at the 112 registers of four
    // warpgroups, nor does a ScoreMod. Two Q stages (128 KB) are 1 to 4 % faster than one.
    case 64:
      if (score_mod) return {128, 128, 2, 2, 8, false};
      if (is_long) return {192, 128, 3, 2, 12, false};
      return {256, 64, 4, 2, 16, false};
    case 96:
      if (is_long) return {192, 96, 3, 1, 12, false};
      return {128, 128, 2, 2, 8, false};
    // kLong: three warpgroups read each key once for 192 rows, which is a third less traffic with
    // L2; tile_n 96 serialises at 160 registers; the third stage fits (168 KB); a second Q stage is
    // 2 to 3 % slower from 8k on. kFine: 128 wide so that the diagonal wastes little, two Q stages
    // so that the next tile starts early (192 KB).
    case 128:
      if (is_long) return {192, 80, 3, 1, 12, false};
      return {128, 128, 2, 2, 8, false};
    case 192:
      if (built.head_dim_v == 128)
        // 208 KB. Three warpgroups (192 x 80, 222 KB) are as fast for long full attention, slower
        // elsewhere.
        return {128, 128, 2, 1, 8, false};
      // 216 KB of 227: 128 keys would need 240 KB.
      return {128, score_mod ? 96 : 112, 2, 1, 8, false};
    // 224 KB of 227: 96 keys would need 256 KB.
    case 256: return {128, score_mod ? 64 : 80, 2, 1, 8, false};
  }
  // clang-format on
  return {0, 0, 0, 0, 0, false};
}

// SM80 and SM89: warp w owns 16-row bands, tile_m / num_warps rows in all; P stays in registers.
FA_HD constexpr FwdTileConfig fwd_tile_config(Arch arch, int head_dim) {
  const int built = built_head_dim(head_dim);
  // clang-format off
  switch (arch) {
    case Arch::kSm80:
      switch (built) {
        // 80 KB with 2 stages: two CTAs on an SM of 164 KB. The second stage is worth about 5 %.
        case 64:  return {128, 128, 2, 1, 4, false};
        // 72 KB, two CTAs. A tile_n of 128 needs 224 accumulator registers.
        case 96:  return {128,  64, 2, 1, 4, false};
        // 64 KB, two CTAs. A second stage (96 KB) would leave one CTA of 4 warps on the SM.
        case 128: return {128,  64, 1, 1, 4, false};
        // 72 KB, two CTAs: they hide more of each other's latency than one CTA of 128 rows.
        case 192: return { 64,  64, 1, 1, 4, false};
        // 144 KB. One warp to a row has 16 rows and is bound by shared memory (83 % of its cycles);
        // a pair has 32.
        case 256: return {128,  64, 1, 1, 8, false, 2};
      }
      break;
    case Arch::kSm89:
      switch (built) {
        // 48 KB: two CTAs on an SM of 100 KB.
        case 64:  return {128, 128, 1, 1, 4, false};
        // 48 KB, two CTAs.
        case 96:  return {128,  64, 1, 1, 4, false};
        // 64 KB. Q in registers is read from shared memory once instead of once per step.
        case 128: return {128, 128, 1, 1, 8, true};
        // 96 KB of 99.
        case 192: return {128,  64, 1, 1, 8, false};
        // 96 KB of 99: 128 rows of Q would need 128 KB.
        case 256: return { 64,  64, 1, 1, 4, false};
      }
      break;
    case Arch::kSm90: break;  // sm90_fwd_tile_config()
  }
  // clang-format on
  return {0, 0, 0, 0, 0, false};
}

// The tiles of SM80's kernels on a GPU with the shared memory of `gpu`'s. kSm90: two CTAs of 104 KB
// instead of one of 144 KB, worth 8 % on an H100; else the same as kSm80.
FA_HD constexpr FwdTileConfig sm80_fwd_tile_config(Arch gpu, int head_dim) {
  if (gpu == Arch::kSm90 && built_head_dim(head_dim) == 256) return {64, 64, 1, 1, 4, false, 2};
  return fwd_tile_config(gpu == Arch::kSm90 ? Arch::kSm80 : gpu, head_dim);
}

// Q buffers plus num_stages of K and of V, 2-byte elements. O reuses Q's space, or K's if Q has
// none.
FA_HD constexpr int fwd_smem_bytes(FwdTileConfig c, int head_dim, int head_dim_v) {
  const int kv_bytes = 2 * c.num_stages * c.tile_n * (head_dim + head_dim_v);
  const int q_bytes = 2 * c.num_q_stages * c.tile_m * max(head_dim, head_dim_v);
  const int p_bytes = c.warps_per_row == 2 ? 2 * c.tile_m * c.tile_n : 0;
  return (c.q_in_regs ? max(kv_bytes, q_bytes) : kv_bytes + q_bytes) + p_bytes;
}

// SM90: columns come in slabs of 64. Behind the buffers lie mbarriers and the tiles' coordinates.
constexpr int kFwdBarrierBytes = 1024;
FA_HD constexpr int sm90_fwd_smem_bytes(FwdTileConfig c, BuiltHeadDims built) {
  return fwd_smem_bytes(c, round_up(built.head_dim, 64), round_up(built.head_dim_v, 64)) +
         kFwdBarrierBytes;
}

FA_HD constexpr int fwd_compute_threads(FwdTileConfig c) {
  return c.num_warps * kWarpSize;
}
FA_HD constexpr int fwd_num_threads(Arch arch, FwdTileConfig c) {
  return fwd_compute_threads(c) + (arch == Arch::kSm90 ? kWarpgroupSize : 0);
}

// fp32 registers of a computing thread that hold S and O.
FA_HD constexpr int fwd_accum_regs(FwdTileConfig c, int head_dim_v) {
  return c.tile_m * (c.tile_n + head_dim_v) / fwd_compute_threads(c);
}
// The same with P, two elements to a register, while S still lives (wgmma reads P late), and with Q
// where it stays in registers.
FA_HD constexpr int fwd_operand_regs(FwdTileConfig c, int head_dim) {
  const int p = c.tile_m * c.tile_n / 2 / fwd_compute_threads(c);
  const int q = c.q_in_regs ? c.tile_m * head_dim / 2 / fwd_compute_threads(c) : 0;
  return p + q;
}

// Registers of SM90's roles, set with setmaxnreg: the launch gives every thread the same number,
// the producer gives most of its own back. Multiples of 8.
struct WarpgroupRegisters {
  int at_launch, producer, consumer;
};
FA_HD constexpr WarpgroupRegisters warpgroup_registers(int num_consumer_warpgroups) {
  switch (num_consumer_warpgroups) {
    case 1: return {kMaxRegistersPerThread, 56, 256};
    case 2: return {168, 24, 240};
    case 3: return {128, 32, 160};
    case 4: return {96, 32, 112};
  }
  return {0, 0, 0};
}

struct BwdTileConfig {
  int tile_m, tile_n;    // rows of Q and dO per step, rows of K and V that a CTA keeps
  int num_q_stages;      // Q buffers
  int num_dout_stages;   // dO buffers; pairs: of parts of 128 columns
  int num_ds_stages;     // P or dS buffers, [tile_m, tile_n]
  int num_warps;         // that compute; SM90 adds a producer warpgroup and one for dQ
  bool v_in_regs;        // V passes through Q's and dO's buffers and keeps none
  bool dq_through_smem;  // dQ is staged in fp32 for a bulk reduction; else added from registers
  int num_ctas = 1;      // 2: pairs of CTAs, half of the keys each
};

// K and V stay, Q and dO stream: dK and dV are complete in one CTA, dQ is added up in global
// memory.
FA_HD constexpr BwdTileConfig bwd_tile_config(Arch arch, int head_dim) {
  const int built = built_head_dim(head_dim);
  // clang-format off
  switch (arch) {
    // Half of the warps own dV, the other half dK, tile_n / (num_warps / 2) keys to a warp: the
    // more keys, the less shared memory traffic. P and dS share a buffer, of which there are two.
    case Arch::kSm80:
      switch (built) {
        // 160 KB. 32 keys and 64 queries a warp, twice a step; 64 x 128 is 10 % slower on an H100.
        case 64:  return {128, 128, 2, 2, 2, 8, false, false};
        case 96:  return { 64, 128, 2, 2, 2, 8, false, false};  // 128 KB; 128 rows need 208 KB
        case 128: return { 64, 128, 2, 2, 2, 8, false, false};  // 160 KB
        case 192: return { 64,  64, 2, 2, 2, 8, false, false};  // 160 KB; 128 keys: 192 regs
        // 136 KB. 64 rows fit with one stage only, and waiting for it costs 8 % on an H100.
        case 256: return { 32,  64, 2, 2, 2, 8, false, false};
      }
      break;
    case Arch::kSm89:  // one CTA to an SM of 100 KB, so 8 warps where two stages of 32 keys fit
      switch (built) {
        case 64:  return { 64, 128, 2, 2, 2, 8, false, false};  // 96 KB
        case 96:  return { 64,  64, 2, 2, 2, 8, false, false};  // 88 KB; 128 keys need 128 KB
        case 128: return { 32,  64, 2, 2, 2, 8, false, false};  // 72 KB; 64 rows need 112 KB
        case 192: return { 32,  64, 1, 1, 2, 8, false, false};  // 80 KB; two stages need 104 KB
        case 256: return { 32,  32, 1, 1, 2, 4, false, false};  // 68 KB; a warp needs 16 keys
      }
      break;
    case Arch::kSm90:
      switch (built) {
        // Three and four stages of Q and dO: with two, S of the next block waits for TMA, 20 % at
        // d 64. 128 x 128 is equal at best. 147 KB.
        case 64:  return {64, 128, 4, 4, 2, 8, false, true};
        // Rows of 192 bytes take 256 of shared memory. 218 KB.
        case 96:  return {64, 128, 3, 3, 2, 8, false, true};
        // 226 KB. 80 rows need 16 registers more than there are.
        case 128: return {64, 128, 3, 3, 2, 8, false, true};
        // Pairs of CTAs, 218 and 225 KB each. dO is two parts, of 192 columns 128 and 64.
        case 192: return {64, 128, 2, 4, 2, 8, false, false, 2};
        case 256: return {64, 128, 2, 3, 2, 8, false, false, 2};
      }
      break;
  }
  // clang-format on
  return {0, 0, 0, 0, 0, 0, false, false};
}

// The tiles of SM80's kernels on a GPU with the shared memory of `gpu`'s. kSm90: two CTAs of 4
// warps hide the begin and the end of each other, 8 % at d 64 and 5 % at d 96 on an H100; else the
// same as kSm80, whose shared memory holds one of them only.
FA_HD constexpr BwdTileConfig sm80_bwd_tile_config(Arch gpu, int head_dim) {
  const int built = built_head_dim(head_dim);
  if (gpu == Arch::kSm90 && built == 64) return {64, 128, 2, 2, 2, 4, false, false};  // 96 KB
  if (gpu == Arch::kSm90 && built == 96) return {64, 64, 2, 2, 2, 4, false, false};   // 88 KB
  return bwd_tile_config(gpu == Arch::kSm90 ? Arch::kSm80 : gpu, head_dim);
}

// Whether SM80's backward has a kernel that writes dQ at once where one tile has all keys, instead
// of adding it up in fp32: 1.4 times as fast for sequences of 128. Two sizes, for the time of
// compiling.
FA_HD constexpr bool sm80_bwd_completes_dq(Arch gpu, int head_dim) {
  const int built = built_head_dim(head_dim);
  return gpu != Arch::kSm89 && (built == 64 || built == 128);
}

// Whether SM90's backward has a kernel in which the last tile of keys to add to a tile of queries
// writes dQ. Pairs add from registers and would wait there: 10 to 19 % slower at 1k and 2k.
FA_HD constexpr bool sm90_bwd_completes_dq(int head_dim) {
  return built_head_dim(head_dim) <= 128;
}

// K, V, the streamed Q and dO, dS, and fp32 dQ if staged; 2-byte elements. A CTA of a pair has half
// of the keys, 128 columns of the other half's K, and dS of both.
FA_HD constexpr int bwd_smem_bytes(BwdTileConfig c, int head_dim) {
  if (c.num_ctas == 2) {
    const int keys = c.tile_n / 2;
    const int kept = 2 * keys * head_dim + keys * 128;
    const int streamed = c.tile_m * (c.num_q_stages * head_dim + c.num_dout_stages * 128);
    return 2 * (kept + streamed + 2 * c.num_ds_stages * c.tile_m * keys);
  }
  const int kept = (c.v_in_regs ? 1 : 2) * c.tile_n * head_dim;
  const int streamed = (c.num_q_stages + c.num_dout_stages) * c.tile_m * head_dim;
  const int ds = c.num_ds_stages * c.tile_m * c.tile_n;
  const int dq = c.dq_through_smem ? 2 * c.tile_m * head_dim : 0;  // fp32: two 2-byte elements
  return 2 * (kept + streamed + ds + dq);
}
constexpr int kBwdBarrierBytes = 512;

// LSE and delta of the rows of a step, fp32. SM80: two stages, SM90: as many as of Q.
FA_HD constexpr int bwd_statistics_bytes(Arch arch, BwdTileConfig c) {
  return (arch == Arch::kSm90 ? c.num_q_stages : 2) * 2 * 4 * c.tile_m;
}

// All of a CTA of SM90's kernel, in whose shared memory rows are whole slabs of 64 elements.
FA_HD constexpr int sm90_bwd_smem_bytes(BwdTileConfig c, int head_dim) {
  const int dq_padding = c.dq_through_smem ? 4 * c.tile_m * (round_up(head_dim, 64) - head_dim) : 0;
  return bwd_smem_bytes(c, round_up(head_dim, 64)) - dq_padding +
         bwd_statistics_bytes(Arch::kSm90, c) + kBwdBarrierBytes;
}

// SM90 adds a producer warpgroup and one for dQ.
FA_HD constexpr int bwd_num_threads(Arch arch, BwdTileConfig c) {
  return c.num_warps * kWarpSize + (arch == Arch::kSm90 ? 2 * kWarpgroupSize : 0);
}

// Registers of the roles of SM90's backward with two consumer warpgroups, as WarpgroupRegisters.
struct BwdRegisters {
  int at_launch, producer, dq, consumer;
};
FA_HD constexpr BwdRegisters sm90_bwd_registers(int head_dim) {
  // d 96: the sums of dQ are 48 registers, 32 elsewhere.
  return head_dim == 96 ? BwdRegisters{128, 32, 80, 200} : BwdRegisters{128, 32, 64, 208};
}

// fp32 registers of a computing thread: dK and dV always, and S with dP, or dQ once those are used.
FA_HD constexpr int bwd_accum_regs(BwdTileConfig c, int head_dim) {
  const int threads = c.num_warps * kWarpSize, keys = c.tile_n / c.num_ctas;
  const int kept = 2 * keys * head_dim / threads;
  return kept + max(2 * c.tile_m * keys, c.tile_m * head_dim) / threads;
}

// What every row must satisfy.
FA_HD constexpr bool fwd_config_fits(Arch arch, FwdTileConfig c, int head_dim, int head_dim_v) {
  const bool sm90 = arch == Arch::kSm90;
  const int rows_per_warp = 16;  // of mma.m16n8k16, and of a warp in wgmma.m64nNk16
  const bool tiles = c.tile_m > 0 && c.tile_n % 16 == 0 && c.tile_n <= 256 &&
                     (sm90 ? c.tile_m == rows_per_warp * c.num_warps
                           : c.tile_m * c.warps_per_row % (rows_per_warp * c.num_warps) == 0);
  const int smem = sm90 ? sm90_fwd_smem_bytes(c, {head_dim, head_dim_v})
                        : fwd_smem_bytes(c, head_dim, head_dim_v);
  const int regs = fwd_accum_regs(c, head_dim_v) + (sm90 ? fwd_operand_regs(c, head_dim) : 0);
  const int max_regs = sm90 ? warpgroup_registers(c.num_warps / 4).consumer - 32 : 200;
  return tiles && smem <= max_smem_bytes(arch) && regs <= max_regs;
}
FA_HD constexpr bool sm90_fwd_configs_fit(Sm90FwdTile which) {
  const int sizes[] = {64, 96, 128, 192, 256};
  for (int built : sizes) {
    const FwdTileConfig c = sm90_fwd_tile_config({built, built}, which);
    if (!fwd_config_fits(Arch::kSm90, c, built, built)) return false;
    if (which == Sm90FwdTile::kScoreMod && c.tile_n % 32 != 0) return false;
  }
  return fwd_config_fits(Arch::kSm90, sm90_fwd_tile_config({192, 128}, which), 192, 128);
}
FA_HD constexpr bool bwd_config_fits(Arch arch, BwdTileConfig c, int head_dim) {
  const bool sm90 = arch == Arch::kSm90;
  const bool tiles = c.tile_m > 0 && c.tile_m % 16 == 0 && c.tile_n % 16 == 0;
  const int smem = sm90 ? sm90_bwd_smem_bytes(c, head_dim)
                        : bwd_smem_bytes(c, head_dim) + bwd_statistics_bytes(arch, c);
  const int max_regs = sm90 ? warpgroup_registers(c.num_warps / 4).consumer - 16 : 200;
  return tiles && smem <= max_smem_bytes(arch) && bwd_accum_regs(c, head_dim) <= max_regs;
}
FA_HD constexpr bool all_configs_fit(Arch arch) {
  for (int head_dim = 1; head_dim <= kMaxHeadDim; ++head_dim) {
    const int built = built_head_dim(head_dim);
    if (arch != Arch::kSm90 &&
        !fwd_config_fits(arch, fwd_tile_config(arch, head_dim), built, built))
      return false;
    if (!bwd_config_fits(arch, bwd_tile_config(arch, head_dim), built)) return false;
  }
  return true;
}
// setmaxnreg moves registers inside the pool that the launch allocated.
FA_HD constexpr bool warpgroup_registers_fit(int num_consumer_warpgroups) {
  const WarpgroupRegisters regs = warpgroup_registers(num_consumer_warpgroups);
  const int warpgroups = num_consumer_warpgroups + 1;
  return regs.at_launch * warpgroups * kWarpgroupSize <= kRegistersPerSm &&
         regs.producer % 8 == 0 && regs.consumer % 8 == 0 &&
         (regs.producer + num_consumer_warpgroups * regs.consumer) * kWarpgroupSize <=
             round_up(regs.at_launch, 8) * warpgroups * kWarpgroupSize;
}

FA_HD constexpr bool bwd_registers_fit(BwdRegisters regs) {
  return regs.at_launch * 4 * kWarpgroupSize <= kRegistersPerSm &&
         regs.producer + regs.dq + 2 * regs.consumer <= 4 * regs.at_launch;
}

static_assert(all_configs_fit(Arch::kSm80));
static_assert(all_configs_fit(Arch::kSm89));
static_assert(all_configs_fit(Arch::kSm90));
static_assert(2 * (fwd_smem_bytes(sm80_fwd_tile_config(Arch::kSm90, 256), 256, 256) + 2048) <=
              max_smem_bytes(Arch::kSm90));  // two CTAs, 1 KB of static memory and 1 KB of CUDA's
static_assert(sm90_fwd_configs_fit(Sm90FwdTile::kLong) &&
              sm90_fwd_configs_fit(Sm90FwdTile::kFine) &&
              sm90_fwd_configs_fit(Sm90FwdTile::kScoreMod));
static_assert(warpgroup_registers_fit(1) && warpgroup_registers_fit(2) &&
              warpgroup_registers_fit(3) && warpgroup_registers_fit(4));
static_assert(bwd_registers_fit(sm90_bwd_registers(96)) &&
              bwd_registers_fit(sm90_bwd_registers(128)) &&
              bwd_registers_fit(sm90_bwd_registers(256)));

// Decode: a CTA streams blocks of keys through a ring of units, a unit being the keys or the values
// of a block. Rows are query heads of one KV head and their queries.
constexpr int kDecodeFewRows = 16;   // every warp has all rows and its own keys of a block
constexpr int kDecodeManyRows = 64;  // each of four warps has 16 rows and all keys
constexpr int kDecodeMaxCtas = 768;  // of one launch: four on each of 192 SMs

// What an SM holds of mma.sync's kernels at a time. Few and many tiles: beside the number of SMs.
// Numbers: docs/performance/decode.md, "Wide and small CTAs".
enum class DecodeCtas {
  kDeep,   // two CTAs, or one on a GPU of 100 KB, with 98 KB each
  kSmall,  // four, each with a ring of two units, 37 to 54 KB; SM90, few rows, many tiles
  kWide,   // one of eight warps, with 196 KB; SM90, few rows, few tiles
};
struct DecodeConfig {
  int tile_n;  // keys of a block
  int num_warps;
  int num_units;    // of the ring
  int ctas_per_sm;  // at most; registers are bounded so that they have room
  FA_HD constexpr int num_threads() const { return 32 * num_warps; }
};
FA_HD constexpr DecodeConfig decode_config(int head_dim, DecodeCtas ctas) {
  // clang-format off
  switch (built_head_dim(head_dim)) {
    case 64:
      if (ctas == DecodeCtas::kSmall) return {128, 4, 2, 4};
      if (ctas == DecodeCtas::kWide) return {256, 8, 5, 1};
      return {64, 4, 10, 2};
    case 96:
      if (ctas == DecodeCtas::kSmall) return {64, 2, 2, 4};
      if (ctas == DecodeCtas::kWide) return {256, 8, 3, 1};
      return {64, 4, 6, 2};
    case 128:
      if (ctas == DecodeCtas::kSmall) return {64, 2, 2, 4};
      if (ctas == DecodeCtas::kWide) return {128, 8, 4, 1};
      return {64, 4, 4, 2};
    case 192:
      if (ctas == DecodeCtas::kSmall) return {64, 2, 2, 4};
      return {64, 4, 3, 2};
    case 256: return {64, 4, 2, 2};
  }
  // clang-format on
  return {0, 0, 0, 0};
}

// Whether a launch has few tiles or many, which other CTAs, or blocks, suit.
enum class DecodeTiles { kMany, kFew };
// SM90's CTAs for few rows.
FA_HD constexpr DecodeCtas sm90_decode_ctas(int head_dim, DecodeTiles tiles) {
  const int built = built_head_dim(head_dim);
  if (tiles == DecodeTiles::kMany) return built < 256 ? DecodeCtas::kSmall : DecodeCtas::kDeep;
  return built < 192 ? DecodeCtas::kWide : DecodeCtas::kDeep;
}

// Many rows on SM90: wgmma, one CTA to an SM. Few tiles are cut into parts of few blocks, where
// small blocks begin earlier: 128 x 64 is 1 to 9 % faster for one sequence on an H200, 8 % slower
// where products are the limit. tile_m 0: not built for this head_dim.
constexpr int kDecodeWgmmaRows = 128;
FA_HD constexpr FwdTileConfig sm90_decode_tile_config(int head_dim, DecodeTiles tiles) {
  // clang-format off
  switch (built_head_dim(head_dim)) {
    case 64:  return {kDecodeWgmmaRows, 128, 5, 1, 8, false};  // 176 KB
    case 128:
      if (tiles == DecodeTiles::kFew) return {kDecodeWgmmaRows, 64, 4, 1, 8, false};
      return {kDecodeWgmmaRows, 128, 2, 1, 8, false};  // 160 KB, both
  }
  // clang-format on
  return {0, 0, 0, 0, 0, false};
}
FA_HD constexpr int sm90_decode_smem_bytes(int head_dim, DecodeTiles tiles) {
  const int built = built_head_dim(head_dim);
  return sm90_fwd_smem_bytes(sm90_decode_tile_config(head_dim, tiles), {built, built});
}
FA_HD constexpr bool sm90_decode_config_fits(int head_dim, DecodeTiles tiles) {
  return fwd_config_fits(Arch::kSm90, sm90_decode_tile_config(head_dim, tiles), head_dim, head_dim);
}
static_assert(sm90_decode_config_fits(64, DecodeTiles::kMany) &&
              sm90_decode_config_fits(128, DecodeTiles::kMany) &&
              sm90_decode_config_fits(128, DecodeTiles::kFew));
// Pages that its TMA copies take: a box has 16 rows at least, and never parts of two pages.
constexpr int kDecodeMinBoxRows = 16;
FA_HD constexpr bool sm90_decode_takes_pages(int page_size, int tile_n) {
  return page_size % tile_n == 0 ||
         (page_size >= kDecodeMinBoxRows && tile_n % page_size == 0);  // 0: no pages
}

// Up to 128, the ring runs on into the next tile while the results of one leave; beyond, they leave
// through the ring, and Q, which has no room in registers, has a place of its own.
FA_HD constexpr bool decode_runs_ahead(int head_dim) {
  return built_head_dim(head_dim) <= 128;
}
// A row of results in fp32: the sums, their maximum, their sum of weights, and words that keep rows
// in different banks.
FA_HD constexpr int decode_result_words(int head_dim) {
  return built_head_dim(head_dim) + 8;
}
FA_HD constexpr int decode_ring_bytes(int head_dim, DecodeCtas ctas) {
  const DecodeConfig config = decode_config(head_dim, ctas);
  return config.num_units * config.tile_n * 2 * built_head_dim(head_dim);
}
// Dynamic shared memory of a CTA. Results: a row for each of 16 rows of each warp.
FA_HD constexpr int decode_smem_bytes(int head_dim, int tile_m, DecodeCtas ctas) {
  const int rows = 16 * decode_config(head_dim, ctas).num_warps;
  const int results = rows * decode_result_words(head_dim) * 4;
  const int ring = decode_ring_bytes(head_dim, ctas);
  return decode_runs_ahead(head_dim) ? ring + results
                                     : max(results, ring + tile_m * 2 * built_head_dim(head_dim));
}
// 4-byte words of global memory that a launch needs: results of two tiles for each CTA
// (core/decode_schedule.h), and a counter for each; of kDecodeWgmmaRows, what the two tiles are.
constexpr int kDecodeItemWords = 40;
FA_HD constexpr int64_t decode_partial_words(int num_ctas, int tile_m, int head_dim) {
  return int64_t{2} * num_ctas * tile_m * decode_result_words(head_dim);
}
FA_HD constexpr int64_t decode_workspace_words(int num_ctas, int tile_m, int head_dim) {
  const int for_a_cta = tile_m == kDecodeWgmmaRows ? 2 * kDecodeItemWords : 1;
  return decode_partial_words(num_ctas, tile_m, head_dim) + num_ctas * for_a_cta;
}

}  // namespace fa
