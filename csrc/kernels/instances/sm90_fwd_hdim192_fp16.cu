// SM90: forward of head_dim 192 in fp16.
#include "kernels/instantiate.h"
#include "kernels/sm90/fwd.cuh"
template int fa::launch_fwd<__half, 192>(const fa::FwdParams&, cudaStream_t);
