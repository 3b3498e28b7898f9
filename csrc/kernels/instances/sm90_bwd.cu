// SM90: choice among the instances of the backward.
#include "kernels/instantiate.h"
FA_INSTANTIATE_BY_HEAD_DIM(bwd, BwdParams)
