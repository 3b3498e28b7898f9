// SM80: decode of head_dim 64 in bf16.
#include "kernels/instantiate.h"
#include "kernels/sm80/decode.cuh"
template int fa::launch_decode_few_rows<__nv_bfloat16, 64, fa::DecodeCtas::kDeep>(
    const fa::DecodeParams&, cudaStream_t);
template int fa::launch_decode_many_rows<__nv_bfloat16, 64>(const fa::DecodeParams&, cudaStream_t);
