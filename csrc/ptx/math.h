// Math of one instruction each; the approximations as ftz, so that ptxas adds no denormal handling.
//
// PTX ISA, "Floating Point Instructions: ex2, lg2, rcp, tanh, fma".
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

// a b + c, clamped to [0, 1]; NaN becomes 0.
FA_DEVICE float fma_saturate(float a, float b, float c) {
  float y;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(y) : "f"(a), "f"(b), "f"(c));
  return y;
}

}  // namespace fa::ptx
