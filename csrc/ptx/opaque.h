// A value that the compiler knows nothing about.
#pragma once
#include "core/host_device.h"

namespace fa::ptx {

// x, hidden: what is derived from it cannot be computed once, ahead of the caller's loop, where it
// would fill registers throughout.
FA_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace fa::ptx
