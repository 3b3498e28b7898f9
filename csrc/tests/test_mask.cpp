// core/mask.h against the mask rule written out, over all small shapes.
#include "core/mask.h"

#include <algorithm>
#include <vector>

#include "tests/check.h"

using namespace fa;

namespace {

// The rule of the documentation, word by word; 64-bit so that any window is safe.
bool kept_by_definition(int seqlen_q, int seqlen_k, int window_left, int window_right, int q,
                        int k) {
  const long diag = static_cast<long>(q) + seqlen_k - seqlen_q;
  return 0 <= k && k < seqlen_k && (window_left < 0 || k >= diag - window_left) &&
         (window_right < 0 || k <= diag + window_right);
}

struct Shape {
  int seqlen_q, seqlen_k, window_left, window_right;
};

template <class F>
void for_each_shape(F f) {
  for (int seqlen_q : {0, 1, 2, 3, 5, 8, 17})
    for (int seqlen_k : {0, 1, 2, 5, 8, 16, 23})
      for (int window_left : {-7, kUnbounded, 0, 1, 4, 9, 1 << 30, 0x7FFFFFFF})
        for (int window_right : {-2, kUnbounded, 0, 1, 3, 0x7FFFFFFF})
          f(Shape{seqlen_q, seqlen_k, window_left, window_right});
}

void test_pairs_and_ranges() {
  for_each_shape([](Shape s) {
    const MaskSpec m = mask_spec(s.seqlen_q, s.seqlen_k, s.window_left, s.window_right);
    for (int q = 0; q < s.seqlen_q; ++q) {
      const Range keys = key_range(m, q);
      CHECK(seen_queries(m).contains(q) == (keys.size() > 0), "seen sq=%d sk=%d q=%d", s.seqlen_q,
            s.seqlen_k, q);
      CHECK(0 <= keys.begin && keys.begin <= keys.end && keys.end <= s.seqlen_k, "sq=%d sk=%d q=%d",
            s.seqlen_q, s.seqlen_k, q);
      for (int k = -1; k <= s.seqlen_k; ++k) {
        const bool expected =
            kept_by_definition(s.seqlen_q, s.seqlen_k, s.window_left, s.window_right, q, k);
        CHECK(is_kept(m, q, k) == expected, "sq=%d sk=%d left=%d right=%d q=%d k=%d", s.seqlen_q,
              s.seqlen_k, s.window_left, s.window_right, q, k);
        if (0 <= k && k < s.seqlen_k)
          CHECK(query_range(m, k).contains(q) == expected, "column sq=%d sk=%d l=%d r=%d q=%d k=%d",
                s.seqlen_q, s.seqlen_k, s.window_left, s.window_right, q, k);
      }
    }
    for (int k = 0; k < s.seqlen_k; ++k) {
      const Range rows = query_range(m, k);
      CHECK(0 <= rows.begin && rows.begin <= rows.end && rows.end <= s.seqlen_q, "k=%d", k);
    }
  });
}

// A window that cuts nothing off is removed, so that its blocks run without a mask.
void test_useless_windows_are_removed() {
  for_each_shape([](Shape s) {
    const MaskSpec m = mask_spec(s.seqlen_q, s.seqlen_k, s.window_left, s.window_right);
    bool left_cuts = false, right_cuts = false;
    for (int q = 0; q < s.seqlen_q; ++q)
      for (int k = 0; k < s.seqlen_k; ++k) {
        left_cuts |= !kept_by_definition(s.seqlen_q, s.seqlen_k, s.window_left, -1, q, k);
        right_cuts |= !kept_by_definition(s.seqlen_q, s.seqlen_k, -1, s.window_right, q, k);
      }
    if (s.seqlen_q == 0 || s.seqlen_k == 0) return;
    CHECK((m.window_left != kUnbounded) == left_cuts, "left sq=%d sk=%d window=%d", s.seqlen_q,
          s.seqlen_k, s.window_left);
    CHECK((m.window_right != kUnbounded) == right_cuts, "right sq=%d sk=%d window=%d", s.seqlen_q,
          s.seqlen_k, s.window_right);
  });
  // Causal with one query sees everything: decoding runs without a mask.
  CHECK(mask_spec(1, 100, -1, 0).window_right == kUnbounded, "one query");
}

// A range under test: the blocks that tile `block` of one side visits on the other side.
struct RangeCase {
  const char* what;
  Shape shape;
  int tile_m, tile_n, block;
};

// kept(i): number of kept pairs in block i; all(i): whether a maskless step would be right there.
template <class Kept, class All>
void check_blocks(const RangeCase& c, BlockRange r, int num_blocks, Kept kept, All all) {
  CHECK(0 <= r.begin && r.begin <= r.end && r.end <= num_blocks && r.begin <= r.full_begin &&
            r.full_begin <= r.full_end && r.full_end <= r.end,
        "%s order: %d %d %d %d", c.what, r.begin, r.end, r.full_begin, r.full_end);
  for (int i = 0; i < num_blocks; ++i) {
    const bool visited = r.begin <= i && i < r.end;
    const bool full = r.full_begin <= i && i < r.full_end;
    const char* text = "%s: sq=%d sk=%d left=%d right=%d tile=%dx%d of=%d block=%d";
    const Shape& s = c.shape;
    CHECK(visited == (kept(i) > 0), text, c.what, s.seqlen_q, s.seqlen_k, s.window_left,
          s.window_right, c.tile_m, c.tile_n, c.block, i);
    CHECK(full == (visited && all(i)), text, c.what, s.seqlen_q, s.seqlen_k, s.window_left,
          s.window_right, c.tile_m, c.tile_n, c.block, i);
  }
}

void test_block_ranges() {
  for_each_shape([](Shape s) {
    const MaskSpec m = mask_spec(s.seqlen_q, s.seqlen_k, s.window_left, s.window_right);
    const auto kept_pair = [&](int q, int k) {
      return q < s.seqlen_q &&
             kept_by_definition(s.seqlen_q, s.seqlen_k, s.window_left, s.window_right, q, k);
    };
    for (int tile_m : {1, 2, 4, 16})
      for (int tile_n : {1, 3, 8}) {
        const int num_m_blocks = ceil_div(s.seqlen_q, tile_m);
        const int num_n_blocks = ceil_div(s.seqlen_k, tile_n);
        const auto kept = [&](int m_block, int n_block) {
          int count = 0;
          for (int q = m_block * tile_m; q < (m_block + 1) * tile_m; ++q)
            for (int k = n_block * tile_n; k < (n_block + 1) * tile_n; ++k)
              count += kept_pair(q, k);
          return count;
        };
        // One block past the end asks for a range of a tile that does not exist: empty.
        for (int m_block = 0; m_block <= num_m_blocks; ++m_block) {
          const int rows = std::clamp(s.seqlen_q - m_block * tile_m, 0, tile_m);
          check_blocks(
              {"n_block_range", s, tile_m, tile_n, m_block},
              n_block_range(m, m_block, tile_m, tile_n), num_n_blocks,
              [&](int n_block) { return kept(m_block, n_block); },
              [&](int n_block) { return kept(m_block, n_block) == rows * tile_n; });
        }
        for (int n_block = 0; n_block <= num_n_blocks; ++n_block)
          check_blocks(
              {"m_block_range", s, tile_m, tile_n, n_block},
              m_block_range(m, n_block, tile_m, tile_n), num_m_blocks,
              [&](int m_block) { return kept(m_block, n_block); },
              [&](int m_block) { return kept(m_block, n_block) == tile_m * tile_n; });
      }
  });
}

// Extents near the limit neither overflow nor lose a block.
void test_long_sequences() {
  const int seqlen = 1 << 30;
  const MaskSpec causal = mask_spec(seqlen, seqlen, -1, 0);
  const BlockRange last = n_block_range(causal, seqlen / 128 - 1, 128, 128);
  CHECK(last.begin == 0 && last.end == seqlen / 128 && last.full_end == seqlen / 128 - 1, "last");
  const BlockRange first = n_block_range(causal, 0, 128, 128);
  CHECK(first.end == 1 && first.full_end == 0, "first");
  const MaskSpec window = mask_spec(1, seqlen, 1000, 0);
  CHECK(key_range(window, 0).begin == seqlen - 1001, "window");
}

}  // namespace

int main() {
  test_pairs_and_ranges();
  test_useless_windows_are_removed();
  test_block_ranges();
  test_long_sequences();
  return report();
}
