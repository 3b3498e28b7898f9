// make_plan under the sanitizers: random problems on every named device. What a plan contains is
// tested through the introspection module, in Python.
#include "plan/plan.h"

#include <random>
#include <set>
#include <string>
#include <utility>

#include "core/row_kernels.h"
#include "tests/check.h"

using namespace fa;

namespace {

template <class T>
T pick(std::mt19937& rng, std::initializer_list<T> values) {
  return values.begin()[std::uniform_int_distribution<size_t>(0, values.size() - 1)(rng)];
}

Problem random_problem(std::mt19937& rng) {
  constexpr int kHuge = 0x7FFFFFFF;
  Problem p;
  p.family = static_cast<Family>(std::uniform_int_distribution<int>(0, kNumFamilies - 1)(rng));
  p.dtype = static_cast<DType>(std::uniform_int_distribution<int>(0, kNumDTypes - 1)(rng));
  p.head_dim = pick(rng, {1, 64, 80, 128, 256, 257, kHuge, 0, -1});
  p.head_dim_v = pick(rng, {1, 64, 80, 128, 256, 257, kHuge});
  p.batch_size = pick(rng, {0, 1, 7, 1 << 20, kHuge, -1});
  p.seqlen_q = pick(rng, {0, 1, 129, 1 << 30, kHuge});
  p.seqlen_k = pick(rng, {0, 1, 129, 1 << 30});
  p.total_q = pick(rng, {0, 1, 1000, 1 << 30, -1});
  p.total_k = pick(rng, {0, 129, 1 << 30});
  p.num_heads_q = pick(rng, {0, 1, 8, 12, 1 << 18, 1 << 30});
  p.num_heads_kv = pick(rng, {0, 1, 4, 8, -3});
  p.window_left = pick(rng, {-1, 0, 128, kHuge});
  p.window_right = pick(rng, {-1, 0, 128});
  p.page_size = pick(rng, {0, 1, 16, -1});
  p.num_splits = pick(rng, {0, 1, 128, 1024, 1025});
  p.rotary_dim = pick(rng, {0, 1, 2, 16, 64, 128, 256, 512});
  p.rotary_interleaved = pick(rng, {false, true});
  p.alignment_bytes = pick(rng, {1, 4, 8, 16});
  p.varlen = pick(rng, {false, true});
  p.dropout = pick(rng, {false, true});
  p.dmask = pick(rng, {false, false, true});
  p.positive_scale = pick(rng, {true, true, false});
  p.deterministic = pick(rng, {false, true});
  return p;
}

void test_random_problems() {
  std::mt19937 rng(0);
  long planned = 0;
  for (int i = 0; i < 40000; ++i) {
    const Problem p = random_problem(rng);
    const NamedDevice& device = named_devices()[i % named_devices().size()];
    const PlanResult result = make_plan(p, device.facts, ArchSet::all());
    CHECK(result.ok || !result.reasons.empty(), "refused without a reason: %s on %s",
          family_name(p.family), device.name);
    const std::optional<Plan> found = find_plan(p, device.facts, ArchSet::all());
    CHECK(found.has_value() == result.ok, "find_plan differs: %s on %s", family_name(p.family),
          device.name);
    if (found)
      CHECK(found->instance == result.plan.instance && found->num_ctas == result.plan.num_ctas &&
                found->tiles == result.plan.tiles &&
                found->workspace_bytes == result.plan.workspace_bytes,
            "find_plan differs: %s on %s", family_name(p.family), device.name);
    for (const std::string& reason : result.reasons)
      CHECK(!reason.empty() && reason.find('\n') == std::string::npos, "%s", reason.c_str());
    if (!result.ok) {
      CHECK(result.plan.instance == -1, "half a plan in a refusal");
      continue;
    }
    ++planned;
    const Plan& plan = result.plan;
    const Instance& instance = instances()[plan.instance];
    CHECK(instance.arch == plan.arch && instance.family == p.family && instance.dtype == p.dtype,
          "%s", instance.name().c_str());
    CHECK(plan.num_threads > 0 && plan.num_threads <= 1024 && plan.num_threads % kWarpSize == 0,
          "threads %d", plan.num_threads);
    CHECK(plan.num_ctas >= 0 && plan.num_ctas <= 0x7FFFFFFF, "ctas");
    CHECK(plan.smem_bytes <= device.facts.max_smem_bytes && plan.workspace_bytes >= 0, "memory");
    CHECK(plan.tile_m >= 1 && plan.tile_n >= 1, "tile");
  }
  CHECK(planned > 200, "only %ld of the random problems have a plan", planned);
}

// Tiles of SM80's kernels: those of 99 KB run where 163 KB do not fit, and nothing below that.
void test_shared_memory() {
  const ArchSet sm80 = ArchSet().with(Arch::kSm80);
  DeviceFacts device = *find_device("h100");
  Problem p;
  for (const Family family : {Family::kFwd, Family::kBwd})
    for (const int head_dim : {64, 96, 128, 192, 256}) {
      p.family = family;
      p.head_dim = p.head_dim_v = head_dim;
      const bool own_tiles = family == Family::kFwd ? head_dim == 256 : head_dim <= 96;
      for (const auto& [kb, tiles] :
           {std::pair(227, own_tiles ? Arch::kSm90 : Arch::kSm80), std::pair(226, Arch::kSm80),
            std::pair(163, Arch::kSm80), std::pair(162, Arch::kSm89), std::pair(99, Arch::kSm89)}) {
        device.max_smem_bytes = kb * 1024;
        const auto plan = find_plan(p, device, sm80);
        CHECK(plan && plan->arch == Arch::kSm80 && plan->tiles == tiles, "%d KB", kb);
      }
      device.max_smem_bytes = 32 * 1024;
      CHECK(!find_plan(p, device, sm80), "32 KB, head_dim %d", head_dim);
    }
}

void test_arch_set() {
  CHECK(ArchSet().to_string() == "none", "%s", ArchSet().to_string().c_str());
  const ArchSet two = ArchSet().with(Arch::kSm90).with(Arch::kSm80);
  CHECK(two.to_string() == "sm80, sm90" && two.contains(Arch::kSm80) && two.contains(Arch::kSm90) &&
            !two.contains(Arch::kSm89),
        "%s", two.to_string().c_str());
}

void test_registry() {
  std::set<std::string> names;
  for (const Instance& instance : instances()) {
    CHECK(names.insert(instance.name()).second, "twice: %s", instance.name().c_str());
    const int head_dim = instance.head_dim == 0 ? 128 : instance.head_dim;
    CHECK(find_instance(instance.arch, instance.family, instance.dtype, head_dim) == &instance,
          "unreachable: %s", instance.name().c_str());
  }
  CHECK(find_instance(Arch::kSm80, Family::kCombine, DType::kFloat64, 128) == nullptr, "fp64");
}

void test_devices() {
  for (const NamedDevice& device : named_devices()) {
    CHECK(find_device(device.name) == &device.facts, "%s", device.name);
    const DeviceFacts& f = device.facts;
    CHECK(f.sm_major >= 8 && f.num_sms > 0 && f.l2_bytes >= 1 << 20, "%s", device.name);
    const bool large = f.sm_minor == 0 && f.sm_major < 12;
    CHECK(f.max_smem_bytes == (f.sm_major == 8 && large ? kSmemBytes163
                               : large                  ? kSmemBytes227
                                                        : kSmemBytes99),
          "%s", device.name);
  }
  CHECK(find_device("voodoo2") == nullptr, "unknown device");
}

}  // namespace

int main() {
  test_arch_set();
  test_registry();
  test_devices();
  test_shared_memory();
  test_random_problems();
  return report();
}
