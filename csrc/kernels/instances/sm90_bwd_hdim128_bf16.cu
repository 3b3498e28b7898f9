// SM90: backward of head_dim 128 in bf16.
#include "kernels/instantiate.h"
#include "kernels/sm90/bwd.cuh"
template int fa::launch_bwd<__nv_bfloat16, 128>(const fa::BwdParams&, cudaStream_t);
