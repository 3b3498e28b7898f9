// Checks of index tensors: every violation against a plain search, alone and shared by many lanes.
#include "core/value_checks.h"

#include <random>
#include <vector>

#include "tests/check.h"

using namespace fa;

namespace {

constexpr int kBatch = 5, kMaxPages = 7, kPageSize = 3, kNumPages = 20, kTotal = 60;
constexpr int kCapacity = kMaxPages * kPageSize;

// Index tensors of a call, most of whose values are sound.
struct Call {
  std::vector<int> lengths, cu_seqlens, table_rows, page_table;
};

Call random_call(std::mt19937& random, double rate) {
  std::bernoulli_distribution is_wrong(rate);
  const auto draw = [&](int high) {
    return static_cast<int>(random() % static_cast<unsigned>(high + 1));
  };
  const auto value = [&](int sound, int high) { return is_wrong(random) ? draw(high) - 2 : sound; };
  Call call;
  for (int b = 0; b < kBatch; ++b) {
    call.lengths.push_back(value(draw(kCapacity), kCapacity + 4));
    call.table_rows.push_back(value(kBatch - 1 - b, kBatch + 4));
  }
  for (int b = 0, end = 0; b <= kBatch; end += draw(9), ++b)
    call.cu_seqlens.push_back(value(end, kTotal + 9));
  for (int i = 0; i < kBatch * kMaxPages; ++i)
    call.page_table.push_back(value(draw(kNumPages - 1), kNumPages + 4));
  return call;
}

// cu_seqlens ascends to kTotal; lengths fit; rows exist; their pages exist.
ValueCheckParams checks_of(const Call& call) {
  ValueCheckParams p{};
  p.batch_size = kBatch;
  p.num_checks = 4;
  p.checks[0].kind = ValueCheckKind::kAscending;
  p.checks[0].value = {nullptr, call.cu_seqlens.data(), 0, 1};
  p.checks[0].limit = {nullptr, nullptr, kTotal, 1};
  p.checks[1].kind = ValueCheckKind::kRange;  // lengths + those of cu_seqlens <= kCapacity + 4
  p.checks[1].value = {call.lengths.data(), nullptr, 0, 1};
  p.checks[1].limit = {nullptr, call.cu_seqlens.data(), kCapacity + 4, -1};
  p.checks[2].kind = ValueCheckKind::kRange;
  p.checks[2].value = {call.table_rows.data(), nullptr, 0, 1};
  p.checks[2].limit = {nullptr, nullptr, kBatch - 1, 1};
  p.checks[3].kind = ValueCheckKind::kPages;
  p.checks[3].value = {call.lengths.data(), nullptr, 0, 1};
  p.checks[3].limit = {nullptr, nullptr, kNumPages - 1, 1};
  p.checks[3].page_table = call.page_table.data();
  p.checks[3].table_rows = call.table_rows.data();
  p.checks[3].page_table_stride = kMaxPages;
  p.checks[3].page_table_rows = kBatch;
  p.checks[3].max_pages = kMaxPages;
  p.checks[3].page_size = kPageSize;
  return p;
}

// {check, row, column, got} of the first violation in a sequence, written as plainly as possible.
struct Found {
  int check, row, column;
  int64_t got;
};
Found plain_search(const Call& call, int b) {
  const int begin = call.cu_seqlens[b], end = call.cu_seqlens[b + 1], length = call.lengths[b];
  const int row = call.table_rows[b];
  if (b == 0 && begin != 0) return {0, 0, -1, begin};
  if (end < begin || end > kTotal) return {0, b + 1, -1, end};
  if (length < 0 || length + (end - begin) > kCapacity + 4) return {1, b, -1, length};
  if (row < 0 || row >= kBatch) return {2, b, -1, row};
  for (int token = 0; token < length && token < kCapacity; ++token) {
    const int column = token / kPageSize, page = call.page_table[row * kMaxPages + column];
    if (page < 0 || page >= kNumPages) return {3, row, column, page};
  }
  return {-1, 0, -1, 0};
}

void test_first_violation() {
  std::mt19937 random(1);
  for (int i = 0; i < 4000; ++i) {
    const Call call = random_call(random, i % 4 * 0.05);
    const ValueCheckParams p = checks_of(call);
    for (int b = 0; b < kBatch; ++b) {
      const Found wanted = plain_search(call, b);
      for (const int num_lanes : {1, 2, 32}) {
        Violation first = kNoViolation;
        for (int lane = 0; lane < num_lanes; ++lane) {
          const Violation found = first_violation(p, b, lane, num_lanes);
          if (violation_order(found) < violation_order(first)) first = found;
        }
        CHECK(first.check == wanted.check && first.row == wanted.row &&
                  first.column == wanted.column && first.got == wanted.got,
              "sequence %d, %d lanes: check %d, expected %d", b, num_lanes, first.check,
              wanted.check);
        CHECK(first.check < 0 || first.sequence == b, "sequence %d", first.sequence);
        CHECK(first.check < 0 || first.got < first.low || first.got > first.high, "in range");
      }
    }
  }
}

}  // namespace

int main() {
  test_first_violation();
  return report();
}
