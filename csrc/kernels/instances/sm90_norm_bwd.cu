// SM90: norm_bwd for fp16, bf16 and fp32.
#include "kernels/common/norm_bwd.cuh"
#include "kernels/instantiate.h"
FA_INSTANTIATE_BY_DTYPE(norm_bwd, NormBwdParams, dtype)
