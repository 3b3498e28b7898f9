// SM90: decode of many rows of head_dim 128 in fp16.
#include "kernels/instantiate.h"
#include "kernels/sm90/decode.cuh"
template int fa::launch_decode_wgmma<__half, 128>(const fa::DecodeParams&, cudaStream_t);
