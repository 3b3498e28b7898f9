// SM90: choice among the instances of the forward.
#include "kernels/instantiate.h"
FA_INSTANTIATE_BY_HEAD_DIM(fwd, FwdParams)
