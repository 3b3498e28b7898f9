// The kernels that exist: instances.def as data.
#pragma once
#include <string>
#include <vector>

#include "plan/problem.h"

namespace fa {

struct Instance {
  int id;  // position in instances.def
  Arch arch;
  Family family;
  DType dtype;
  int head_dim;  // built size; 0: any

  // "sm90_fwd_hdim128_bf16"; without "_hdim…" if any head_dim runs.
  std::string name() const;
};

// All rows of instances.def, in its order.
const std::vector<Instance>& instances();

// The instance that runs head_dim, or nullptr. An exact-size family runs head_dim in the next built
// size.
const Instance* find_instance(Arch arch, Family family, DType dtype, int head_dim);

}  // namespace fa
