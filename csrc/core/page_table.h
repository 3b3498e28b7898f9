// Paged keys and values: token t of a sequence lies in page page_table[t / page_size], at row
// t % page_size of that page. Any page size >= 1.
//
// Only entries of pages that hold a token in use are read; later entries may be garbage.
#pragma once
#include "core/host_device.h"

namespace fa {

struct PageSlot {
  int page;    // index into the pool of pages
  int offset;  // row inside the page, [0, page_size)
};

// page_table_row: [max_pages], the pages of one sequence. token >= 0 and inside the sequence.
FA_HD constexpr PageSlot page_slot(const int* page_table_row, int page_size, int token) {
  return {page_table_row[token / page_size], token % page_size};
}

// Number of entries of page_table_row that `seqlen` tokens use.
FA_HD constexpr int num_pages_used(int seqlen, int page_size) {
  return ceil_div(max(seqlen, 0), page_size);
}

// Element where a slot begins in a [num_pages, page_size, head, dim] pool (strides in elements).
FA_HD constexpr int64_t page_element_offset(PageSlot slot, int64_t page_stride, int64_t row_stride,
                                            int64_t head_stride, int head) {
  return slot.page * page_stride + slot.offset * row_stride + head * head_stride;
}

// Tokens from `token` on that follow each other in memory: what one wide copy may take.
FA_HD constexpr int tokens_left_in_page(int token, int page_size) {
  return page_size - token % page_size;
}

static_assert(num_pages_used(0, 16) == 0 && num_pages_used(17, 16) == 2);
static_assert(tokens_left_in_page(0, 7) == 7 && tokens_left_in_page(13, 7) == 1);

}  // namespace fa
