// SM80: value_checks.
#include "kernels/common/value_checks.cuh"
#include "kernels/instantiate.h"
int fa::value_checks(const ValueCheckParams& params, void* stream) {
  return launch_value_checks(params, static_cast<cudaStream_t>(stream));
}
