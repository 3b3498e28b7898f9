// The GPUs that make_plan can be asked about by name.
#include "plan/problem.h"

namespace fa {

const std::vector<NamedDevice>& named_devices() {
  constexpr int64_t kMiB = 1 << 20;
  // NVIDIA's architecture white papers and cudaDeviceProp.
  static const std::vector<NamedDevice> devices = {
      {"a100", {8, 0, 108, kSmemBytes163, 40 * kMiB}},
      {"rtx3090", {8, 6, 82, kSmemBytes99, 6 * kMiB}},
      {"rtx4090", {8, 9, 128, kSmemBytes99, 72 * kMiB}},
      {"l40s", {8, 9, 142, kSmemBytes99, 96 * kMiB}},
      {"h100", {9, 0, 132, kSmemBytes227, 50 * kMiB}},
      {"h200", {9, 0, 132, kSmemBytes227, 60 * kMiB}},
      {"b200", {10, 0, 148, kSmemBytes227, 126 * kMiB}},
      {"rtx5090", {12, 0, 170, kSmemBytes99, 96 * kMiB}},
      {"sm80", {8, 0, 108, kSmemBytes163, 40 * kMiB}},
      {"sm86", {8, 6, 82, kSmemBytes99, 6 * kMiB}},
      {"sm89", {8, 9, 128, kSmemBytes99, 72 * kMiB}},
      {"sm90", {9, 0, 132, kSmemBytes227, 50 * kMiB}},
      {"sm100", {10, 0, 148, kSmemBytes227, 126 * kMiB}},
      {"sm120", {12, 0, 170, kSmemBytes99, 96 * kMiB}},
  };
  return devices;
}

const DeviceFacts* find_device(const std::string& name) {
  for (const NamedDevice& device : named_devices())
    if (name == device.name) return &device.facts;
  return nullptr;
}

}  // namespace fa
