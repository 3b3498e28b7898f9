// Arguments of every kernel family: plain structs, filled by bindings/, read by kernels/.
//
// Rules: every pointer states shape, order, unit and whether it may be null; strides are in
// elements and 64-bit; the last dimension is always contiguous and has no stride. They cross the
// boundary between the binder and a kernel library, so a change here raises kKernelAbiVersion.
#pragma once
#include <cstdint>

#include "core/arch.h"
#include "core/dtype.h"
#include "core/host_device.h"
#include "core/seqlen.h"
#include "core/tile_config.h"

namespace fa {

// Raised with every change of a struct below, of core/value_checks.h or of core/backend.h: a
// library built from other sources is refused instead of being called with the wrong layout.
constexpr uint32_t kKernelAbiVersion = 10;

// Strides of a [batch, token, head, dim] tensor, elements. Varlen ([total, head, dim]): batch == 0.
struct Strides {
  int64_t batch, token, head;
};

// What attention does to the scores, the same for forward and backward.
struct ScoreParams {
  float softmax_scale;
  float softcap;               // scores become softcap * tanh(score / softcap); 0: off
  int window_left;             // keys before the diagonal; kUnbounded: all
  int window_right;            // keys after it; 0: causal
  int keep_threshold;          // of 256, core/philox.h; 256: no dropout
  int64_t alibi_batch_stride;  // elements between the slopes of two sequences; 0: shared
  const float* alibi_slopes;   // [num_heads_q] or [batch_size, num_heads_q]; nullptr: none
  const int64_t* rng_state;    // [2] = seed, offset; nullptr iff keep_threshold == 256
};

// Attention forward: out = softmax(q k^T) v and lse.
struct FwdParams {
  const void* q;  // [batch_size, seqlen_q, num_heads_q, head_dim], or [total_q, ...]
  const void* k;  // [batch_size, seqlen_k, num_heads_kv, head_dim], or [total_k, ...]
  const void* v;  // [batch_size, seqlen_k, num_heads_kv, head_dim_v], or [total_k, ...]
  void* out;      // [batch_size, seqlen_q, num_heads_q, head_dim_v], or [total_q, ...]
  float* lse;     // [batch_size, num_heads_q, seqlen_q], or [num_heads_q, total_q]; contiguous
  void* dmask;    // [batch_size, num_heads_q, dmask_rows, dmask_cols], dtype, contiguous, zeroed;
                  // nullptr: not asked for

  Strides q_strides, k_strides, v_strides, out_strides;
  SeqlenArgs seqlens_q, seqlens_k;
  ScoreParams score;

  int batch_size, num_heads_q, num_heads_kv;
  int head_dim, head_dim_v;  // multiples of 8; rows start at multiples of 16 bytes
  int total_q, total_k;      // rows in all; fixed length: batch_size * seqlen
  int dmask_rows, dmask_cols;
  int sm_margin;  // SMs that a persistent kernel leaves free
  DType dtype;
  Arch tiles;             // which rows of core/tile_config.h to launch
  Sm90FwdTile sm90_tile;  // and of SM90's which one
};

// Attention backward: gradients of q, k, v. The kernels keep K and V and stream Q and dO, so that
// dK and dV are complete in one CTA; dQ is added up in fp32 in dq_accum and rounded by a last
// kernel, or by whoever adds last, or needs no adding where one tile has all keys of a sequence.
// Where that gives too few CTAs, head_splits of them share the query heads of a KV head, and dK and
// dV are added up likewise.
struct BwdParams {
  const void* dout;  // [batch_size, seqlen_q, num_heads_q, head_dim_v], or [total_q, ...]
  const void* q;     // shapes as in the forward
  const void* k;
  const void* v;
  const float* lse;    // [batch_size, num_heads_q, seqlen_q], or [num_heads_q, total_q]; contiguous
  const float* delta;  // rowsum(dout * out) - dlse, shape of lse
  void* dq;            // shape of q; every row is written
  void* dk;            // shape of k
  void* dv;            // shape of v
  float* dq_accum;     // bwd_dq_accum_elements() of core/bwd_workspace.h, zeroed; see complete_dq
  int* dq_semaphore;   // bwd_dq_semaphores(), zeroed; nullptr: no dq_accum, or neither
                       // deterministic nor complete_dq
  float* dk_accum;     // [total_k, num_heads_kv, head_dim], zeroed; nullptr: head_splits is 1
  float* dv_accum;     // [total_k, num_heads_kv, head_dim_v], the same
  int* dkv_semaphore;  // bwd_dkv_semaphores(), zeroed; nullptr: not deterministic, or no dk_accum

  Strides dout_strides, q_strides, k_strides, v_strides, dq_strides, dk_strides, dv_strides;
  SeqlenArgs seqlens_q, seqlens_k;
  ScoreParams score;

  int batch_size, num_heads_q, num_heads_kv;
  int head_dim, head_dim_v;  // multiples of 8; rows start at multiples of 16 bytes
  int total_q, total_k;      // rows in all; fixed length: batch_size * seqlen
  int head_splits;           // CTAs that share the query heads of a KV head, which it divides
  int sm_margin;             // SMs that a persistent kernel leaves free
  bool complete_dq;          // the kernel writes dq: dq_accum need not be zero, and if one tile has
                             // all keys of a sequence, it is not used
  DType dtype;
  Arch tiles;  // which rows of core/tile_config.h to launch
};

// Merges num_splits partial results of the same rows by their LSE.
struct CombineParams {
  const float* out_partial;  // [num_splits, batch_size, seqlen, num_heads, head_dim_v]
  const float* lse_partial;  // [num_splits, batch_size, seqlen, num_heads], natural log
  void* out;                 // [batch_size, seqlen, num_heads, head_dim_v], out_dtype
  float* lse;                // [batch_size, seqlen, num_heads], contiguous

  int64_t out_partial_split_stride, lse_partial_split_stride, lse_partial_head_stride;
  Strides out_partial_strides, out_strides;
  int64_t lse_partial_batch_stride, lse_partial_token_stride;

  int num_splits, batch_size, seqlen, num_heads, head_dim_v;
  DType out_dtype;
  bool vectorized;  // rows of out_partial and out start at multiples of 16 bytes, and head_dim_v is
                    // a multiple of kCombineVec
};

// delta = rowsum(dout * out) - dlse: what the backward subtracts from dP.
struct BwdPreprocessParams {
  const void* out;    // [batch_size, seqlen, num_heads, head_dim_v], dtype
  const void* dout;   // same shape
  const float* dlse;  // [batch_size, num_heads, seqlen]; nullptr: zero
  float* delta;       // [batch_size, num_heads, seqlen], contiguous

  Strides out_strides, dout_strides;
  int64_t dlse_batch_stride, dlse_head_stride, dlse_token_stride;

  int batch_size, seqlen, num_heads, head_dim_v;  // varlen: batch_size 1, seqlen = total
  DType dtype;
  bool vectorized;  // rows of out and dout start at multiples of 16 bytes and hold whole 16 bytes
};

// Where the angle of a token comes from: row `position` of the tables.
struct RotaryTable {
  const void* cos;  // [num_positions, rotary_dim / 2], dtype of the rotated tensor
  const void* sin;  // same shape
  int64_t row_stride;
  int num_positions;  // a position outside [0, num_positions) is not rotated
  int rotary_dim;     // even; 0: no rotary embedding
  bool interleaved;   // pairs (2 i, 2 i + 1) instead of (i, i + rotary_dim / 2)
  bool conjugate;     // rotate backwards
};

// Rotates the first rotary_dim elements of every head and copies the others.
struct RotaryParams {
  const void* x;  // [batch_size, seqlen, num_heads, head_dim] or [total, num_heads, head_dim]
  void* out;      // same shape; out == x: in place, elements past rotary_dim are not touched
  const int* seqlen_offsets;  // [batch_size], position of each sequence's first token; nullptr: 0
  const int* cu_seqlens;      // [batch_size + 1], tokens; nullptr: fixed length

  Strides x_strides, out_strides;
  RotaryTable table;

  int batch_size, num_heads, head_dim;
  int seqlen;  // tokens of each sequence; varlen: of all together
  DType dtype;
  bool same_position;  // every token of a sequence has position seqlen_offsets[batch]
  bool vectorized;     // rows of x, out, cos, sin and both halves start at multiples of 16 bytes
};

// Writes new keys and values behind those in the cache, keys rotated if the table has a dimension,
// and rotates queries in the same launch.
struct AppendKvParams {
  const void* k;  // [batch_size, seqlen_new, num_heads_kv, head_dim] or [total_new, ...]
  const void* v;  // [batch_size, seqlen_new, num_heads_kv, head_dim_v] or [total_new, ...]
  void* k_cache;  // [num_caches, cache_len, num_heads_kv, head_dim], or paged
                  // [num_pages, page_size, num_heads_kv, head_dim]
  void* v_cache;  // the same with head_dim_v
  const int* cache_seqlens;    // [batch_size], tokens already in the cache
  const int* cache_batch_idx;  // [batch_size], row of the cache or page table; nullptr: batch
  const int* page_table;       // [num_caches, max_pages], page of each page_size tokens;
                               // nullptr: not paged
  const int* cu_seqlens_new;   // [batch_size + 1], tokens; nullptr: fixed length
  const int* rotary_seqlens;   // [batch_size], position of the first new key; nullptr:
                               // cache_seqlens

  Strides k_strides, v_strides;
  Strides k_cache_strides, v_cache_strides;  // .batch: between caches or pages
  int64_t page_table_batch_stride;
  RotaryTable table;

  int batch_size, num_heads_kv, head_dim, head_dim_v;
  int seqlen_new;  // new tokens of each sequence; varlen: of all together
  int num_caches;  // size of the caches' first dimension: caches, or pages when paged
  int cache_len;   // tokens that one cache holds: its length, or max_pages * page_size
  int page_size;   // tokens of a page; 0: not paged
  int page_table_rows;
  DType dtype;
  bool vectorized;       // rows of all tensors and both halves start at multiples of 16 bytes
  RotaryParams queries;  // x is nullptr: none; vectorized as the others
};

// sum = dropout(x * rowscale) + residual, out = normalise(sum) * weight + bias, in fp32.
struct NormFwdParams {
  const void* x;             // [rows, hidden_size], dtype
  const void* residual;      // [rows, hidden_size], sum_dtype; nullptr: none
  const void* weight;        // [hidden_size], dtype or fp32
  const void* bias;          // [hidden_size], as weight; nullptr: none
  const float* rowscale;     // [rows]; nullptr: 1
  const int64_t* rng_state;  // [2] = seed, offset; nullptr iff keep_threshold == kNormKeepAll
  void* out;                 // [rows, hidden_size], dtype, contiguous
  void* sum;                 // [rows, hidden_size], sum_dtype, contiguous; nullptr: not asked for
  float* mean;               // [rows]; nullptr: RMSNorm, which subtracts none
  float* rstd;               // [rows], 1 / sqrt(variance + eps), or of the mean square

  int64_t rows, x_stride, residual_stride;  // strides: elements between rows
  int hidden_size;
  int max_smem_bytes;  // that a CTA may have
  int keep_threshold;  // of 65536, core/norm.h
  float eps;
  float weight_offset;     // added to every weight
  DType dtype, sum_dtype;  // sum_dtype: dtype or fp32
  bool weight_is_fp32;
  bool vectorized;  // rows of all tensors start at multiples of 16 bytes, and hidden_size is a
                    // multiple of kNormVec
};

// The gradients of x, residual, weight and bias.
struct NormBwdParams {
  const void* dout;          // [rows, hidden_size], dtype
  const void* sum;           // [rows, hidden_size], sum_dtype: what was normalised
  const void* dsum;          // [rows, hidden_size], sum_dtype, gradient of sum; nullptr: 0
  const void* weight;        // [hidden_size], dtype or fp32
  const float* rowscale;     // [rows]; nullptr: 1
  const int64_t* rng_state;  // as in the forward
  const float* mean;         // [rows]; nullptr: RMSNorm
  const float* rstd;         // [rows]
  void* dx;                  // [rows, hidden_size], dtype, contiguous
  void* dresidual;           // [rows, hidden_size], sum_dtype, contiguous; nullptr: not asked for
  void* dweight;             // [hidden_size], as weight
  void* dbias;               // [hidden_size], as weight; nullptr: no bias
  float* partial;  // [2, num_ctas, norm_partial_stride()] of core/norm.h: of weight and of
                   // bias

  int64_t rows, dout_stride, sum_stride, dsum_stride;
  int hidden_size;
  int num_ctas;        // at most
  int max_smem_bytes;  // that a CTA may have
  int keep_threshold;
  float weight_offset;
  DType dtype, sum_dtype;
  bool weight_is_fp32;
  bool vectorized;  // as in the forward
};

// loss = lse - (1 - smoothing) * s[label] - smoothing * mean(s) + z_loss, s = logits * logit_scale,
// z_loss = lse_square_scale * lse^2.
struct CrossEntropyParams {
  const void* logits;      // [rows, vocabulary], dtype
  const void* labels;      // [rows], int64 or int32; outside [0, vocabulary): the results are NaN
  const float* given_lse;  // [rows]: used instead of the sum over the logits; nullptr: none
  float* loss;             // [rows]
  float* z_loss;           // [rows]
  float* lse;              // [rows], natural log of s; the backward reads it
  const float* dloss;      // backward: [rows]
  void* dlogits;           // backward: [rows, vocabulary], dtype; may be logits

  int64_t rows, logits_stride, dlogits_stride, labels_stride, dloss_stride;
  int64_t ignore_index;  // rows with this label have no loss and no gradient
  int vocabulary;
  float smoothing, logit_scale, lse_square_scale;
  bool labels_are_int64;
  DType dtype;
};

// Attention against a KV cache, few queries to many keys: the forward over contiguous caches or
// pages. Lengths are read on the device only.
struct DecodeParams {
  const void* q;   // [batch_size, seqlen_q, num_heads_q, head_dim], or [total_q, ...]
  const void* k;   // [num_caches, cache_len, num_heads_kv, head_dim], or paged
                   // [num_caches, page_size, num_heads_kv, head_dim]
  const void* v;   // the same with head_dim_v
  void* out;       // [batch_size, seqlen_q, num_heads_q, head_dim_v], or [total_q, ...]
  float* lse;      // [batch_size, num_heads_q, seqlen_q], or [num_heads_q, total_q]; contiguous
  float* partial;  // [decode_workspace_words()] of core/tile_config.h; nullptr: num_splits is 1

  Strides q_strides, k_strides, v_strides, out_strides;  // k, v: .batch between caches or pages
  SeqlenArgs seqlens_q;
  SeqlenArgs seqlens_k;  // seqused: tokens in the cache, leftpad and appended ones included, but
                         // for the next two; max_seqlen: tokens that one cache holds
  const int* cu_seqlens_new;  // [batch_size + 1]: each length of seqused grows by the difference;
                              // nullptr: by seqlen_new
  int seqlen_new;
  const int* cache_batch_idx;  // [batch_size], row of the cache or page table; nullptr: batch
  const int* page_table;       // [page_table_rows, max_pages]; nullptr: not paged
  int64_t page_table_batch_stride;
  ScoreParams score;

  int batch_size, num_heads_q, num_heads_kv;
  int head_dim, head_dim_v;  // multiples of 8; rows start at multiples of 16 bytes
  int total_q;               // rows in all; fixed length: batch_size * seqlen_q
  int num_caches;            // size of the caches' first dimension: caches, or pages when paged
  int page_size;             // tokens of a page; 0: not paged
  int page_table_rows;
  int tile_m;       // kDecodeFewRows, kDecodeManyRows, or SM90's kDecodeWgmmaRows
  int tile_n;       // keys of a block
  int num_threads;  // of a CTA: which of SM90's CTAs for few rows
  int num_ctas;     // that share out the keys, for which `partial` has room
  int num_splits;   // 0: keys are shared out evenly; 1: no tile is split; n: into n parts at most
  DType dtype;
  bool overlaps;  // kDecodeWgmmaRows: begins while the launch before it ends, which writes new keys
                  // or q and neither lengths nor tables, and waits for it

  // The launch itself writes new keys and values into the caches, vectorized, and reads them where
  // they are; it rotates keys and queries if the table has a dimension. append.k is nullptr: not.
  AppendKvParams append;
  bool same_position;  // every query has the position of the first new key
};

}  // namespace fa
