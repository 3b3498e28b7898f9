// SM80: choice among the instances of decode.
#include "kernels/instantiate.h"
#include "kernels/sm80/decode_choice.h"
FA_INSTANTIATE_LAUNCHER(decode, DecodeParams, launch_sm80_decode)
