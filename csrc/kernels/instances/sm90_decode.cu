// SM90: choice among the instances of decode.
#include "kernels/instantiate.h"
#include "kernels/sm90/decode_choice.h"
FA_INSTANTIATE_LAUNCHER(decode, DecodeParams, launch_sm90_decode)
