// Table of the SM90 library, and its counters.
#include "kernels/deal_counters.h"
#include "kernels/instantiate.h"
FA_INSTANTIATE_BACKEND(90, fa::fwd, fa::bwd)
