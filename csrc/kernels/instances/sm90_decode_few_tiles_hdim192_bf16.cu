// SM90: decode of few tiles of head_dim 192 in bf16.
#include "kernels/instantiate.h"
#include "kernels/sm80/decode.cuh"
template int fa::launch_decode_few_rows<__nv_bfloat16, 192, fa::DecodeCtas::kDeep>(
    const fa::DecodeParams&, cudaStream_t);
