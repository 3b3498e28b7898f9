// Where lse of row 0 of a sequence lies.
#pragma once
#include "core/params.h"

namespace fa {

// first_row: of the sequence in the tensor (varlen), else 0.
FA_HD float* lse_rows(const FwdParams& p, int batch, int head, int64_t first_row) {
  if (p.seqlens_q.cu_seqlens != nullptr)
    return p.lse + static_cast<int64_t>(head) * p.total_q + first_row;
  return p.lse + (static_cast<int64_t>(batch) * p.num_heads_q + head) * p.seqlens_q.max_seqlen;
}

}  // namespace fa
