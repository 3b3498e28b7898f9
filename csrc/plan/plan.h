// make_plan: which kernel computes a problem on a GPU, how it is launched, and why faster ones were
// refused.
//
// Pure: integers in, integers and sentences out; no GPU, no environment, no floating point, so the
// same question has the same answer on every machine. "Supported" means "make_plan returns a plan":
// there is no second list of limits.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/tile_config.h"
#include "plan/problem.h"
#include "plan/registry.h"

namespace fa {

// The kernel libraries that are present (or that FLASH_ATTN_EXT_ARCH leaves).
class ArchSet {
 public:
  constexpr ArchSet() = default;
  static constexpr ArchSet all() { return ArchSet((1u << kNumArchs) - 1); }
  constexpr ArchSet with(Arch arch) const { return ArchSet(bits_ | 1u << static_cast<int>(arch)); }
  constexpr bool contains(Arch arch) const { return bits_ >> static_cast<int>(arch) & 1u; }
  std::string to_string() const;  // "sm80, sm90"; "none"

 private:
  explicit constexpr ArchSet(unsigned bits) : bits_(bits) {}
  unsigned bits_ = 0;
};

struct Plan {
  int instance = -1;         // Instance::id, which has the kernel's name
  Arch arch = Arch::kSm80;   // its library
  Arch tiles = Arch::kSm80;  // attention: rows of core/tile_config.h; others: arch
  Sm90FwdTile sm90_tile = Sm90FwdTile::kFine;  // SM90's forward: which of its tiles

  int tile_m = 0;       // rows that one CTA computes; bwd: rows of Q per step
  int tile_n = 0;       // elements of a row, or keys per step (bwd: that it keeps)
  int num_stages = 1;   // buffers in flight
  int num_threads = 0;  // of a CTA
  int64_t num_ctas = 0;
  int num_splits = 1;           // partial results per row
  int head_splits = 1;          // bwd: CTAs that share the query heads of a KV head
  bool complete_dq = false;     // bwd: the kernel writes dQ itself, and what it adds up in need not
                                // be zero
  bool adds_dq = false;         // bwd: several tiles of keys add to dQ, in fp32
  bool vectorized = false;      // rows are read and written 16 bytes at a time; attention: as they
                                // are, else the binder copies what is not aligned or padded
  int smem_bytes = 0;           // dynamic, of a CTA
  int64_t workspace_bytes = 0;  // global memory beside inputs and outputs
};

struct PlanResult {
  bool ok = false;
  Plan plan;                         // meaningful iff ok
  std::vector<std::string> reasons;  // why each library that would be faster was refused; if not
                                     // ok, why each one was, or what is wrong with the problem
};

PlanResult make_plan(const Problem& problem, const DeviceFacts& device, ArchSet built);

// The plan alone, nullopt where make_plan is not ok: what the binder asks at every call. It puts no
// sentence together and allocates nothing.
std::optional<Plan> find_plan(const Problem& problem, const DeviceFacts& device, ArchSet built);

// The fastest library of `built` whose code runs on the device, whatever is to be computed.
std::optional<Arch> find_library(const DeviceFacts& device, ArchSet built);

}  // namespace fa
