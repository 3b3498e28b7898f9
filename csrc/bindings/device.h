// What the binder knows of each GPU: its facts for make_plan, and the kernel libraries for it.
#pragma once
#include "bindings/stable_torch.h"
#include "core/backend.h"
#include "plan/plan.h"

namespace fa {

// Facts of a CUDA device, read once through the driver (the binder links no CUDA runtime).
// FLASH_ATTN_EXT_SMEM_KB=99 leaves a CTA only as much shared memory, as on a smaller GPU.
DeviceFacts device_facts(int device_index);

// Libraries that a plan may choose: those beside the binder. FLASH_ATTN_EXT_ARCH=sm80 leaves only
// that one, FLASH_ATTN_EXT_BACKEND=tiled none.
ArchSet usable_archs();

// The launch table of a kernel library, opened on first use. Throws with the linker's words, or if
// the library was built from other sources.
const Backend& open_backend(Arch arch);

// A plan and the library it names.
struct PlannedKernel {
  const Backend* backend = nullptr;  // no kernel takes the problem, the tiled backend computes it
  Plan plan;
};
// sm_margin: multiprocessors that a plan shall not count on.
PlannedKernel plan_kernel(const Problem& problem, int device_index, int64_t sm_margin = 0);

// Makes a device the current one while in scope.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device_index) {
    // Asking costs less than a guard, and the answer is nearly always that it is.
    if (torch::stable::accelerator::getCurrentDeviceIndex() != device_index)
      guard_.emplace(device_index);
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// Memory for one launch, from torch's allocator and for torch's current stream: given back with the
// scope, for whatever is enqueued there next. A tensor costs the host twice as much.
class Scratch {
 public:
  Scratch(int64_t bytes, int device_index);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return data_; }  // nullptr for 0 bytes

 private:
  void* data_ = nullptr;
};

// Enqueues one launch function of the table on torch's current stream of the device.
template <class Params>
void launch(const Backend& backend, int (*launch_function)(const Params&, void*),
            const Params& params, int device_index) {
  const CurrentDevice current(device_index);
  const int error = launch_function(params, current_stream(device_index));
  STD_TORCH_CHECK(error == 0,
                  "flash_attn_ext: kernel launch failed: ", backend.error_string(error));
}

}  // namespace fa
