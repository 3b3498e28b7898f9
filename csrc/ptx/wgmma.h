// Tensor core products of a warpgroup: d += a b, d 64 x n in fp32, a 64 x 16, b 16 x n.
//
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions: wgmma". All four warps issue the same
// instructions, converged. They run asynchronously: between issue and the wait for their group
// nobody touches d or, if a is in registers, a. Where the registers of d lie: core/accum_layout.h.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/host_device.h"

namespace fa::ptx {

// Before the first product, and behind every write to registers of d or a.
FA_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes the group of the products issued so far.
FA_DEVICE void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending of the last groups are under way.
template <int kPending>
FA_DEVICE void wgmma_wait_group() {
  static_assert(0 <= kPending && kPending <= 7);
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses to d across this point: it does not know that the
// asynchronous products write it. No instruction.
template <int kN>
FA_DEVICE void wgmma_fence_operand(float (&d)[kN][4]) {
  FA_UNROLL
  for (auto& column : d) {
    FA_UNROLL
    for (float& x : column) asm volatile("" : "+f"(x)::"memory");
  }
}

// Operand lists: registers %0 .. %(count - 1), and d of n = 2 * count columns.
// clang-format off
#define FA_REGS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FA_REGS_40 \
  FA_REGS_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39"
#define FA_REGS_48 \
  FA_REGS_40 ", " \
  "%40, %41, %42, %43, %44, %45, %46, %47"
#define FA_REGS_56 \
  FA_REGS_48 ", " \
  "%48, %49, %50, %51, %52, %53, %54, %55"
#define FA_REGS_64 \
  FA_REGS_56 ", " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define FA_REGS_96 \
  FA_REGS_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FA_REGS_128 \
  FA_REGS_96 ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FA_ACCUM(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define FA_ACCUM_32 \
  FA_ACCUM(0), FA_ACCUM(1), FA_ACCUM(2), FA_ACCUM(3), \
  FA_ACCUM(4), FA_ACCUM(5), FA_ACCUM(6), FA_ACCUM(7)
#define FA_ACCUM_40 \
  FA_ACCUM_32, \
  FA_ACCUM(8), FA_ACCUM(9)
#define FA_ACCUM_48 \
  FA_ACCUM_40, \
  FA_ACCUM(10), FA_ACCUM(11)
#define FA_ACCUM_56 \
  FA_ACCUM_48, \
  FA_ACCUM(12), FA_ACCUM(13)
#define FA_ACCUM_64 \
  FA_ACCUM_56, \
  FA_ACCUM(14), FA_ACCUM(15)
#define FA_ACCUM_96 \
  FA_ACCUM_64, \
  FA_ACCUM(16), FA_ACCUM(17), FA_ACCUM(18), FA_ACCUM(19), \
  FA_ACCUM(20), FA_ACCUM(21), FA_ACCUM(22), FA_ACCUM(23)
#define FA_ACCUM_128 \
  FA_ACCUM_96, \
  FA_ACCUM(24), FA_ACCUM(25), FA_ACCUM(26), FA_ACCUM(27), \
  FA_ACCUM(28), FA_ACCUM(29), FA_ACCUM(30), FA_ACCUM(31)
// clang-format on

// One product for each n. a, b, p: numbers of the operands behind d's registers.
#define FA_WGMMA_SS(n, count, types, a, b, p)                                               \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p                                        \
               ", 0;\n"                                                                     \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." types " {" FA_REGS_##count \
               "}, " a ", " b ", p, 1, 1, 0, 0;\n}"                                         \
               : FA_ACCUM_##count                                                           \
               : "l"(a_desc), "l"(b_desc), "r"(static_cast<int>(accumulate)))
#define FA_WGMMA_RS(n, count, types, a0, a1, a2, a3, b)                            \
  asm volatile(                                                                    \
      "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                   \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." types " {" FA_REGS_##count \
      "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b ", p, 1, 1, 1;\n}"                 \
      : FA_ACCUM_##count                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc))

// The same where k runs along the rows of a and b in shared memory, where it runs along the rows of
// b only, and where b of a product with a in registers has consecutive k.
#define FA_WGMMA_SS_MN(n, count, types, a, b, p)                                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p                                        \
               ", 0;\n"                                                                     \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." types " {" FA_REGS_##count \
               "}, " a ", " b ", p, 1, 1, 1, 1;\n}"                                         \
               : FA_ACCUM_##count                                                           \
               : "l"(a_desc), "l"(b_desc), "r"(static_cast<int>(accumulate)))
#define FA_WGMMA_SS_AB(n, count, types, a, b)                                      \
  asm volatile(                                                                    \
      "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                   \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." types " {" FA_REGS_##count \
      "}, " a ", " b ", p, 1, 1, 0, 1;\n}"                                         \
      : FA_ACCUM_##count                                                           \
      : "l"(a_desc), "l"(b_desc))
#define FA_WGMMA_RS_K(n, count, types, a0, a1, a2, a3, b, p)                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " p                                        \
               ", 0;\n"                                                                     \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." types " {" FA_REGS_##count \
               "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b ", p, 1, 1, 0;\n}"                 \
               : FA_ACCUM_##count                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc),                   \
                 "r"(static_cast<int>(accumulate)))

// Expands `product(n, count, types, first operand numbers)` for each element type and n = 8 kN.
#define FA_WGMMA_OF_TYPE(product, n, count, ...) \
  if constexpr (std::is_same_v<T, __half>) {     \
    product(n, count, "f16.f16", __VA_ARGS__);   \
  } else {                                       \
    product(n, count, "bf16.bf16", __VA_ARGS__); \
  }

// a and b from shared memory, both with consecutive k; d = a b if not accumulate. Descriptors:
// tile/smem_tile_sm90.h.
template <class T, int kN>
FA_DEVICE void wgmma_m64k16_ss(float (&d)[kN][4], uint64_t a_desc, uint64_t b_desc,
                               bool accumulate) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (kN == 8) {
    FA_WGMMA_OF_TYPE(FA_WGMMA_SS, 64, 32, "%32", "%33", "%34")
  } else if constexpr (kN == 10) {
    FA_WGMMA_OF_TYPE(FA_WGMMA_SS, 80, 40, "%40", "%41", "%42")
  } else if constexpr (kN == 12) {
    FA_WGMMA_OF_TYPE(FA_WGMMA_SS, 96, 48, "%48", "%49", "%50")
  } else if constexpr (kN == 14) {
    FA_WGMMA_OF_TYPE(FA_WGMMA_SS, 112, 56, "%56", "%57", "%58")
  } else {
    static_assert(kN == 16, "write the operand list of this n");
    FA_WGMMA_OF_TYPE(FA_WGMMA_SS, 128, 64, "%64", "%65", "%66")
  }
}

// a from registers (a_operand_coord()), b from shared memory with consecutive columns.
template <class T, int kN>
FA_DEVICE void wgmma_m64k16_rs(float (&d)[kN][4], const uint32_t (&a)[4], uint64_t b_desc) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (kN == 8) {
    FA_WGMMA_OF_TYPE(FA_WGMMA_RS, 64, 32, "%32", "%33", "%34", "%35", "%36")
  } else if constexpr (kN == 12) {
    FA_WGMMA_OF_TYPE(FA_WGMMA_RS, 96, 48, "%48", "%49", "%50", "%51", "%52")
  } else if constexpr (kN == 16) {
    FA_WGMMA_OF_TYPE(FA_WGMMA_RS, 128, 64, "%64", "%65", "%66", "%67", "%68")
  } else if constexpr (kN == 24) {
    FA_WGMMA_OF_TYPE(FA_WGMMA_RS, 192, 96, "%96", "%97", "%98", "%99", "%100")
  } else {
    static_assert(kN == 32, "write the operand list of this n");
    FA_WGMMA_OF_TYPE(FA_WGMMA_RS, 256, 128, "%128", "%129", "%130", "%131", "%132")
  }
}

// Of the backward: wgmma_fence_operand() without loops, which the compiler leaves rolled in places,
// with d in local memory.
template <int kN>
FA_DEVICE void wgmma_pin(float (&d)[kN][4]) {
  static_assert(kN == 8 || kN == 12 || kN == 16, "write the operand list of this n");
  if constexpr (kN == 8) asm volatile("" : FA_ACCUM_32::"memory");
  if constexpr (kN == 12) asm volatile("" : FA_ACCUM_48::"memory");
  if constexpr (kN == 16) asm volatile("" : FA_ACCUM_64::"memory");
}

// Of the backward: a [64, k] and b [k, n] from shared memory, both with consecutive columns.
template <class T, int kN>
FA_DEVICE void wgmma_m64k16_ss_ab(float (&d)[kN][4], uint64_t a_desc, uint64_t b_desc) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (kN == 8) {
    FA_WGMMA_OF_TYPE(FA_WGMMA_SS_AB, 64, 32, "%32", "%33")
  } else {
    static_assert(kN == 16, "write the operand list of this n");
    FA_WGMMA_OF_TYPE(FA_WGMMA_SS_AB, 128, 64, "%64", "%65")
  }
}

// Of the backward: a [k, 64] and b [k, n] from shared memory, rows of consecutive columns.
template <class T, int kN>
FA_DEVICE void wgmma_m64k16_ss_mn(float (&d)[kN][4], uint64_t a_desc, uint64_t b_desc,
                                  bool accumulate) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  if constexpr (kN == 8) {
    FA_WGMMA_OF_TYPE(FA_WGMMA_SS_MN, 64, 32, "%32", "%33", "%34")
  } else if constexpr (kN == 12) {
    FA_WGMMA_OF_TYPE(FA_WGMMA_SS_MN, 96, 48, "%48", "%49", "%50")
  } else {
    static_assert(kN == 16, "write the operand list of this n");
    FA_WGMMA_OF_TYPE(FA_WGMMA_SS_MN, 128, 64, "%64", "%65", "%66")
  }
}

// Of the backward: a from registers, b [n, k] from shared memory, with consecutive k.
template <class T, int kN>
FA_DEVICE void wgmma_m64k16_rs_k(float (&d)[kN][4], const uint32_t (&a)[4], uint64_t b_desc,
                                 bool accumulate) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  static_assert(kN == 8, "write the operand list of this n");
  FA_WGMMA_OF_TYPE(FA_WGMMA_RS_K, 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
}

#undef FA_WGMMA_OF_TYPE
#undef FA_WGMMA_RS_K
#undef FA_WGMMA_SS_AB
#undef FA_WGMMA_SS_MN
#undef FA_WGMMA_RS
#undef FA_WGMMA_SS
#undef FA_ACCUM_128
#undef FA_ACCUM_96
#undef FA_ACCUM_64
#undef FA_ACCUM_56
#undef FA_ACCUM_48
#undef FA_ACCUM_40
#undef FA_ACCUM_32
#undef FA_ACCUM
#undef FA_REGS_128
#undef FA_REGS_96
#undef FA_REGS_64
#undef FA_REGS_56
#undef FA_REGS_48
#undef FA_REGS_40
#undef FA_REGS_32

}  // namespace fa::ptx
