// Attention on the CPU, driven by the same ranges, splits, page lookups and softmax rules as the
// kernels, against attention written out in double.
//
// Every key and value that no visited block contains is NaN, as are the rows of pages beyond the
// sequence and the pages of nobody: a range that is too wide, a mask that is forgotten or a wrong
// page turns the output to NaN; a range that is too narrow changes its value. The backward visits
// the m_blocks of each n_block and is compared with the gradient of the plain formula.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "core/mask.h"
#include "core/online_softmax.h"
#include "core/page_table.h"
#include "core/philox.h"
#include "core/split.h"
#include "tests/check.h"

using namespace fa;

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr int kDim = 4;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr uint64_t kSeed = 11, kOffset = 22;

struct Case {
  MaskSpec mask;
  int tile_m, tile_n, num_splits;
  int page_size;       // 0: keys are contiguous
  int keep_threshold;  // 256: no dropout
  float softmax_scale;
  double tolerance = 1e-5;  // of out; of lse relative beyond 1
};

double dot(const float* a, const float* b) {
  double sum = 0;
  for (int d = 0; d < kDim; ++d) sum += static_cast<double>(a[d]) * b[d];
  return sum;
}

bool is_dropped(const Case& c, int q, int k) {
  return dropout_byte(kSeed, kOffset, 3, q, k) >= c.keep_threshold;
}

struct Forward {
  Doubles out, lse;  // [seqlen_q, kDim], [seqlen_q]
  Doubles weight;    // [seqlen_q, seqlen_k], after softmax, before dropout
};

Forward plain_attention(const Case& c, const Floats& q, const Floats& k, const Floats& v) {
  const int sq = c.mask.seqlen_q, sk = c.mask.seqlen_k;
  Forward f{Doubles(sq * kDim, 0.), Doubles(sq, -kInfinity), Doubles(sq * sk, 0.)};
  for (int i = 0; i < sq; ++i) {
    double row_max = -kInfinity, sum = 0;
    for (int j = 0; j < sk; ++j)
      if (is_kept(c.mask, i, j))
        row_max = std::max(row_max, c.softmax_scale * dot(&q[i * kDim], &k[j * kDim]));
    for (int j = 0; j < sk; ++j)
      if (is_kept(c.mask, i, j)) {
        f.weight[i * sk + j] =
            std::exp(c.softmax_scale * dot(&q[i * kDim], &k[j * kDim]) - row_max);
        sum += f.weight[i * sk + j];
      }
    if (sum > 0) f.lse[i] = row_max + std::log(sum);
    for (int j = 0; j < sk && sum > 0; ++j) {
      f.weight[i * sk + j] /= sum;
      if (is_dropped(c, i, j)) continue;
      for (int d = 0; d < kDim; ++d)
        f.out[i * kDim + d] += f.weight[i * sk + j] * v[j * kDim + d] * 256. / c.keep_threshold;
    }
  }
  return f;
}

// Rows of K or V as a tile may see them: NaN outside [begin, end), in pages if there are any.
class KeyStore {
 public:
  KeyStore(const Floats& rows, int begin, int end, int page_size, std::mt19937& rng)
      : page_size_(page_size), seqlen_(static_cast<int>(rows.size()) / kDim) {
    const int num_pages = page_size == 0 ? 0 : 2 * num_pages_used(seqlen_, page_size);
    std::vector<int> pages(num_pages);
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), rng);
    if (page_size != 0) page_table_.assign(pages.begin(), pages.begin() + num_pages / 2);
    storage_.assign(page_size == 0 ? rows.size() : num_pages * page_size * kDim, kNan);
    for (int j = begin; j < end; ++j) std::copy_n(&rows[j * kDim], kDim, &storage_[element(j)]);
  }
  // Row j; zeros past the sequence, as cp.async and TMA fill them.
  void load(int j, float* row) const {
    for (int d = 0; d < kDim; ++d) row[d] = j < seqlen_ ? storage_[element(j) + d] : 0.f;
  }

 private:
  int64_t element(int j) const {
    if (page_size_ == 0) return int64_t{j} * kDim;
    return page_element_offset(page_slot(page_table_.data(), page_size_, j),
                               int64_t{page_size_} * kDim, kDim, 0, 0);
  }
  int page_size_, seqlen_;
  std::vector<int> page_table_;
  Floats storage_;
};

// One row of one CTA: the blocks of `blocks`, last first, as the kernels go.
void walk_row(const Case& c, BlockRange blocks, int row, const float* q, const KeyStore& keys,
              const KeyStore& values, float* out, float* lse) {
  const float scale_log2 = c.softmax_scale * kLog2e;
  float row_max = -INFINITY, row_sum = 0.f, acc_o[kDim] = {};
  for (int n_block = blocks.end - 1; n_block >= blocks.begin; --n_block) {
    const bool masked = n_block < blocks.full_begin || n_block >= blocks.full_end;
    Floats score(c.tile_n);
    float new_max = row_max;
    for (int col = 0; col < c.tile_n; ++col) {
      const int j = n_block * c.tile_n + col;
      float key[kDim];
      keys.load(j, key);
      score[col] = masked && !is_kept(c.mask, row, j) ? -INFINITY : static_cast<float>(dot(q, key));
      new_max = std::max(new_max, score[col]);
    }
    const float factor = rescale_factor(row_max, new_max, scale_log2);
    row_sum *= factor;
    for (float& a : acc_o) a *= factor;
    for (int col = 0; col < c.tile_n; ++col) {
      const int j = n_block * c.tile_n + col;
      const float weight = softmax_weight(score[col], new_max, scale_log2);
      row_sum += weight;
      if (is_dropped(c, row, j)) continue;
      float value[kDim];
      values.load(j, value);
      for (int d = 0; d < kDim; ++d) acc_o[d] += weight * value[d];
    }
    row_max = new_max;
  }
  const float rescale = output_scale(row_sum) * 256.f / static_cast<float>(c.keep_threshold);
  for (int d = 0; d < kDim; ++d) out[d] = acc_o[d] * rescale;
  *lse = row_lse(row_max, row_sum, c.softmax_scale);
}

void check_forward(const Case& c, const Floats& q, const Floats& k, const Floats& v,
                   const Forward& expected, std::mt19937& rng) {
  const int sq = c.mask.seqlen_q;
  for (int m_block = 0; m_block < ceil_div(sq, c.tile_m); ++m_block) {
    const BlockRange blocks = n_block_range(c.mask, m_block, c.tile_m, c.tile_n);
    const int end = std::min(c.mask.seqlen_k, blocks.end * c.tile_n);
    const KeyStore keys(k, blocks.begin * c.tile_n, end, c.page_size, rng);
    const KeyStore values(v, blocks.begin * c.tile_n, end, c.page_size, rng);
    for (int row = m_block * c.tile_m; row < std::min(sq, (m_block + 1) * c.tile_m); ++row) {
      float out[kDim] = {}, lse = -INFINITY;
      for (int split = 0; split < c.num_splits; ++split) {
        float out_part[kDim], lse_part;
        walk_row(c, split_blocks(blocks, split, c.num_splits), row, &q[row * kDim], keys, values,
                 out_part, &lse_part);
        const float total = merge_lse(lse, lse_part);
        const float old_weight = merge_weight(lse, total);
        const float new_weight = merge_weight(lse_part, total);
        for (int d = 0; d < kDim; ++d) out[d] = old_weight * out[d] + new_weight * out_part[d];
        lse = total;
      }
      const char* text =
          "%s sq=%d sk=%d left=%d right=%d tile=%dx%d splits=%d page=%d row=%d: %g, not %g";
      const MaskSpec& m = c.mask;
      const double expected_lse = expected.lse[row];
      CHECK(lse == expected_lse ||
                std::fabs(lse - expected_lse) < 1e-5 * std::max(1., std::fabs(expected_lse)),
            text, "lse", sq, m.seqlen_k, m.window_left, m.window_right, c.tile_m, c.tile_n,
            c.num_splits, c.page_size, row, static_cast<double>(lse), expected_lse);
      for (int d = 0; d < kDim; ++d) {
        const double expected_out = expected.out[row * kDim + d];
        CHECK(std::fabs(out[d] - expected_out) < c.tolerance, text, "out", sq, m.seqlen_k,
              m.window_left, m.window_right, c.tile_m, c.tile_n, c.num_splits, c.page_size, row,
              static_cast<double>(out[d]), expected_out);
      }
    }
  }
}

struct KeyGradient {
  double dk[kDim] = {}, dv[kDim] = {};
};

struct Backward {
  const Case& c;
  const Floats &q, &k, &v, &dout;
  const Forward& forward;
  Doubles delta;  // [seqlen_q], rowsum(dout * out)

  // Adds what query i, whose probability for key j is p, gives to the gradients of key j.
  void add(int i, int j, double p, KeyGradient& gradient) const {
    const double ds = p * (dot(&dout[i * kDim], &v[j * kDim]) - delta[i]) * c.softmax_scale;
    for (int d = 0; d < kDim; ++d) {
      gradient.dv[d] += p * dout[i * kDim + d];
      gradient.dk[d] += ds * q[i * kDim + d];
    }
  }

  // Key j by the m_blocks of its n_block, as the kernels go: the mask only where the range says so.
  KeyGradient walk(BlockRange blocks, int j) const {
    KeyGradient gradient;
    for (int i = blocks.begin * c.tile_m; i < blocks.end * c.tile_m; ++i) {
      const int m_block = i / c.tile_m;
      const bool masked = m_block < blocks.full_begin || m_block >= blocks.full_end;
      const bool inside = i < c.mask.seqlen_q;
      CHECK(masked || inside, "a maskless step past the last row: i=%d", i);
      if (!inside || (masked && !is_kept(c.mask, i, j))) continue;
      const double score = c.softmax_scale * dot(&q[i * kDim], &k[j * kDim]);
      add(i, j, std::exp(score - forward.lse[i]), gradient);
    }
    return gradient;
  }

  KeyGradient plain(int j) const {
    KeyGradient gradient;
    for (int i = 0; i < c.mask.seqlen_q; ++i)
      add(i, j, forward.weight[i * c.mask.seqlen_k + j], gradient);
    return gradient;
  }
};

// dV = P^T dO and dK = dS^T Q of every key. Dropout is left out here.
void check_backward(const Case& c, const Floats& q, const Floats& k, const Floats& v,
                    const Floats& dout, const Forward& forward) {
  Backward backward{c, q, k, v, dout, forward, Doubles(c.mask.seqlen_q, 0.)};
  for (int i = 0; i < c.mask.seqlen_q * kDim; ++i)
    backward.delta[i / kDim] += dout[i] * forward.out[i];
  for (int j = 0; j < c.mask.seqlen_k; ++j) {
    const BlockRange blocks = m_block_range(c.mask, j / c.tile_n, c.tile_m, c.tile_n);
    const KeyGradient got = backward.walk(blocks, j), expected = backward.plain(j);
    for (int d = 0; d < kDim; ++d)
      CHECK(std::fabs(got.dv[d] - expected.dv[d]) < 1e-9 &&
                std::fabs(got.dk[d] - expected.dk[d]) < 1e-9,
            "backward sq=%d sk=%d left=%d right=%d tile=%dx%d key=%d", c.mask.seqlen_q,
            c.mask.seqlen_k, c.mask.window_left, c.mask.window_right, c.tile_m, c.tile_n, j);
  }
}

Floats random_rows(int rows, std::mt19937& rng, float deviation) {
  std::normal_distribution<float> normal(0.f, deviation);
  Floats x(rows * kDim);
  for (float& e : x) e = normal(rng);
  return x;
}

void walk_all() {
  std::mt19937 rng(0);
  for (int sq : {1, 3, 17})
    for (int sk : {0, 1, 5, 24, 37})
      for (int left : {kUnbounded, 0, 6})
        for (int right : {kUnbounded, 0, 2}) {
          const Floats q = random_rows(sq, rng, 1.f), k = random_rows(sk, rng, 1.f);
          const Floats v = random_rows(sk, rng, 1.f), dout = random_rows(sq, rng, 1.f);
          for (int tile_m : {4, 16})
            for (int tile_n : {4, 16})
              for (int threshold : {256, 140}) {
                Case c{mask_spec(sq, sk, left, right), tile_m, tile_n, 1, 0, threshold, 0.35f};
                const Forward expected = plain_attention(c, q, k, v);
                for (int num_splits : {1, 2, 5})
                  for (int page_size : {0, 1, 3, 16}) {
                    c.num_splits = num_splits;
                    c.page_size = page_size;
                    check_forward(c, q, k, v, expected, rng);
                  }
                if (threshold == 256) check_backward(c, q, k, v, dout, expected);
              }
        }
}

// Scores in the hundreds and rows whose maximum grows with every block: weights neither overflow
// nor vanish, and each step rescales.
void walk_large_scores() {
  std::mt19937 rng(1);
  for (int sk : {5, 37}) {
    const Floats q = random_rows(3, rng, 1.f), v = random_rows(sk, rng, 1.f);
    Floats k = random_rows(sk, rng, 1.f);
    for (int j = 0; j < sk; ++j)
      for (int d = 0; d < kDim; ++d) k[j * kDim + d] += static_cast<float>((sk - j) * 8);
    for (int num_splits : {1, 3}) {
      const Case c{mask_spec(3, sk, kUnbounded, 0), 4, 4, num_splits, 0, 256, 1.f, 1e-3};
      check_forward(c, q, k, v, plain_attention(c, q, k, v), rng);
    }
  }
}

void test_softmax_rules() {
  const float inf = INFINITY;
  CHECK(kLog2e == static_cast<float>(std::log2(std::exp(1.))), "kLog2e");
  CHECK(kLn2 == static_cast<float>(std::log(2.)), "kLn2");
  CHECK(rescale_factor(-inf, -inf, 1.f) == 0.f && rescale_factor(-inf, 3.f, 1.f) == 0.f, "empty");
  CHECK(rescale_factor(2.f, 2.f, 1.f) == 1.f && rescale_factor(1.f, 3.f, 1.f) == 0.25f, "factor");
  CHECK(softmax_weight(-inf, -inf, 1.f) == 0.f && softmax_weight(-inf, 5.f, 1.f) == 0.f, "masked");
  CHECK(softmax_weight(3.f, 5.f, 1.f) == 0.25f, "weight");
  CHECK(row_lse(-inf, 0.f, 1.f) == -inf && output_scale(0.f) == 0.f, "row without keys");
  CHECK(std::isnan(row_lse(1.f, kNan, 1.f)) && std::isnan(output_scale(kNan)), "NaN stays");
  CHECK(std::fabs(row_lse(3.f, 2.f, 0.5f) - (1.5f + std::log(2.f))) < 1e-6f, "lse");
  CHECK(merge_lse(-inf, -inf) == -inf && merge_lse(-inf, 2.f) == 2.f && merge_lse(2.f, -inf) == 2.f,
        "neutral");
  CHECK(std::fabs(merge_lse(1.f, 1.f) - (1.f + std::log(2.f))) < 1e-6f, "merge");
  CHECK(merge_lse(-3.f, 4.f) == merge_lse(4.f, -3.f), "symmetric");
  CHECK(std::isnan(merge_lse(kNan, -inf)) && std::isnan(merge_lse(1.f, kNan)), "NaN stays");
  CHECK(merge_weight(-inf, -inf) == 0.f && merge_weight(2.f, 2.f) == 1.f, "merge weight");
}

}  // namespace

int main() {
  test_softmax_rules();
  walk_all();
  walk_large_scores();
  return report();
}
