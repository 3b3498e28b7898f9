// SM80: decode of head_dim 128 in fp16.
#include "kernels/instantiate.h"
#include "kernels/sm80/decode.cuh"
template int fa::launch_decode_few_rows<__half, 128, fa::DecodeCtas::kDeep>(const fa::DecodeParams&,
                                                                            cudaStream_t);
template int fa::launch_decode_many_rows<__half, 128>(const fa::DecodeParams&, cudaStream_t);
