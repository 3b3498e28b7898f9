// A value that the compiler knows nothing about.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace fa::ptx {

// x, hidden: what is derived from it cannot be computed once, ahead of the caller's loop, where it
// would fill registers throughout.
FA_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Here x has been computed: the compiler may not do so behind a wait that follows.
FA_DEVICE void pin(uint32_t (&x)[4]) {
  asm volatile("" : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])::"memory");
}

}  // namespace fa::ptx
