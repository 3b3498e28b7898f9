// SM80: cross_entropy_fwd and _bwd for fp16, bf16 and fp32.
#include "kernels/common/cross_entropy.cuh"
#include "kernels/instantiate.h"
FA_INSTANTIATE_BY_DTYPE(cross_entropy_fwd, CrossEntropyParams, dtype)
FA_INSTANTIATE_BY_DTYPE(cross_entropy_bwd, CrossEntropyParams, dtype)
