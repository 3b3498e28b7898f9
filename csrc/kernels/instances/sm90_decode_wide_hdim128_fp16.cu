// SM90: decode of few rows of head_dim 128 in fp16, wide CTAs.
#include "kernels/instantiate.h"
#include "kernels/sm80/decode.cuh"
template int fa::launch_decode_wide<__half, 128>(const fa::DecodeParams&, cudaStream_t);
