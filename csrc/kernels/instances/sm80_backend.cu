// Table of the SM80 library, and its counters.
#include "kernels/deal_counters.h"
#include "kernels/instantiate.h"
FA_INSTANTIATE_BACKEND(80, fa::fwd, fa::bwd)
