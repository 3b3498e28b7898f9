// make_plan, and the GPUs that it can be asked about by name.
#include "plan/plan.h"

#include <limits>
#include <utility>

#include "core/row_kernels.h"
#include "core/token_tile.h"

namespace fa {
namespace {

using Reasons = std::vector<std::string>;

constexpr int kMaxExtent = 1 << 30;  // of one dimension: positions and differences stay inside int
constexpr int kMaxHeads = 1 << 20;   // times the units of a row still inside int
constexpr int64_t kMaxRows = int64_t{1} << 48;  // heads of all tokens: beyond any memory, and
                                                // times 2 * kMaxRowHeadDim still inside int64_t
constexpr int64_t kMaxCombineRows = std::numeric_limits<int>::max();  // its row index is int
constexpr int64_t kMaxCtas = std::numeric_limits<int>::max();         // gridDim.x

// "what=got: limit".
std::string refusal(const std::string& what, int64_t got, const std::string& limit) {
  return what + "=" + std::to_string(got) + ": " + limit;
}

void check_range(Reasons& reasons, const char* what, int64_t got, int64_t low, int64_t high) {
  if (got < low || got > high)
    reasons.push_back(
        refusal(what, got, "expected " + std::to_string(low) + " to " + std::to_string(high)));
}

// What no GPU could compute: one sentence for each contradiction in the problem itself.
Reasons problem_errors(const Problem& p) {
  Reasons reasons;
  check_range(reasons, "head_dim", p.head_dim, 1, kMaxExtent);
  check_range(reasons, "head_dim_v", p.head_dim_v, 1, kMaxExtent);
  check_range(reasons, "batch_size", p.batch_size, 0, kMaxExtent);
  check_range(reasons, "seqlen_q", p.seqlen_q, 0, kMaxExtent);
  check_range(reasons, "seqlen_k", p.seqlen_k, 0, kMaxExtent);
  check_range(reasons, "num_heads_q", p.num_heads_q, 0, kMaxHeads);
  check_range(reasons, "num_heads_kv", p.num_heads_kv, 0, kMaxHeads);
  check_range(reasons, "page_size", p.page_size, 0, kMaxExtent);
  check_range(reasons, "num_splits", p.num_splits, 0, kMaxExtent);
  check_range(reasons, "rotary_dim", p.rotary_dim, 0, kMaxExtent);
  if (!reasons.empty()) return reasons;  // the products below need factors in range
  const int64_t longest = max(p.seqlen_q, p.seqlen_k), heads = max(p.num_heads_q, p.num_heads_kv);
  if (longest * heads > 0 && p.batch_size > kMaxRows / (longest * heads))
    reasons.push_back(
        refusal("batch_size", p.batch_size, "batch_size * seqlen * num_heads is at most 2^48"));
  const bool divides =
      p.num_heads_kv > 0 ? p.num_heads_q % p.num_heads_kv == 0 : p.num_heads_q == 0;
  if (!divides)
    reasons.push_back(
        refusal("num_heads_q", p.num_heads_q,
                "expected a multiple of num_heads_kv=" + std::to_string(p.num_heads_kv)));
  return reasons;
}

// Why the code of `arch` does not run on the device; empty: it does.
std::string device_refusal(Arch arch, const DeviceFacts& device) {
  const std::string got =
      ", got " + std::to_string(device.sm_major) + "." + std::to_string(device.sm_minor);
  switch (arch) {
    case Arch::kSm80:
      return device.sm_major >= 8 ? "" : "its code needs compute capability 8.0 or newer" + got;
    case Arch::kSm89:
      return device.sm_major == 8 && device.sm_minor == 9
                 ? ""
                 : "its code runs on compute capability 8.9 only" + got;
    case Arch::kSm90:
      return device.sm_major == 9 ? "" : "its code runs on compute capability 9.x only" + got;
  }
  return "unknown architecture";
}

// "a, b" of the distinct names that `name` gives for the instances that `select` accepts.
template <class Select, class Name>
std::string list_instances(Select select, Name name) {
  std::string list;
  std::string last;
  for (const Instance& instance : instances()) {
    if (!select(instance) || name(instance) == last) continue;
    last = name(instance);
    list += (list.empty() ? "" : ", ") + last;
  }
  return list;
}

// Why no instance of `arch` takes the problem; called when find_instance found none.
std::string instance_refusal(Arch arch, const Problem& p) {
  const std::string family = family_name(p.family);
  const auto of_arch = [&](const Instance& i) { return i.arch == arch; };
  const auto of_family = [&](const Instance& i) { return i.arch == arch && i.family == p.family; };
  const std::string families =
      list_instances(of_arch, [](const Instance& i) { return std::string(family_name(i.family)); });
  if (families.empty()) return "no kernel is written for it; its GPUs run the code of sm80";
  const std::string dtypes =
      list_instances(of_family, [](const Instance& i) { return std::string(dtype_name(i.dtype)); });
  if (dtypes.empty()) return "it has no " + family + " kernel, only " + families;
  if (dtypes.find(dtype_name(p.dtype)) == std::string::npos)
    return "dtype=" + std::string(dtype_name(p.dtype)) + ": " + family + " is built for " + dtypes;
  const std::string sizes =
      list_instances(of_family, [](const Instance& i) { return std::to_string(i.head_dim); });
  return refusal("head_dim", p.head_dim, family + " is built for " + sizes);
}

// Why a row kernel does not take the problem; empty: it does. The same for every architecture.
std::string row_kernel_refusal(const Problem& p) {
  const std::string family = family_name(p.family);
  const std::string at_most = family + " takes at most ";
  const std::string max_head_dim = at_most + std::to_string(kMaxRowHeadDim);
  const bool has_head_dim = p.family == Family::kRotary || p.family == Family::kAppendKv;
  if (has_head_dim && p.head_dim > kMaxRowHeadDim)
    return refusal("head_dim", p.head_dim, max_head_dim);
  if (p.family != Family::kRotary && p.head_dim_v > kMaxRowHeadDim)
    return refusal("head_dim_v", p.head_dim_v, max_head_dim);
  const int64_t rows = int64_t{p.batch_size} * p.seqlen_q * p.num_heads_q;
  if (p.family == Family::kCombine && rows > kMaxCombineRows)
    return refusal("rows", rows, at_most + std::to_string(kMaxCombineRows));
  if (p.family == Family::kCombine && p.num_splits > kMaxCombineSplits)
    return refusal("num_splits", p.num_splits, at_most + std::to_string(kMaxCombineSplits));
  if (has_head_dim && p.rotary_dim % 2 != 0)
    return refusal("rotary_dim", p.rotary_dim, family + " needs an even number");
  if (has_head_dim && p.rotary_dim > p.head_dim)
    return refusal("rotary_dim", p.rotary_dim, at_most + "head_dim=" + std::to_string(p.head_dim));
  return "";
}

// Whether every row is read and written 16 bytes at a time.
bool is_vectorized(const Problem& p) {
  const int vec = p.family == Family::kCombine ? kCombineVec : elements_per_vector(p.dtype);
  if (p.alignment_bytes < kVectorBytes) return false;
  switch (p.family) {
    case Family::kCombine:
    case Family::kBwdPreprocess: return p.head_dim_v % vec == 0;
    case Family::kRotary: return p.head_dim % vec == 0 && p.rotary_dim % (2 * vec) == 0;
    case Family::kAppendKv:
      return p.head_dim % vec == 0 && p.head_dim_v % vec == 0 && p.rotary_dim % (2 * vec) == 0;
    default: return false;
  }
}

// Launch of a row kernel; the fields beside instance, kernel and arch.
Plan row_kernel_plan(const Problem& p) {
  Plan plan;
  plan.vectorized = is_vectorized(p);
  const int wide = p.family == Family::kCombine ? kCombineVec : elements_per_vector(p.dtype);
  const int vec = plan.vectorized ? wide : 1;
  const int64_t heads = p.num_heads_q;
  switch (p.family) {
    case Family::kCombine:
      plan.num_threads = kCombineThreads;
      plan.tile_m = combine_rows_per_cta(p.head_dim_v, vec);
      plan.tile_n = p.head_dim_v;
      plan.num_splits = p.num_splits;
      plan.num_ctas = ceil_div<int64_t>(heads * p.batch_size * p.seqlen_q, plan.tile_m);
      break;
    case Family::kBwdPreprocess:
      plan.num_threads = kBwdPreprocessThreads;
      plan.tile_m = bwd_preprocess_rows_per_cta(p.head_dim_v, vec);
      plan.tile_n = p.head_dim_v;
      plan.num_ctas = heads * p.batch_size * ceil_div(p.seqlen_q, plan.tile_m);
      break;
    default: {
      const bool append = p.family == Family::kAppendKv;
      const int units =
          row_units(p.head_dim, p.rotary_dim, vec) + (append ? row_units(p.head_dim_v, 0, vec) : 0);
      const int num_heads = append ? p.num_heads_kv : p.num_heads_q;
      const int seqlen = append ? p.seqlen_k : p.seqlen_q;
      plan.num_threads = append ? kAppendKvThreads : kRotaryThreads;
      plan.tile_m = tokens_per_tile(units_per_token(num_heads, units), plan.num_threads, p.varlen);
      plan.tile_n = p.head_dim + (append ? p.head_dim_v : 0);
      plan.num_ctas = num_token_tiles(p.varlen, p.batch_size, seqlen, plan.tile_m);
      break;
    }
  }
  return plan;
}

}  // namespace

std::string ArchSet::to_string() const {
  std::string names;
  for (int i = 0; i < kNumArchs; ++i) {
    const Arch arch = static_cast<Arch>(i);
    if (contains(arch)) names += (names.empty() ? "" : ", ") + std::string(arch_name(arch));
  }
  return names.empty() ? "none" : names;
}

PlanResult make_plan(const Problem& problem, const DeviceFacts& device, ArchSet built) {
  PlanResult result;
  result.reasons = problem_errors(problem);
  if (!result.reasons.empty()) return result;

  Reasons wrong_device;  // of interest only if no library runs on this GPU at all
  for (const Arch arch : {Arch::kSm90, Arch::kSm89, Arch::kSm80}) {  // fastest first
    const std::string prefix = std::string(arch_name(arch)) + ": ";
    std::string reason = device_refusal(arch, device);
    if (!reason.empty()) {
      wrong_device.push_back(prefix + reason);
      continue;
    }
    const Instance* instance = find_instance(arch, problem.family, problem.dtype, problem.head_dim);
    if (instance == nullptr) {
      reason = instance_refusal(arch, problem);
    } else if (reason = row_kernel_refusal(problem); reason.empty()) {
      result.plan = row_kernel_plan(problem);
      result.plan.instance = instance->id;
      result.plan.kernel = instance->name();
      result.plan.arch = arch;
      if (result.plan.num_ctas > kMaxCtas)
        reason = refusal("num_ctas", result.plan.num_ctas,
                         "a launch has at most " + std::to_string(kMaxCtas));
      else if (!built.contains(arch))
        reason = "its library is not present (present: " + built.to_string() + ")";
    }
    result.ok = reason.empty();
    if (result.ok) return result;
    result.reasons.push_back(prefix + reason);
  }
  result.plan = Plan{};
  if (result.reasons.empty()) result.reasons = std::move(wrong_device);
  return result;
}

const std::vector<NamedDevice>& named_devices() {
  constexpr int64_t kMiB = 1 << 20;
  // NVIDIA's architecture white papers and cudaDeviceProp.
  static const std::vector<NamedDevice> devices = {
      {"a100", {8, 0, 108, kSmemBytes163, 40 * kMiB}},
      {"rtx3090", {8, 6, 82, kSmemBytes99, 6 * kMiB}},
      {"rtx4090", {8, 9, 128, kSmemBytes99, 72 * kMiB}},
      {"l40s", {8, 9, 142, kSmemBytes99, 96 * kMiB}},
      {"h100", {9, 0, 132, kSmemBytes227, 50 * kMiB}},
      {"h200", {9, 0, 132, kSmemBytes227, 60 * kMiB}},
      {"b200", {10, 0, 148, kSmemBytes227, 126 * kMiB}},
      {"rtx5090", {12, 0, 170, kSmemBytes99, 96 * kMiB}},
      {"sm80", {8, 0, 108, kSmemBytes163, 40 * kMiB}},
      {"sm86", {8, 6, 82, kSmemBytes99, 6 * kMiB}},
      {"sm89", {8, 9, 128, kSmemBytes99, 72 * kMiB}},
      {"sm90", {9, 0, 132, kSmemBytes227, 50 * kMiB}},
      {"sm100", {10, 0, 148, kSmemBytes227, 126 * kMiB}},
      {"sm120", {12, 0, 170, kSmemBytes99, 96 * kMiB}},
  };
  return devices;
}

const DeviceFacts* find_device(const std::string& name) {
  for (const NamedDevice& device : named_devices())
    if (name == device.name) return &device.facts;
  return nullptr;
}

}  // namespace fa
