// What FLASH_ATTN_EXT_DEBUG=1 checks in the index tensors of a call: lengths, rows, page ids.
//
// A call is a table of checks, which is walked for every sequence in its order and left at the
// first violation: a check may rely on those before it (pages are looked up only for a length that
// fits). Every check is `got in [low, high]`. Filled by bindings/, read by kernels/: a change here
// raises kKernelAbiVersion.
#pragma once
#include <cstdint>

#include "core/host_device.h"
#include "core/page_table.h"

namespace fa {

constexpr int kMaxValueChecks = 8;        // of a call: a cache with all its arguments, or varlen
constexpr int kValueCheckNameChars = 32;  // with the 0 at the end
constexpr int kValueCheckTextChars = 48;
constexpr int kValueCheckThreads = 1024;  // one CTA has all sequences

// Of sequence b: constant + values[b] + sign * (cu_seqlens[b + 1] - cu_seqlens[b]).
struct LengthTerms {
  const int* values;      // [batch_size]; nullptr: 0
  const int* cu_seqlens;  // [batch_size + 1]; nullptr: 0
  int64_t constant;
  int sign;
};

FA_HD constexpr int64_t length_of(const LengthTerms& terms, int sequence) {
  int64_t length = terms.constant;
  if (terms.values != nullptr) length += terms.values[sequence];
  if (terms.cu_seqlens != nullptr)
    length += terms.sign * (int64_t{terms.cu_seqlens[sequence + 1]} - terms.cu_seqlens[sequence]);
  return length;
}

// The order is that of the Python package.
enum class ValueCheckKind : int {
  kRange,      // 0 <= value <= limit
  kAscending,  // value.cu_seqlens begins with 0 and never falls; limit: of its last entry
  kPages,      // the page ids that `value` tokens use: 0 <= id <= limit
};

struct ValueCheck {
  ValueCheckKind kind;
  LengthTerms value, limit;
  const int* page_table;  // [page_table_rows, max_pages]; nullptr: not kPages
  const int* table_rows;  // [batch_size], row of the page table; nullptr: sequence
  int64_t page_table_stride;
  int page_table_rows, max_pages, page_size;
  char name[kValueCheckNameChars];  // of the argument
  char text[kValueCheckTextChars];  // what the range is
};

struct ValueCheckParams {
  ValueCheck checks[kMaxValueChecks];
  int num_checks, batch_size;
  int64_t* record;  // [kRecordWords], the first violation; nullptr: print it and trap
};

struct Violation {
  int check;  // place in the table; -1: none
  int sequence;
  int row, column;  // entry name[row], or name[row, column] of a page table; column -1: no page
  int64_t got, low, high;
};
constexpr int kRecordWords = 7;  // the members in their order
constexpr Violation kNoViolation{-1, 0, 0, -1, 0, 0, 0};

FA_HD constexpr Violation ascending_violation(const ValueCheck& c, int sequence) {
  const int* ends = c.value.cu_seqlens;
  if (sequence == 0 && ends[0] != 0) return {0, 0, 0, -1, ends[0], 0, 0};
  const int64_t end = ends[sequence + 1], begin = ends[sequence];
  if (begin <= end && end <= c.limit.constant) return kNoViolation;
  return {0, sequence, sequence + 1, -1, end, begin, c.limit.constant};
}

// Of the pages lane, lane + num_lanes, ...
FA_HD constexpr Violation page_violation(const ValueCheck& c, int sequence, int lane,
                                         int num_lanes) {
  const int row = c.table_rows == nullptr ? sequence : c.table_rows[sequence];
  if (row < 0 || row >= c.page_table_rows) return kNoViolation;  // said by a check before
  const int64_t capacity = int64_t{c.max_pages} * c.page_size;
  const int length = static_cast<int>(clamp<int64_t>(length_of(c.value, sequence), 0, capacity));
  const int pages = num_pages_used(length, c.page_size);
  const int64_t last = length_of(c.limit, sequence);
  for (int column = lane; column < pages; column += num_lanes) {
    const int64_t id = c.page_table[row * c.page_table_stride + column];
    if (id < 0 || id > last) return {0, sequence, row, column, id, 0, last};
  }
  return kNoViolation;
}

FA_HD constexpr Violation range_violation(const ValueCheck& c, int sequence) {
  const int64_t got = length_of(c.value, sequence), limit = length_of(c.limit, sequence);
  if (0 <= got && got <= limit) return kNoViolation;
  return {0, sequence, sequence, -1, got, 0, limit};
}

// The first violation in a sequence that lane `lane` of those who share it finds.
FA_HD constexpr Violation first_violation(const ValueCheckParams& p, int sequence, int lane,
                                          int num_lanes) {
  for (int i = 0; i < p.num_checks; ++i) {
    const ValueCheck& c = p.checks[i];
    Violation found = kNoViolation;
    switch (c.kind) {
      case ValueCheckKind::kRange: found = range_violation(c, sequence); break;
      case ValueCheckKind::kAscending: found = ascending_violation(c, sequence); break;
      case ValueCheckKind::kPages: found = page_violation(c, sequence, lane, num_lanes); break;
    }
    if (found.check < 0) continue;
    found.check = i;
    return found;
  }
  return kNoViolation;
}

// Violations in the order in which they are told: by sequence, then by check, then by page. None is
// last. Sequences and pages of a sequence are fewer than 2^30.
FA_HD constexpr uint64_t violation_order(const Violation& v) {
  if (v.check < 0) return ~uint64_t{0};
  return uint64_t(v.sequence) << 34 | uint64_t(v.check) << 30 | uint64_t(max(v.column, 0));
}

static_assert(kMaxValueChecks <= 16);             // violation_order
static_assert(sizeof(ValueCheckParams) <= 4096);  // what a launch takes before CUDA 12.1
static_assert(violation_order({0, 2, 2, -1, 0, 0, 0}) < violation_order({3, 2, 9, 0, 0, 0, 0}));
static_assert(violation_order({3, 2, 9, 7, 0, 0, 0}) < violation_order({0, 3, 3, -1, 0, 0, 0}));
static_assert(violation_order({3, 2, 9, 7, 0, 0, 0}) < violation_order(kNoViolation));

}  // namespace fa
