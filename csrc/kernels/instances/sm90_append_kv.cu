// SM90: append_kv for fp16, bf16 and fp32.
#include "kernels/common/append_kv.cuh"
#include "kernels/instantiate.h"
FA_INSTANTIATE_BY_DTYPE(append_kv, AppendKvParams, dtype)
