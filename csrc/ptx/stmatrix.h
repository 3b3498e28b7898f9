// Stores four 8 x 8 matrices of 16-bit elements from the registers of a warp to shared memory.
//
// PTX ISA, "Warp-level matrix store instruction: stmatrix" (compute capability 9.0). The mirror
// image of ldmatrix: lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned to
// 16); register i of lane l holds elements (l / 4, 2 (l % 4) + {0, 1}) of matrix i. All lanes take
// part.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace fa::ptx {

FA_DEVICE void stmatrix_x4(uint32_t smem, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace fa::ptx
