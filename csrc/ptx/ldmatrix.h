// Loads four 8 x 8 matrices of 16-bit elements from shared memory into the registers of a warp.
//
// PTX ISA, "Warp-level matrix load instruction: ldmatrix". Lane l gives the address of row l % 8 of
// matrix l / 8 (16 bytes, aligned to 16); register i of lane l receives elements (l / 4,
// 2 (l % 4) + {0, 1}) of matrix i, of its transpose with .trans. All lanes take part.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace fa::ptx {

FA_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}

FA_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem)
               : "memory");
}

}  // namespace fa::ptx
