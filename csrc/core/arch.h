// The architectures that kernels are written for, and what one SM of each offers.
//
// An Arch names a kernel library (_sm80, _sm89, _sm90) and a set of tile sizes. GPUs without a
// library of their own run an older one: kSm80's code, also as PTX, serves every GPU from compute
// capability 8.0 on.
#pragma once
#include "core/host_device.h"

namespace fa {

enum class Arch { kSm80, kSm89, kSm90 };

constexpr int kNumArchs = 3;

FA_HD constexpr const char* arch_name(Arch arch) {
  switch (arch) {
    case Arch::kSm80: return "sm80";
    case Arch::kSm89: return "sm89";
    case Arch::kSm90: return "sm90";
  }
  return "unknown";
}

// Shared memory that one CTA may use after opting in: the SM's, less 1 KB that CUDA reserves.
// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
constexpr int kSmemBytes163 = 163 * 1024;  // 8.0
constexpr int kSmemBytes99 = 99 * 1024;    // 8.6, 8.9, 12.0
constexpr int kSmemBytes227 = 227 * 1024;  // 9.0, 10.0

FA_HD constexpr int max_smem_bytes(Arch arch) {
  switch (arch) {
    case Arch::kSm80: return kSmemBytes163;
    case Arch::kSm89: return kSmemBytes99;
    case Arch::kSm90: return kSmemBytes227;
  }
  return 0;
}

constexpr int kRegistersPerSm = 65536;       // 32-bit, all architectures here
constexpr int kMaxRegistersPerThread = 255;  // without setmaxnreg, which allows 256

}  // namespace fa
