// Approximate math in one instruction each; ftz variants, so that ptxas adds no denormal handling.
//
// PTX ISA, "Floating Point Instructions: ex2, lg2, rcp, tanh".
#pragma once
#include "core/host_device.h"

namespace fa::ptx {

// 2^x; ex2(-inf) = 0, NaN stays NaN.
FA_DEVICE float ex2_approx_ftz(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x); lg2(0) = -inf, NaN stays NaN.
FA_DEVICE float lg2_approx_ftz(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to 1 ulp; rcp(0) = inf. The IEEE division brings a slow path with it.
FA_DEVICE float rcp_approx_ftz(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh(x) to a relative error of 2^-11.
FA_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fa::ptx
