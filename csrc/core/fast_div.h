// Division by a number that is known before the launch, as one multiplication and a shift.
//
// Granlund and Montgomery, "Division by Invariant Integers using Multiplication", 1994: with
// l = ceil(log2 d), m = ceil(2^(31 + l) / d), floor(n / d) = floor(n m / 2^(31 + l)) for
// 0 <= n < 2^31. A hardware-independent 32-bit division costs about 25 instructions on a GPU.
#pragma once
#include "core/host_device.h"

namespace fa {

class FastDiv {
 public:
  FastDiv() = default;
  // 1 <= divisor < 2^31.
  FA_HD constexpr explicit FastDiv(int divisor) : divisor_(divisor), multiplier_(0), shift_(31) {
    while ((1LL << (shift_ - 31)) < divisor) ++shift_;
    multiplier_ = static_cast<uint32_t>(((1ULL << shift_) + divisor - 1) / divisor);
  }

  // 0 <= n < 2^31.
  FA_HD constexpr int divide(int n) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier_ >>
                            shift_);
  }
  FA_HD constexpr int divisor() const { return divisor_; }

 private:
  int divisor_;
  uint32_t multiplier_;
  int shift_;
};

struct QuotientRemainder {
  int quotient, remainder;
};
FA_HD constexpr QuotientRemainder divide(int n, FastDiv by) {
  const int quotient = by.divide(n);
  return {quotient, n - quotient * by.divisor()};
}

static_assert(FastDiv(1).divide(2147483647) == 2147483647 && FastDiv(7).divide(48) == 6);
static_assert(FastDiv(2147483647).divide(2147483646) == 0 && FastDiv(96).divide(95) == 0);

}  // namespace fa
