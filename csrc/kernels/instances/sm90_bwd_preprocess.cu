// SM90: bwd_preprocess for fp16, bf16 and fp32.
#include "kernels/common/bwd_preprocess.cuh"
#include "kernels/instantiate.h"
FA_INSTANTIATE_BY_DTYPE(bwd_preprocess, BwdPreprocessParams, dtype)
