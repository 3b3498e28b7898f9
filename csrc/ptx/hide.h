// No instruction at all: hides from the compiler what a register holds.
#pragma once
#include "core/host_device.h"

namespace fa::ptx {

// What follows from x can not be computed ahead of this point, such as in front of a loop, where it
// would occupy registers for as long as the loop runs.
FA_DEVICE void hide_value(int& x) {
  asm volatile("" : "+r"(x));
}

}  // namespace fa::ptx
