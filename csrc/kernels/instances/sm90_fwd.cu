// SM90: choice among the instances of the forward.
#include "kernels/instantiate.h"
FA_INSTANTIATE_BY_SOME_HEAD_DIMS(fwd, FwdParams, FA_HEAD_DIM(fwd, 64) FA_HEAD_DIM(fwd, 128))
