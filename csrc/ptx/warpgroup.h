// Warpgroups: four warps that issue wgmma together and share out their registers.
//
// PTX ISA, "Miscellaneous Instructions: setmaxnreg". All warps of the warpgroup call it, converged;
// the kernel needs __launch_bounds__ with both numbers, else ptxas ignores it.
#pragma once
#include "core/host_device.h"

namespace fa::ptx {

// Gives back what exceeds kRegisters a thread.
template <int kRegisters>
FA_DEVICE void setmaxnreg_dec() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Waits until kRegisters a thread are there; the new ones are undefined.
template <int kRegisters>
FA_DEVICE void setmaxnreg_inc() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Which warpgroup of the CTA this thread is in, in a way that shows that a warp agrees on it.
FA_DEVICE int warpgroup_index() {
  return __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupSize, 0);
}

}  // namespace fa::ptx
