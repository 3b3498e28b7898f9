// A test framework in one macro: CHECK(condition, format, arguments...) counts and prints.
//
// Each test program ends with `return report();`: it prints the number of checks, and the exit
// status is 1 if one failed.
#pragma once
#include <cstdio>

inline long g_num_checks = 0, g_num_failures = 0;
constexpr long kMaxPrinted = 20;

#define CHECK(condition, ...)                                           \
  do {                                                                  \
    ++g_num_checks;                                                     \
    if (!(condition) && ++g_num_failures <= kMaxPrinted) {              \
      std::printf("%s:%d: CHECK(%s) ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                         \
      std::printf("\n");                                                \
    }                                                                   \
  } while (0)

inline int report() {
  std::printf("%ld checks, %ld failures\n", g_num_checks, g_num_failures);
  return g_num_failures == 0 ? 0 : 1;
}
