// SM90: choice among the instances of the backward.
#include "kernels/instantiate.h"
FA_INSTANTIATE_BY_SOME_HEAD_DIMS(bwd, BwdParams,
                                 FA_HEAD_DIM(bwd, 64) FA_HEAD_DIM(bwd, 96) FA_HEAD_DIM(bwd, 128))
