// Launches that begin while the one before them ends.
//
// PTX ISA, "Parallel Synchronization and Communication Instructions: griddepcontrol". The launch
// behind has the attribute programmatic stream serialization; without it, both do nothing.
#pragma once
#include "core/host_device.h"

namespace fa::ptx {

// The launch behind may begin as soon as all CTAs have called this or ended.
FA_DEVICE void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Waits until the launches that this one depends on are complete, and what they wrote is visible.
FA_DEVICE void griddepcontrol_wait() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace fa::ptx
