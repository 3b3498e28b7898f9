// SM90: choice among the instances of decode.
#include "kernels/instantiate.h"
FA_INSTANTIATE_BY_HEAD_DIM(decode, DecodeParams)
