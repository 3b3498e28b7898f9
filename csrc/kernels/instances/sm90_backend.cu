// Table of the SM90 library.
#include "kernels/instantiate.h"
FA_INSTANTIATE_BACKEND(90, fa::fwd, fa::bwd)
