// SM90: backward of head_dim 192 in bf16.
#include "kernels/instantiate.h"
#include "kernels/sm90/bwd.cuh"
template int fa::launch_bwd<__nv_bfloat16, 192>(const fa::BwdParams&, cudaStream_t);
