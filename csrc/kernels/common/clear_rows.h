// Zeros for rows of a head that nothing else writes.
#pragma once
#include "core/mask.h"
#include "ptx/global_memory.h"

namespace fa {

// A warp takes a row; `thread` of kThreads. num_cols <= 256.
template <int kThreads, class T>
FA_DEVICE void clear_rows(T* head, int64_t token_stride, Range rows, int num_cols,
                          unsigned thread) {
  const int column = static_cast<int>(thread % kWarpSize) * 8;
  for (int row = rows.begin + thread / kWarpSize; row < rows.end; row += kThreads / kWarpSize)
    if (column < num_cols) ptx::st_global_v4(head + row * token_stride + column, uint4{});
}

}  // namespace fa
