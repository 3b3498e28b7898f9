// SM80: decode of head_dim 192 in bf16.
#include "kernels/instantiate.h"
#include "kernels/sm80/decode.cuh"
template int fa::launch_decode<__nv_bfloat16, 192>(const fa::DecodeParams&, cudaStream_t);
