// SM90: combine for fp16, bf16 and fp32.
#include "kernels/common/combine.cuh"
#include "kernels/instantiate.h"
FA_INSTANTIATE_BY_DTYPE(combine, CombineParams, out_dtype)
