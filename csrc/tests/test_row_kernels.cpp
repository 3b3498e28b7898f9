// Launch geometry of the kernels that work row by row, and their share of the tokens.
#include "core/row_kernels.h"

#include <set>
#include <utility>
#include <vector>

#include "core/cross_entropy.h"
#include "core/norm.h"
#include "core/rotary.h"
#include "core/token_tile.h"
#include "tests/check.h"

using namespace fa;

namespace {

void test_lanes_of_row_kernels() {
  for (int head_dim = 1; head_dim <= kMaxRowHeadDim; ++head_dim)
    for (int vec : {1, 2, 4, 8}) {
      const int lanes = combine_lanes_per_row(head_dim, vec);
      CHECK(1 <= lanes && lanes <= kCombineThreads, "head_dim=%d", head_dim);
      CHECK(lanes == kCombineThreads || lanes * vec >= head_dim, "head_dim=%d", head_dim);
      CHECK((lanes - 1) * vec < head_dim, "idle lanes: head_dim=%d", head_dim);
      const int rows = combine_rows_per_cta(head_dim, vec);
      CHECK(rows >= 1 && rows * lanes <= kCombineThreads, "head_dim=%d rows=%d", head_dim, rows);
      const RowShare share = bwd_preprocess_row_share(head_dim, vec);
      CHECK(kWarpSize % share.lanes == 0, "head_dim=%d lanes=%d", head_dim, share.lanes);
      const int step = share.lanes * share.vectors * vec;
      CHECK(share.lanes == kWarpSize || step >= head_dim, "steps: head_dim=%d", head_dim);
      CHECK(share.lanes == 1 || step < 2 * head_dim, "idle lanes: head_dim=%d", head_dim);
      CHECK(bwd_preprocess_rows_per_cta(head_dim, vec) % (kBwdPreprocessThreads / kWarpSize) == 0,
            "whole warps: head_dim=%d", head_dim);
    }
}

// The threads of a norm hold every column of a row, in whole warps or a part of one that divides
// it.
void test_norm_shares() {
  struct Kind {
    NormShare share;
    int columns, threads_per_sm;
  };
  for (int size = 1; size <= kMaxNormSize; size += size < 600 ? 1 : 37) {
    const int vectors = norm_bwd_vectors(size);
    const Kind kinds[] = {
        {norm_fwd_share(size), kNormFwdColumns, kMaxNormFwdThreads},
        {norm_fwd_ring_share(size), kNormFwdRingColumns, kMaxNormRingThreads},
        {norm_bwd_share(size), vectors * kNormVec, kMaxNormBwdThreads},
        {norm_bwd_ring_share(size), kNormBwdRingColumns, kMaxNormRingThreads},
    };
    for (int i = 0; i < (size <= kMaxNormBwdRegisterSize ? 4 : 3); ++i) {
      const auto [share, columns, threads_per_sm] = kinds[i];
      CHECK(share.lanes * columns >= size, "size=%d lanes=%d", size, share.lanes);
      CHECK(share.lanes % kWarpSize == 0 || kWarpSize % share.lanes == 0, "lanes=%d", share.lanes);
      CHECK(share.num_threads() <= threads_per_sm && share.rows >= 1, "size=%d", size);
      CHECK(share.num_threads() % kWarpSize == 0, "whole warps: size=%d", size);
      CHECK((share.lanes - kWarpSize) * columns < 2 * size, "idle lanes: size=%d", size);
      for (const int64_t rows : {int64_t{0}, int64_t{1}, int64_t{1000}, int64_t{1} << 40}) {
        const int64_t ctas = norm_ctas(share, rows, 108, threads_per_sm);
        CHECK(1 <= ctas && (ctas == 1 || (ctas - 1) * share.rows < rows),
              "a CTA without rows: size=%d", size);
      }
    }
    CHECK((vectors == 1) == (size <= kMaxNormBwdRegisterSize), "vectors=%d", vectors);
    CHECK(norm_bwd_smem_bytes(size, true) <= 128 * 1024, "size=%d", size);
  }
  // Rows of the usual models are on their way ahead on every GPU: 99 KB of shared memory.
  CHECK(norm_ring_smem_bytes(norm_fwd_ring_share(8192), kNormFwdRingColumns, 2 + 2) <= 96 * 1024,
        "8192");
  CHECK(norm_ring_smem_bytes(norm_bwd_ring_share(8192), kNormBwdRingColumns, 3 * 2) <= 96 * 1024,
        "8192");
}

// Dropout's half words are those of the four words of Philox, each once.
void test_norm_dropout() {
  const Philox4 words{{0x00010000, 0x00030002, 0x00050004, 0x00070006}};
  for (int column = 0; column < 32; ++column)
    CHECK(norm_dropout_bits(words, column) == column % 8, "column=%d", column);
  const uint64_t seed = 0x123456789ABCDEF0, offset = 0x0FEDCBA987654321;
  const int64_t row = (int64_t{5} << 32) + 7;
  CHECK(equal(norm_dropout_words(seed, offset, row, 3),
              philox4x32_7({{3, 7, 5, 0x87654321}}, 0x9ABCDEF0, 0x12345678 ^ 0x0FEDCBA9)),
        "counter");
}

// The pieces of a row of logits cover it once, and the vectors are aligned.
void test_row_pieces() {
  for (const int bytes : {2, 4})
    for (uint64_t address = 64; address < 96; address += bytes)
      for (int size = 0; size < 50; ++size) {
        const RowPieces p = row_pieces(address, bytes, size);
        const int vec = kCrossEntropyVectorBytes / bytes;
        CHECK(0 <= p.head && p.head < vec && p.head <= size, "head=%d", p.head);
        CHECK(p.vectors == 0 || (address + p.head * bytes) % 16 == 0, "head=%d", p.head);
        CHECK(p.tail == p.head + p.vectors * vec && size - vec < p.tail && p.tail <= size,
              "tail=%d size=%d", p.tail, size);
      }
}

// The units of a row hold each element once, and both elements of a pair lie in one unit: in one
// vector if interleaved, so that its thread reads whole cosines and sines.
void test_units_of_a_row() {
  for (int vec : {1, 2, 4, 8})
    for (int head_dim : {2 * vec, 3 * vec, 8 * vec, 13 * vec})
      for (int rotary_dim = 0; rotary_dim <= head_dim; rotary_dim += 2 * vec)
        for (bool interleaved : {false, true}) {
          std::vector<int> unit_of(head_dim, -1);
          for (int unit = 0; unit < row_units(head_dim, rotary_dim, vec); ++unit) {
            const UnitColumns c = unit_columns(head_dim, rotary_dim, interleaved, vec, unit);
            CHECK(c.rotates == (unit < rotated_units(rotary_dim, vec)), "rotates unit=%d", unit);
            for (int column : {c.first, c.second})
              for (int i = 0; i < vec && (column == c.first || c.has_second); ++i) {
                const int element = column + i;
                CHECK(0 <= element && element < head_dim && unit_of[element] == -1,
                      "vec=%d head_dim=%d rotary_dim=%d element=%d", vec, head_dim, rotary_dim,
                      element);
                if (0 <= element && element < head_dim) unit_of[element] = unit;
                CHECK(c.rotates == (element < rotary_dim), "rotates element=%d", element);
              }
            CHECK(!c.rotates || interleaved || c.second == c.first + rotary_dim / 2, "partners");
          }
          for (int pair = 0; pair < rotary_dim / 2; ++pair) {
            const RotaryPair p = rotary_pair(pair, rotary_dim, interleaved);
            CHECK(unit_of[p.first] == unit_of[p.second], "pair torn: vec=%d rotary_dim=%d pair=%d",
                  vec, rotary_dim, pair);
          }
          for (int element = 0; element < head_dim; ++element)
            CHECK(unit_of[element] >= 0, "not covered: vec=%d head_dim=%d rotary_dim=%d element=%d",
                  vec, head_dim, rotary_dim, element);
        }
  for (int num_heads = 1; num_heads < 20; ++num_heads) {
    const int groups = units_per_token(num_heads, 3) / 3;
    CHECK(groups <= num_heads, "a group without a head: heads=%d", num_heads);
    CHECK(groups * kHeadsPerThread >= num_heads, "heads=%d", num_heads);
  }
}

// Every token of every sequence belongs to one tile, fixed length and varlen.
void test_token_tiles() {
  // Rows that belong to no sequence: cu_seqlens[1] and lengths of "sequence 0" are not there.
  for (bool varlen : {false, true})
    CHECK(num_token_tiles(varlen, 0, 7, 3) == 0, "varlen=%d", varlen);
  for (const std::vector<int>& lengths :
       std::vector<std::vector<int>>{{5, 5, 5}, {0}, {7}, {3, 0, 9, 1}, {0, 0, 64}})
    for (bool varlen : {false, true})
      for (int tile_tokens : {1, 3, 4, 100}) {
        std::vector<int> cu_seqlens{0};
        for (int length : lengths) cu_seqlens.push_back(cu_seqlens.back() + length);
        const int batch_size = static_cast<int>(lengths.size());
        const int seqlen = varlen ? cu_seqlens.back() : lengths[0];
        std::multiset<std::pair<int, int>> expected, seen;
        for (int batch = 0; batch < batch_size; ++batch)
          for (int token = 0; token < (varlen ? lengths[batch] : lengths[0]); ++token)
            expected.insert({batch, token});
        const int64_t tiles = num_token_tiles(varlen, batch_size, seqlen, tile_tokens);
        for (int tile = 0; tile < tiles; ++tile) {
          const TokenTile t = token_tile(varlen ? cu_seqlens.data() : nullptr, batch_size, seqlen,
                                         tile_tokens, tile);
          CHECK(t.end - t.begin <= tile_tokens, "too long: tile=%d", tile);
          for (int token = t.begin; token < t.end; ++token) seen.insert({t.batch, token});
          if (t.end > t.begin)
            CHECK(t.first_row == (varlen ? cu_seqlens[t.batch] : 0), "row: tile=%d", tile);
        }
        CHECK(seen == expected, "varlen=%d tile_tokens=%d", varlen, tile_tokens);
      }
  for (int units = 0; units < 3000; ++units) {
    for (const bool varlen : {false, true}) {
      const int steps = varlen ? kVarlenSteps : 1;
      const int tokens = tokens_per_tile(units, 256, varlen);
      CHECK(tokens >= 1 && (tokens == 1 || tokens * units <= steps * 256), "too many: units=%d",
            units);
      CHECK(units == 0 || (tokens + 1) * units > steps * 256, "threads idle: units=%d", units);
    }
  }
}

}  // namespace

int main() {
  test_lanes_of_row_kernels();
  test_norm_shares();
  test_norm_dropout();
  test_row_pieces();
  test_units_of_a_row();
  test_token_tiles();
  return report();
}
