// Splits, tile schedulers, sequence lengths and page tables by brute force.
#include <algorithm>
#include <set>
#include <tuple>
#include <vector>

#include "core/bwd_order.h"
#include "core/bwd_workspace.h"
#include "core/decode_schedule.h"
#include "core/fast_div.h"
#include "core/page_table.h"
#include "core/seqlen.h"
#include "core/split.h"
#include "core/tile_config.h"
#include "core/tile_scheduler.h"
#include "tests/check.h"

using namespace fa;

namespace {

using Tile = std::tuple<int, int, int>;  // batch, head, m_block

void test_split_range() {
  for (int begin : {0, 3})
    for (int size = 0; size < 40; ++size)
      for (int num_splits = 1; num_splits <= 20; ++num_splits) {
        int next = begin, largest = 0;
        for (int split = 0; split < num_splits; ++split) {
          const Range r = split_range({begin, begin + size}, split, num_splits);
          CHECK(r.begin == next && r.end >= r.begin, "gap: size=%d splits=%d split=%d", size,
                num_splits, split);
          next = r.end;
          largest = std::max(largest, r.size());
        }
        CHECK(next == begin + size, "not covered: size=%d splits=%d", size, num_splits);
        CHECK(largest == ceil_div(size, num_splits), "unequal: size=%d splits=%d", size,
              num_splits);
      }
}

void test_split_blocks() {
  for (int end = 0; end <= 9; ++end)
    for (int full_begin = 0; full_begin <= end; ++full_begin)
      for (int full_end = full_begin; full_end <= end; ++full_end)
        for (int num_splits = 1; num_splits <= 5; ++num_splits)
          for (int split = 0; split < num_splits; ++split) {
            const BlockRange whole{0, end, full_begin, full_end};
            const BlockRange part = split_blocks(whole, split, num_splits);
            const Range expected = split_range({0, end}, split, num_splits);
            CHECK(part.size() == expected.size(), "size end=%d split=%d", end, split);
            CHECK(part.begin <= part.full_begin && part.full_begin <= part.full_end &&
                      part.full_end <= part.end,
                  "order end=%d split=%d", end, split);
            for (int block = part.begin; block < part.end; ++block)
              CHECK((part.full_begin <= block && block < part.full_end) ==
                        (full_begin <= block && block < full_end),
                    "full end=%d full=[%d,%d) split=%d/%d block=%d", end, full_begin, full_end,
                    split, num_splits, block);
          }
}

void test_choose_num_splits() {
  for (int tiles : {0, 1, 2, 4, 7, 16, 48, 61, 86, 87, 88, 100, 107, 132, 1000})
    for (int num_sms : {1, 5, 20, 108, 132})
      for (int num_n_blocks = 0; num_n_blocks < 300; num_n_blocks += 3)
        for (int max_splits : {1, 4, 128}) {
          const int splits = choose_num_splits(tiles, num_sms, num_n_blocks, max_splits);
          CHECK(1 <= splits && splits <= std::max(1, std::min(max_splits, num_n_blocks)),
                "bounds: tiles=%d sms=%d blocks=%d", tiles, num_sms, num_n_blocks);
          CHECK(5 * tiles < 4 * num_sms || splits == 1, "split a busy GPU: tiles=%d sms=%d", tiles,
                num_sms);
          for (int split = 0; split < splits && num_n_blocks > 0; ++split)
            CHECK(split_range({0, num_n_blocks}, split, splits).size() > 0,
                  "empty split: tiles=%d sms=%d blocks=%d", tiles, num_sms, num_n_blocks);
        }
  CHECK(choose_num_splits(int64_t{1} << 40, 132, 64, 128) == 1, "many tiles");
}

// Every tile once, and m_blocks in the order asked for.
template <class Coord>
void check_bijection(TileGrid grid, bool longest_first, Coord coord, const char* what) {
  std::set<Tile> seen;
  for (int64_t tile = 0; tile < grid.size(); ++tile) {
    const TileCoord c = coord(tile);
    CHECK(0 <= c.m_block && c.m_block < grid.num_m_blocks && 0 <= c.head &&
              c.head < grid.num_heads && 0 <= c.batch && c.batch < grid.batch_size,
          "%s outside: tile=%d", what, static_cast<int>(tile));
    CHECK(seen.insert({c.batch, c.head, c.m_block}).second, "%s twice: tile=%d", what,
          static_cast<int>(tile));
    if (tile == 0)
      CHECK(c.m_block == (longest_first ? grid.num_m_blocks - 1 : 0), "%s first tile", what);
  }
}

void test_tile_coord() {
  for (bool longest_first : {false, true})
    for (int num_m_blocks : {1, 3, 8})
      for (int num_heads : {1, 4, 5})
        for (int batch_size : {1, 5}) {
          const TileGrid grid{num_m_blocks, num_heads, batch_size};
          const auto plain = [&](int64_t t) { return tile_coord(grid, t, longest_first); };
          check_bijection(grid, longest_first, plain, "tile_coord");
          for (int64_t t = 1; t < grid.size(); ++t) {
            const int before = plain(t - 1).m_block, now = plain(t).m_block;
            CHECK(longest_first ? now <= before : now >= before, "order: tile=%d",
                  static_cast<int>(t));
          }
          for (int group_size : {1, 2, 3, 64}) {
            const auto grouped = [&](int64_t t) {
              return tile_coord_grouped(grid, t, longest_first, group_size);
            };
            check_bijection(grid, longest_first, grouped, "tile_coord_grouped");
            // All m_blocks of a group of (head, batch) pairs come before the next group.
            int last_group = 0;
            for (int64_t t = 0; t < grid.size(); ++t) {
              const TileCoord c = grouped(t);
              const int group = (c.batch * num_heads + c.head) / group_size;
              CHECK(group >= last_group, "group order: tile=%d", static_cast<int>(t));
              last_group = group;
            }
            if (grid.size() == 0) continue;
            const TileOrder order = TileOrder::of(grid, longest_first, group_size);
            for (int t = 0; t < grid.size(); ++t) {
              const TileCoord a = order.coord(t), b = grouped(t);
              CHECK(a.m_block == b.m_block && a.head == b.head && a.batch == b.batch,
                    "TileOrder differs: tile=%d group_size=%d", t, group_size);
            }
          }
        }
}

void test_l2_group_size() {
  const int64_t mib = 1 << 20;
  for (int heads_per_kv_head : {1, 4, 8})
    for (int64_t kv_bytes : {mib / 4, mib, 5 * mib, 100 * mib}) {
      const int group = l2_group_size(kv_bytes, heads_per_kv_head, 50 * mib);
      const auto bytes = [&](int heads) {
        return (heads + heads_per_kv_head - 1) / heads_per_kv_head * kv_bytes;
      };
      CHECK(group >= 1 && (group & (group - 1)) == 0, "power of two: %d", group);
      CHECK(group == 1 || bytes(group) <= 50 * mib, "does not fit: %d", group);
      CHECK(group == 1024 || bytes(2 * group) > 50 * mib, "could be larger: %d", group);
    }
}

void test_varlen_tiles() {
  const std::vector<std::vector<int>> cases = {
      {},        {0},       {5},           {0, 0, 0},         {1, 0, 7, 16, 0, 33},
      {0, 4, 8}, {3, 3, 3}, {64, 1, 0, 1}, {0, 0, 100, 0, 0}, {1, 1, 1, 1, 1, 1, 1, 1}};
  for (const std::vector<int>& lengths : cases)
    for (int tile_m : {1, 4, 16})
      for (int num_heads : {1, 3}) {
        std::vector<int> cu_seqlens{0};
        for (int length : lengths) cu_seqlens.push_back(cu_seqlens.back() + length);
        const int batch_size = static_cast<int>(lengths.size());
        std::set<Tile> expected, seen;
        for (int batch = 0; batch < batch_size; ++batch)
          for (int m_block = 0; m_block < ceil_div(lengths[batch], tile_m); ++m_block)
            for (int head = 0; head < num_heads; ++head) expected.insert({batch, head, m_block});
        const int64_t tiles = varlen_num_tiles(cu_seqlens.back(), batch_size, tile_m, num_heads);
        int64_t idle = 0;
        int last_batch = 0, last_m_block = 1 << 30;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const TileCoord c =
              varlen_tile_coord(cu_seqlens.data(), batch_size, tile_m, num_heads, tile);
          if (c.m_block < 0) {
            ++idle;
            continue;
          }
          CHECK(seen.insert({c.batch, c.head, c.m_block}).second, "twice: tile=%d",
                static_cast<int>(tile));
          const bool ordered = c.batch > last_batch || c.m_block <= last_m_block;
          CHECK(c.batch >= last_batch && ordered, "order: tile=%d", static_cast<int>(tile));
          last_batch = c.batch;
          last_m_block = c.m_block;
        }
        CHECK(seen == expected, "tile_m=%d heads=%d: %zu tiles, expected %zu", tile_m, num_heads,
              seen.size(), expected.size());
        CHECK(idle <= static_cast<int64_t>(batch_size) * num_heads, "idle");
      }
}

// Tiles of dq_accum: those of a sequence hold its queries, nobody else's, and lie inside.
void test_bwd_workspace() {
  for (int tile_m : {1, 4, 7})
    for (bool varlen : {false, true})
      for (const std::vector<int>& lengths :
           {std::vector<int>{5, 5, 5}, {4, 4}, {0, 0}, {1}, {}, {3, 0, 8, 1, 7}}) {
        const int batch_size = static_cast<int>(lengths.size());
        const int seqlen_q = lengths.empty() ? 0 : lengths[0];
        int begin = 0;
        int64_t next = 0;  // first row that no sequence before has taken
        for (int batch = 0; batch < batch_size; ++batch) {
          const int64_t first = bwd_dq_accum_first_row(varlen, batch, seqlen_q, begin, tile_m);
          CHECK(first % tile_m == 0 && first >= next, "batch=%d: %d", batch,
                static_cast<int>(first));
          const int length = varlen ? lengths[batch] : seqlen_q;
          next = first + round_up(length, tile_m);
          begin += length;
        }
        const int total_q = begin + (varlen ? 3 : 0);  // rows behind the last sequence
        const int64_t rows = bwd_dq_accum_rows(varlen, batch_size, seqlen_q, total_q, tile_m);
        CHECK(next <= rows && rows % tile_m == 0, "rows %d", static_cast<int>(rows));
        CHECK((bwd_dq_semaphores(rows, 3, tile_m) - 1) * tile_m == rows * 3, "semaphores");
      }
}

// `workers` CTAs take the tiles of keys of a head as they are dealt out, from the last one down,
// and walk. Every tile of queries is added to by all that see it, one after the other, and nobody
// waits for ever; in a circle, with a worker for each, nobody waits at all.
void check_bwd_order(const BwdOrder& order, int workers) {
  struct Walk {
    int n_block, m_block, steps_left;
    BlockRange blocks;
  };
  const int num_m_blocks = ceil_div(order.mask.seqlen_q, order.tile_m);
  std::vector<int> added(num_m_blocks, 0);
  std::vector<Walk> walks;
  int next = order.num_n_blocks - 1, rounds = 0, longest = 0;
  const char* text = "sq=%d sk=%d left=%d right=%d n_block=%d m_block=%d";
  while (next >= 0 || !walks.empty()) {
    while (next >= 0 && static_cast<int>(walks.size()) < workers) {
      const BlockRange blocks = m_block_range(order.mask, next, order.tile_m, order.tile_n);
      const int size = blocks.size(), first = order.first_step(next, size);
      if (size > 0) walks.push_back({next, blocks.begin + first, size, blocks});
      longest = std::max(longest, size);
      --next;
    }
    if (walks.empty()) break;
    const std::vector<int> before = added;  // of this round
    bool any = false;
    for (Walk& w : walks) {
      const BwdTurn turn = order.turn(w.n_block, w.m_block);
      CHECK(0 <= turn.before && turn.before < turn.count, text, order.mask.seqlen_q,
            order.mask.seqlen_k, order.mask.window_left, order.mask.window_right, w.n_block,
            w.m_block);
      if (before[w.m_block] != turn.before) continue;
      any = true;
      ++added[w.m_block];
      w.m_block = w.m_block + 1 < w.blocks.end ? w.m_block + 1 : w.blocks.begin;
      --w.steps_left;
    }
    ++rounds;
    CHECK(any, "nobody has a turn: sq=%d sk=%d", order.mask.seqlen_q, order.mask.seqlen_k);
    if (!any) return;
    walks.erase(
        std::remove_if(walks.begin(), walks.end(), [](const Walk& w) { return w.steps_left == 0; }),
        walks.end());
  }
  for (int m_block = 0; m_block < num_m_blocks; ++m_block) {
    const BlockRange range = n_block_range(order.mask, m_block, order.tile_m, order.tile_n);
    const int count = std::max(0, std::min(range.end, order.num_n_blocks) - range.begin);
    CHECK(added[m_block] == count, text, order.mask.seqlen_q, order.mask.seqlen_k,
          order.mask.window_left, order.mask.window_right, -1, m_block);
    if (count > 0)
      CHECK(order.turn(range.begin, m_block).count == count, text, order.mask.seqlen_q,
            order.mask.seqlen_k, -1, -1, range.begin, m_block);
  }
  if (order.is_circle() && num_m_blocks >= order.num_tiles())
    CHECK(rounds == longest, "waits: sq=%d sk=%d", order.mask.seqlen_q, order.mask.seqlen_k);
}

void test_bwd_order() {
  for (int seqlen_q : {1, 4, 7, 16, 31, 64})
    for (int seqlen_k : {1, 8, 9, 24, 40, 64})
      for (int window_left : {kUnbounded, 0, 5, 20})
        for (int window_right : {kUnbounded, 0, 6}) {
          const MaskSpec mask = mask_spec(seqlen_q, seqlen_k, window_left, window_right);
          const int tiles = ceil_div(seqlen_k, 8);
          for (int missing : {0, 1}) {
            const int launched = std::max(1, tiles - missing);
            check_bwd_order({mask, 4, 8, launched, true}, launched);
            for (int workers : {1, 2, launched})
              check_bwd_order({mask, 4, 8, launched, false}, workers);
          }
        }
}

void test_seqlen_info() {
  const std::vector<int> lengths{3, 0, 7, 5};
  std::vector<int> cu_seqlens{0}, used{2, 0, 9, -1}, leftpad{1, 0, 4, 9};
  for (int length : lengths) cu_seqlens.push_back(cu_seqlens.back() + length);
  for (bool varlen : {false, true})
    for (bool with_used : {false, true})
      for (bool with_leftpad : {false, true})
        for (int batch = 0; batch < 4; ++batch) {
          const SeqlenArgs args{varlen ? cu_seqlens.data() : nullptr,
                                with_used ? used.data() : nullptr,
                                with_leftpad ? leftpad.data() : nullptr, 6};
          const SeqlenInfo info = seqlen_info(args, batch);
          const int stored = varlen ? lengths[batch] : 6;
          int end = stored;
          if (with_used) end = std::max(0, std::min(used[batch], stored));
          int begin = 0;
          if (with_leftpad) begin = std::min(leftpad[batch], end);
          CHECK(info.seqlen == end - begin && info.leftpad == begin, "batch=%d: %d", batch,
                info.seqlen);
          CHECK(info.first_row == (varlen ? cu_seqlens[batch] : 0) + begin, "first_row batch=%d",
                batch);
        }
}

void test_element_offsets_are_64_bit() {
  CHECK(element_offset(int64_t{1} << 40, 1 << 20, 1 << 10, 7, int64_t{1} << 21, 5) ==
            7 * (int64_t{1} << 40) + (int64_t{1} << 41) + 5 * 1024,
        "element_offset");
  CHECK(page_element_offset({1 << 20, 3}, 1 << 16, 1 << 10, 128, 2) ==
            (int64_t{1} << 36) + 3 * 1024 + 256,
        "page_element_offset");
}

// Tokens gathered through the table equal the tokens written; entries past the length are garbage
// that must not be touched (the sanitizer sees a read past the pages).
void test_page_table() {
  for (int page_size : {1, 2, 3, 7, 16, 64})
    for (int seqlen : {0, 1, 6, 7, 8, 50}) {
      const int used_pages = num_pages_used(seqlen, page_size);
      CHECK(used_pages * page_size >= seqlen && (used_pages - 1) * page_size < std::max(seqlen, 1),
            "num_pages_used size=%d len=%d", page_size, seqlen);
      std::vector<int> table(used_pages);
      for (int i = 0; i < used_pages; ++i) table[i] = (used_pages - 1 - i) * 2 + 1;
      std::vector<int> pool(2 * used_pages * page_size, -1);
      for (int token = 0; token < seqlen; ++token)
        pool[table[token / page_size] * page_size + token % page_size] = token;
      for (int token = 0; token < seqlen; ++token) {
        const PageSlot slot = page_slot(table.data(), page_size, token);
        CHECK(slot.offset < page_size, "offset");
        CHECK(pool[page_element_offset(slot, page_size, 1, 0, 0)] == token, "size=%d token=%d",
              page_size, token);
        const int run = tokens_left_in_page(token, page_size);
        CHECK(run >= 1 && (token + run) % page_size == 0 && run <= page_size, "run");
      }
    }
}

// Every divisor up to 2^31 - 1 in steps, at the numbers around its multiples where rounding shows.
void test_fast_div() {
  std::vector<int> divisors, numbers;
  for (int d = 1; d <= 4096; ++d) divisors.push_back(d);
  for (int64_t power = 4096; power <= 1 << 30; power *= 2)
    for (int64_t d : {power - 1, power, power + 1, power / 3 * 4 + 7})
      if (d < 0x7FFFFFFF) divisors.push_back(static_cast<int>(d));
  divisors.push_back(0x7FFFFFFF);
  for (int d : divisors) {
    const FastDiv fast(d);
    const int64_t largest_multiple = 0x7FFFFFFF / d * int64_t{d};
    for (int64_t n : {int64_t{0}, int64_t{1}, int64_t{d} - 1, int64_t{d}, int64_t{d} + 1,
                      largest_multiple - 1, largest_multiple, int64_t{0x7FFFFFFF}}) {
      if (n < 0 || n > 0x7FFFFFFF) continue;
      const int i = static_cast<int>(n);
      const QuotientRemainder qr = divide(i, fast);
      CHECK(qr.quotient == i / d && qr.remainder == i % d, "%d / %d", i, d);
    }
  }
}

void test_integer_helpers() {
  for (int a = 0; a < 70; ++a)
    for (int b = 1; b < 20; ++b) {
      const int up = round_up(a, b), down = round_down(a, b);
      CHECK(up % b == 0 && up >= a && up - a < b && ceil_div(a, b) * b == up, "a=%d b=%d", a, b);
      CHECK(down % b == 0 && down <= a && a - down < b, "a=%d b=%d", a, b);
    }
  for (int a = 1; a < 300; ++a) {
    const int p = next_power_of_two(a);
    CHECK((p & (p - 1)) == 0 && p >= a && p < 2 * a, "a=%d", a);
  }
  CHECK(clamp(5, 0, 3) == 3 && clamp(-5, 0, 3) == 0 && clamp(2, 0, 3) == 2, "clamp");
}

void test_split_work() {
  for (int total = 1; total < 90; ++total)
    for (int num_ctas : {1, 2, 3, 7, 40, 300})
      for (int max_splits : {0, 2, 3, 9})
        for (int longest = 1; longest <= total; longest += longest < 9 ? 1 : 13) {
          const bool evenly = longest % 2 == 0;
          const WorkSplit split = split_work(total, num_ctas, max_splits, longest, evenly);
          const int parts = split.num_parts();
          CHECK(1 <= parts && parts <= num_ctas, "parts total=%d longest=%d", total, longest);
          CHECK(split.begin(0) == 0 && split.begin(parts) == total, "covers total=%d", total);
          for (int part = 0; part < parts; ++part) {
            CHECK(split.begin(part) < split.begin(part + 1), "empty part total=%d", total);
            for (int at = split.begin(part); at < split.begin(part + 1); ++at)
              CHECK(split.part_of(at) == part, "part_of total=%d at=%d", total, at);
          }
          if (evenly && max_splits < 2)
            CHECK(split.per_part == ceil_div(total, num_ctas), "even total=%d", total);
          // A whole number of the longest tiles to a part, or of parts to such a tile.
          if (!evenly && max_splits < 2 && total % longest == 0) {
            int cut = 0;
            for (int part = 1; part < parts; ++part) cut += split.begin(part) % longest != 0;
            const int to_a_tile = ceil_div(longest, split.per_part);
            CHECK(cut == 0 || longest % split.per_part != 0 ||
                      cut == (to_a_tile - 1) * (total / longest),
                  "cut total=%d longest=%d", total, longest);
          }
          if (max_splits < 2) continue;
          for (int tile = 0; tile + longest <= total; ++tile)
            CHECK(split.part_of(tile + longest - 1) - split.part_of(tile) + 1 <= max_splits,
                  "splits total=%d longest=%d max=%d", total, longest, max_splits);
        }
}

// No more CTAs than the device holds, and of as many as it says for tiles of equal length, none
// cuts a tile but into equal parts, unless a tenth of the device would idle.
void test_decode_num_ctas() {
  for (int num_sms : {1, 78, 108, 132})
    for (int per_sm : {1, 2})
      for (int tile_m : {kDecodeFewRows, kDecodeManyRows})
        for (int head_dim : {64, 128, 256})
          for (int blocks : {1, 16, 1000})
            for (int tiles = 1; tiles < 1200; tiles += tiles < 300 ? 1 : 37) {
              const int most = per_sm * num_sms;
              const int64_t ctas = decode_num_ctas(
                  {DecodeCtas::kDeep, tile_m, head_dim, tiles, int64_t{tiles} * blocks}, num_sms,
                  per_sm);
              CHECK(1 <= ctas && ctas <= most, "tiles=%d sms=%d", tiles, num_sms);
              const bool whole =
                  tiles >= ctas && ceil_div(tiles, ceil_div<int>(tiles, ctas)) == ctas;
              CHECK(ctas % tiles == 0 || whole || ctas == most, "cut: tiles=%d sms=%d", tiles,
                    num_sms);
              CHECK(2 * ctas > num_sms || tiles > ctas, "idle: tiles=%d sms=%d", tiles, num_sms);
            }
}

// Every position is in one share; whole tiles in the rounds, and few parts of one in the rest.
void test_decode_rounds() {
  for (int num_ctas : {1, 2, 7, 132})
    for (int num_tiles = 1; num_tiles < 6 * num_ctas; num_tiles += 1 + num_ctas / 20)
      for (int length : {1, 2, 3, 67, 140})
        for (bool evenly : {false, true}) {
          const int total = num_tiles * length;
          const WorkSplit split = split_work(total, num_ctas, 0, length, evenly);
          const DecodeRounds rounds = decode_rounds(split, num_tiles, length);
          std::vector<int> owner(total, -1);
          for (int round = 0; round <= rounds.num_rounds; ++round)
            for (int cta = 0; cta < split.num_parts(); ++cta) {
              const Range share = rounds.share(round, cta);
              CHECK(round == rounds.num_rounds || share.size() == length, "tiles=%d", num_tiles);
              for (int at = share.begin; at < share.end; ++at) {
                CHECK(owner[at] == -1, "twice: tiles=%d length=%d at=%d", num_tiles, length, at);
                owner[at] = cta;
                if (round == rounds.num_rounds)
                  CHECK(rounds.rest_cta(at) == cta, "rest_cta tiles=%d at=%d", num_tiles, at);
              }
            }
          for (int at = 0; at < total; ++at)
            CHECK(owner[at] >= 0, "nobody: tiles=%d length=%d at=%d", num_tiles, length, at);
          CHECK(rounds.share(rounds.num_rounds + 1, 0).size() == 0, "tiles=%d", num_tiles);
          if (rounds.num_rounds == 0) continue;
          const int most_cuts = split.per_part % length == 0 ? 0 : 2;
          for (int at = rounds.rest_begin(); at < total; at += length)
            CHECK(rounds.rest_cta(at + length - 1) - rounds.rest_cta(at) <= most_cuts,
                  "parts: tiles=%d length=%d", num_tiles, length);
        }
  CHECK(decode_rounds({100, 10}, 19, 5).num_rounds == 0, "tiles differ");
  CHECK(decode_rounds({100, 5}, 20, 5).num_rounds == 0, "a tile each");
}

// Whatever the order in which parts come, one of them is left, with all.
void test_merge_nodes() {
  for (int num_parts = 1; num_parts <= 40; ++num_parts)
    for (int seed = 0; seed < 7; ++seed) {
      std::vector<int> meets(num_parts, -1);  // the level whose siblings meet at a part
      std::vector<bool> has_come(num_parts, false);
      std::vector<int> count(num_parts, 1);  // parts in the results of each
      int num_left = 0;
      for (int i = 0; i < num_parts; ++i) {
        const int part =
            seed < 2 ? (seed == 0 ? i : num_parts - 1 - i) : (i * 41 + seed) % num_parts;
        int own = 1;
        MergeNode node{part, num_parts, 1};
        for (; !node.is_root(); node = node.parent()) {
          if (!node.has_sibling()) continue;
          const int at = node.part_to_meet_at();
          CHECK(0 < at && at < num_parts && (meets[at] == -1 || meets[at] == node.stride),
                "parts=%d at=%d", num_parts, at);
          meets[at] = node.stride;
          if (!has_come[at]) {
            has_come[at] = true;
            count[node.first_part()] = own;
            break;
          }
          own += count[node.first_part_of_sibling()];
        }
        if (!node.is_root()) continue;
        ++num_left;
        CHECK(own == num_parts, "parts=%d own=%d", num_parts, own);
      }
      CHECK(num_left == 1, "parts=%d left=%d", num_parts, num_left);
    }
}

// Rows of all heads of a group, packed into tiles: every row is in one tile.
void test_packed_m_blocks() {
  for (int queries = 0; queries < 40; ++queries)
    for (int group : {1, 3, 8, 20})
      for (int tile_m : {16, 64}) {
        const int tiles = packed_m_blocks(queries, group, tile_m);
        CHECK(tiles * tile_m >= queries * group && (tiles - 1) * tile_m < max(queries * group, 1),
              "queries=%d group=%d tile_m=%d", queries, group, tile_m);
      }
}

// As many CTAs as the plan counts on fit an SM of 228 KB, 1 KB of each taken by the system and room
// for what a CTA has beside. Deep ones fit a GPU of 100 KB, and so do small ones, which stand in
// for wide ones there. SM90 tells them apart by their threads.
void test_decode_smem() {
  constexpr int kStatic = 512, kSystem = 1024;
  for (int head_dim : {64, 96, 128, 192, 256}) {
    for (DecodeCtas ctas : {DecodeCtas::kDeep, DecodeCtas::kSmall, DecodeCtas::kWide}) {
      const DecodeConfig config = decode_config(head_dim, ctas);
      CHECK(config.num_units >= 2, "head_dim=%d", head_dim);
      CHECK(config.tile_n % (16 * config.num_warps) == 0 && config.tile_n <= 32 * config.num_warps,
            "keys of a warp: head_dim=%d", head_dim);
      for (int tile_m : {kDecodeFewRows, kDecodeManyRows}) {
        const int bytes = decode_smem_bytes(head_dim, tile_m, ctas);
        CHECK(config.ctas_per_sm * (bytes + kStatic + kSystem) <= 228 * 1024,
              "head_dim=%d tile_m=%d ctas=%d", head_dim, tile_m, static_cast<int>(ctas));
        CHECK(ctas == DecodeCtas::kWide || bytes + kStatic <= kSmemBytes99, "head_dim=%d",
              head_dim);
        if (ctas != DecodeCtas::kDeep) break;  // few rows only
      }
    }
    CHECK(decode_result_words(head_dim) % 4 == 0, "head_dim=%d", head_dim);
    const DecodeCtas few = sm90_decode_ctas(head_dim, DecodeTiles::kFew);
    const DecodeCtas many = sm90_decode_ctas(head_dim, DecodeTiles::kMany);
    CHECK(few == many || decode_config(head_dim, few).num_threads() !=
                             decode_config(head_dim, many).num_threads(),
          "head_dim=%d", head_dim);
  }
}

}  // namespace

int main() {
  test_split_work();
  test_decode_num_ctas();
  test_decode_rounds();
  test_merge_nodes();
  test_packed_m_blocks();
  test_decode_smem();
  test_integer_helpers();
  test_fast_div();
  test_split_range();
  test_split_blocks();
  test_choose_num_splits();
  test_tile_coord();
  test_l2_group_size();
  test_varlen_tiles();
  test_bwd_workspace();
  test_bwd_order();
  test_seqlen_info();
  test_element_offsets_are_64_bit();
  test_page_table();
  return report();
}
