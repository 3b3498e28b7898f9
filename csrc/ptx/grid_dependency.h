// Launches that begin while the one before them ends.
//
// PTX ISA, "Parallel Synchronization and Communication Instructions: griddepcontrol". The launch
// behind has the attribute programmatic stream serialization; without it, and before SM90, both do
// nothing.
#pragma once
#include "core/host_device.h"

namespace fa::ptx {

// The launch behind may begin as soon as all CTAs have called this or ended.
FA_DEVICE void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the launches that this one depends on are complete, and what they wrote is visible.
FA_DEVICE void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace fa::ptx
