// make_plan under the sanitizers: random problems on every named device. What a plan contains is
// tested through the introspection module, in Python.
#include "plan/plan.h"

#include <random>
#include <set>
#include <string>

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
  p.num_heads_q = pick(rng, {0, 1, 8, 12, 1 << 30});
  p.num_heads_kv = pick(rng, {0, 1, 4, 8, -3});
  p.window_left = pick(rng, {-1, 0, 128, kHuge});
  p.window_right = pick(rng, {-1, 0, 128});
  p.page_size = pick(rng, {0, 1, 16, -1});
  p.num_splits = pick(rng, {0, 1, 128, 1024, 1025});
  p.rotary_dim = pick(rng, {0, 1, 2, 16, 64, 128, 256, 512});
  p.rotary_interleaved = pick(rng, {false, true});
  p.alignment_bytes = pick(rng, {1, 4, 8, 16});
  p.varlen = pick(rng, {false, true});
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
    for (const std::string& reason : result.reasons)
      CHECK(!reason.empty() && reason.find('\n') == std::string::npos, "%s", reason.c_str());
    if (!result.ok) {
      CHECK(result.plan.instance == -1, "half a plan in a refusal");
      continue;
    }
    ++planned;
    const Plan& plan = result.plan;
    const Instance& instance = instances()[plan.instance];
    CHECK(instance.name() == plan.kernel && instance.arch == plan.arch &&
              instance.family == p.family && instance.dtype == p.dtype,
          "%s", plan.kernel.c_str());
    CHECK(plan.num_threads > 0 && plan.num_threads <= 1024 && plan.num_threads % kWarpSize == 0,
          "threads %d", plan.num_threads);
    CHECK(plan.num_ctas >= 0 && plan.num_ctas <= 0x7FFFFFFF, "ctas");
    CHECK(plan.smem_bytes <= device.facts.max_smem_bytes && plan.workspace_bytes >= 0, "memory");
    CHECK(plan.tile_m >= 1 && plan.tile_n >= 1, "tile");
  }
  CHECK(planned > 200, "only %ld of the random problems have a plan", planned);
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
  test_random_problems();
  return report();
}
