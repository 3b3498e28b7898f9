// Length and place of one sequence: every read of cu_seqlens, seqused and leftpad, once per tile.
//
// Lengths are int (positions inside a sequence); rows and elements of a tensor are 64-bit.
#pragma once
#include "core/host_device.h"

namespace fa {

// How the sequences of one side (queries or keys) are stored.
struct SeqlenArgs {
  const int* cu_seqlens;  // [batch_size + 1], rows; nullptr: every sequence has max_seqlen rows
  const int* seqused;     // [batch_size], rows in use, from the sequence's begin; nullptr: all
  const int* leftpad;     // [batch_size], rows at the begin that do not count; nullptr: 0
  int max_seqlen;         // rows a sequence may have; without cu_seqlens, the rows it has
  int num_new = 0;        // rows in use behind those of seqused
};

struct SeqlenInfo {
  int seqlen;         // rows that attend; >= 0
  int stored;         // rows that exist from first_row on, those past seqlen included; >= seqlen
  int leftpad;        // rows skipped at the begin
  int64_t first_row;  // first attending row, from the first row of the tensor (varlen) or of this
                      // batch entry (fixed length)
};

// Total: a seqused beyond the storage is cut, a negative length is 0.
FA_HD constexpr SeqlenInfo seqlen_info(SeqlenArgs args, int batch) {
  const int begin = args.cu_seqlens ? args.cu_seqlens[batch] : 0;
  const int stored = args.cu_seqlens ? args.cu_seqlens[batch + 1] - begin : args.max_seqlen;
  const int used = args.seqused ? min(args.seqused[batch] + args.num_new, stored) : stored;
  const int leftpad = args.leftpad ? clamp(args.leftpad[batch], 0, max(used, 0)) : 0;
  return {max(used, 0) - leftpad, max(stored, 0) - leftpad, leftpad,
          static_cast<int64_t>(begin) + leftpad};
}

// The same for kernels that write every row of a varlen tensor of `total` rows: what lies behind
// the last sequence counts as sequence batch_size, whose rows exist and do not attend.
FA_HD constexpr SeqlenInfo seqlen_info_or_rest(SeqlenArgs args, int batch, int batch_size,
                                               int total) {
  if (batch < batch_size) return seqlen_info(args, batch);
  const int begin = args.cu_seqlens ? args.cu_seqlens[batch_size] : total;
  return {0, max(total - begin, 0), 0, static_cast<int64_t>(begin)};
}

// Element where (batch, row, head) begins in a [batch, row, head, dim] tensor with these strides
// (elements). Varlen tensors have no batch dimension: batch_stride is 0.
FA_HD constexpr int64_t element_offset(int64_t batch_stride, int64_t row_stride,
                                       int64_t head_stride, int batch, int64_t row, int head) {
  return batch * batch_stride + row * row_stride + head * head_stride;
}

static_assert(seqlen_info({nullptr, nullptr, nullptr, 7}, 3).seqlen == 7);
static_assert(element_offset(1LL << 32, 1 << 16, 128, 3, 70000, 2) ==
              3 * (1LL << 32) + 70000LL * 65536 + 256);  // beyond int32

}  // namespace fa
