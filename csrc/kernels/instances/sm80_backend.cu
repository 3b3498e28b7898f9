// Table of the SM80 library.
#include "kernels/instantiate.h"
FA_INSTANTIATE_BACKEND(80, fa::fwd, fa::bwd)
