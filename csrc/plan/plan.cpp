// make_plan: the first library, fastest first, that has a kernel for the problem.
#include "plan/plan.h"

#include <limits>
#include <utility>

#include "plan/family_plan.h"

namespace fa {
namespace {

using Reasons = std::vector<std::string>;

constexpr int kMaxExtent = 1 << 30;  // of one dimension: positions and differences stay inside int
constexpr int kMaxHeads = 1 << 20;   // times the units of a row still inside int
constexpr int64_t kMaxRows = int64_t{1} << 48;  // heads of all tokens: beyond any memory, and
                                                // times 2 * kMaxRowHeadDim still inside int64_t
constexpr int64_t kMaxCtas = std::numeric_limits<int>::max();  // gridDim.x

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
  check_range(reasons, "total_q", p.total_q, 0, kMaxExtent);
  check_range(reasons, "total_k", p.total_k, 0, kMaxExtent);
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

// Whether the code of `arch` does not run on the device.
bool device_refuses(Arch arch, const DeviceFacts& device, Reason reason) {
  bool runs = false;
  const char* needs = "";
  switch (arch) {
    case Arch::kSm80:
      runs = device.sm_major >= 8;
      needs = "needs compute capability 8.0 or newer";
      break;
    case Arch::kSm89:
      runs = device.sm_major == 8 && device.sm_minor == 9;
      needs = "runs on compute capability 8.9 only";
      break;
    case Arch::kSm90:
      runs = device.sm_major == 9;
      needs = "runs on compute capability 9.x only";
      break;
  }
  return !runs && reason("its code ", needs, ", got ", device.sm_major, ".", device.sm_minor);
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

// Says why no instance of `arch` takes the problem; called when find_instance found none.
bool no_instance(Arch arch, const Problem& p, Reason reason) {
  if (!reason.is_read()) return true;
  const char* family = family_name(p.family);
  const auto of_arch = [&](const Instance& i) { return i.arch == arch; };
  const auto of_family = [&](const Instance& i) { return i.arch == arch && i.family == p.family; };
  const auto of_dtype = [&](const Instance& i) { return of_family(i) && i.dtype == p.dtype; };
  const std::string families =
      list_instances(of_arch, [](const Instance& i) { return std::string(family_name(i.family)); });
  if (families.empty()) return reason("no kernel is written for it; its GPUs run the code of sm80");
  const std::string dtypes =
      list_instances(of_family, [](const Instance& i) { return std::string(dtype_name(i.dtype)); });
  if (dtypes.empty()) return reason("it has no ", family, " kernel, only ", families);
  const std::string sizes =
      list_instances(of_dtype, [](const Instance& i) { return std::to_string(i.head_dim); });
  if (sizes.empty())
    return reason("dtype=", dtype_name(p.dtype), ": ", family, " is built for ", dtypes);
  const char* what = p.head_dim >= p.head_dim_v ? "head_dim=" : "head_dim_v=";
  return reason(what, max(p.head_dim, p.head_dim_v), ": ", family, " is built for ", sizes);
}

// The plan for one library, nullopt and a reason if it does not take the problem.
std::optional<Plan> plan_for(Arch arch, const Problem& p, const DeviceFacts& device, ArchSet built,
                             Reason reason) {
  const bool attention = is_attention(p.family), decode = p.family == Family::kDecode;
  const bool companion = is_companion(p.family);
  const int head_dim = attention || decode ? max(p.head_dim, p.head_dim_v) : p.head_dim;
  const Instance* instance = find_instance(arch, p.family, p.dtype, head_dim);
  if (instance == nullptr) {
    no_instance(arch, p, reason);
    return std::nullopt;
  }
  const bool refused = attention   ? attention_refuses(arch, p, device, reason)
                       : decode    ? decode_refuses(arch, p, device, reason)
                       : companion ? companion_refuses(p, device, reason)
                                   : row_kernel_refuses(p, reason);
  if (refused) return std::nullopt;
  Plan plan = attention   ? attention_plan(arch, p, device)
              : decode    ? decode_plan(arch, p, device)
              : companion ? companion_plan(p, device)
                          : row_kernel_plan(p);
  plan.instance = instance->id;
  plan.arch = arch;
  if (!attention) plan.tiles = arch;
  if (plan.num_ctas > kMaxCtas) {
    reason("num_ctas=", plan.num_ctas, ": a launch has at most ", kMaxCtas);
    return std::nullopt;
  }
  if (!built.contains(arch)) {
    if (reason.is_read()) reason("its library is not present (present: ", built.to_string(), ")");
    return std::nullopt;
  }
  return plan;
}

constexpr Arch kFastestFirst[] = {Arch::kSm90, Arch::kSm89, Arch::kSm80};

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
  for (const Arch arch : kFastestFirst) {
    std::string text = std::string(arch_name(arch)) + ": ";
    if (device_refuses(arch, device, Reason(&text))) {
      wrong_device.push_back(std::move(text));
    } else if (const auto plan = plan_for(arch, problem, device, built, Reason(&text))) {
      result.ok = true;
      result.plan = *plan;
      return result;
    } else {
      result.reasons.push_back(std::move(text));
    }
  }
  if (result.reasons.empty()) result.reasons = std::move(wrong_device);
  return result;
}

std::optional<Plan> find_plan(const Problem& problem, const DeviceFacts& device, ArchSet built) {
  if (!problem_errors(problem).empty()) return std::nullopt;
  const Reason unread(nullptr);
  for (const Arch arch : kFastestFirst) {
    if (device_refuses(arch, device, unread)) continue;
    if (const auto plan = plan_for(arch, problem, device, built, unread)) return plan;
  }
  return std::nullopt;
}

std::optional<Arch> find_library(const DeviceFacts& device, ArchSet built) {
  for (const Arch arch : kFastestFirst)
    if (built.contains(arch) && !device_refuses(arch, device, Reason(nullptr))) return arch;
  return std::nullopt;
}

}  // namespace fa
