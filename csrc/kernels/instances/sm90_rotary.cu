// SM90: rotary for fp16, bf16 and fp32.
#include "kernels/common/rotary.cuh"
#include "kernels/instantiate.h"
FA_INSTANTIATE_BY_DTYPE(rotary, RotaryParams, dtype)
