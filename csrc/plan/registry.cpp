// instances.def as a table, and the names of families.
#include "plan/registry.h"

#include "core/tile_config.h"

namespace fa {

const char* family_name(Family family) {
  switch (family) {
    case Family::kFwd: return "fwd";
    case Family::kBwd: return "bwd";
    case Family::kDecode: return "decode";
    case Family::kCombine: return "combine";
    case Family::kBwdPreprocess: return "bwd_preprocess";
    case Family::kRotary: return "rotary";
    case Family::kAppendKv: return "append_kv";
    case Family::kNormFwd: return "norm_fwd";
    case Family::kNormBwd: return "norm_bwd";
    case Family::kCrossEntropyFwd: return "cross_entropy_fwd";
    case Family::kCrossEntropyBwd: return "cross_entropy_bwd";
  }
  return "unknown";
}

std::string Instance::name() const {
  std::string name = std::string(arch_name(arch)) + "_" + family_name(family);
  if (head_dim != 0) name += "_hdim" + std::to_string(head_dim);
  return name + "_" + dtype_name(dtype);
}

const std::vector<Instance>& instances() {
  static const std::vector<Instance> table = [] {
    std::vector<Instance> rows;
#define FA_INSTANCE(arch, family, dtype, head_dim) \
  rows.push_back(                                  \
      {static_cast<int>(rows.size()), Arch::arch, Family::family, DType::dtype, head_dim});
#include "plan/instances.def"
    return rows;
  }();
  return table;
}

const Instance* find_instance(Arch arch, Family family, DType dtype, int head_dim) {
  const int built = built_head_dim(head_dim);
  for (const Instance& instance : instances())
    if (instance.arch == arch && instance.family == family && instance.dtype == dtype &&
        (instance.head_dim == 0 || instance.head_dim == built))
      return &instance;
  return nullptr;
}

}  // namespace fa
