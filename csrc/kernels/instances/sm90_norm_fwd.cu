// SM90: norm_fwd for fp16, bf16 and fp32.
#include "kernels/common/norm_fwd.cuh"
#include "kernels/instantiate.h"
FA_INSTANTIATE_BY_DTYPE(norm_fwd, NormFwdParams, dtype)
