// SM90: decode of few tiles of head_dim 96 in fp16.
#include "kernels/instantiate.h"
#include "kernels/sm80/decode.cuh"
template int fa::launch_decode_few_rows<__half, 96, fa::DecodeCtas::kWide>(const fa::DecodeParams&,
                                                                           cudaStream_t);
