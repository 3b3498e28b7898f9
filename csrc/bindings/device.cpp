// Finds GPUs' facts, the kernel libraries and torch's stream, all at run time: the binder itself
// needs neither CUDA nor a CUDA build of torch to load.
#include "bindings/device.h"

#include <dlfcn.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>

namespace fa {
namespace {

// A symbol of a library that is in the process already. Throws if it is not.
void* find_symbol(const char* library, const char* symbol) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  STD_TORCH_CHECK(handle != nullptr, "flash_attn_ext: ", library,
                  " is not loaded in this process; CUDA tensors need a CUDA build of torch");
  void* address = dlsym(handle, symbol);
  STD_TORCH_CHECK(address != nullptr, "flash_attn_ext: ", library, " has no symbol ", symbol);
  return address;
}

// Driver API, CUDA Toolkit documentation, "Device Management"; the values are part of its ABI.
using CuResult = int;
using CuDevice = int;
enum CuDeviceAttribute : int {
  kMultiprocessorCount = 16,
  kL2CacheSize = 38,
  kComputeCapabilityMajor = 75,
  kComputeCapabilityMinor = 76,
  kMaxSharedMemoryPerBlockOptin = 97,
};

DeviceFacts query_device(int device_index) {
  const auto device_get =
      reinterpret_cast<CuResult (*)(CuDevice*, int)>(find_symbol("libcuda.so.1", "cuDeviceGet"));
  const auto get_attribute = reinterpret_cast<CuResult (*)(int*, int, CuDevice)>(
      find_symbol("libcuda.so.1", "cuDeviceGetAttribute"));
  CuDevice device = 0;
  CuResult result = device_get(&device, device_index);
  STD_TORCH_CHECK(result == 0, "flash_attn_ext: cuDeviceGet(", device_index, ") failed: ", result);
  const auto attribute = [&](CuDeviceAttribute which) {
    int value = 0;
    result = get_attribute(&value, which, device);
    STD_TORCH_CHECK(result == 0, "flash_attn_ext: cuDeviceGetAttribute failed: ", result);
    return value;
  };
  return {attribute(kComputeCapabilityMajor), attribute(kComputeCapabilityMinor),
          attribute(kMultiprocessorCount), attribute(kMaxSharedMemoryPerBlockOptin),
          attribute(kL2CacheSize)};
}

std::string library_path(Arch arch) {
  Dl_info info;
  STD_TORCH_CHECK(dladdr(reinterpret_cast<void*>(&query_device), &info) != 0,
                  "flash_attn_ext: the binder can not find its own path");
  const std::string self = info.dli_fname;
  return self.substr(0, self.rfind('/') + 1) + "_" + arch_name(arch) + ".abi3.so";
}

ArchSet libraries_beside_binder() {
  ArchSet archs;
  for (int i = 0; i < kNumArchs; ++i)
    if (access(library_path(static_cast<Arch>(i)).c_str(), R_OK) == 0)
      archs = archs.with(static_cast<Arch>(i));
  return archs;
}

const Backend* load_backend(Arch arch) {
  const std::string path = library_path(arch);
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  STD_TORCH_CHECK(handle != nullptr, "flash_attn_ext: can not open ", path, ": ", dlerror());
  auto* get_backend = reinterpret_cast<FaGetBackend*>(dlsym(handle, kFaGetBackendSymbol));
  STD_TORCH_CHECK(get_backend != nullptr, "flash_attn_ext: ", path, " has no symbol ",
                  kFaGetBackendSymbol, "; install the package again");
  const Backend* backend = get_backend();
  STD_TORCH_CHECK(backend->abi_version == kKernelAbiVersion, "flash_attn_ext: ", path,
                  " was built from other sources (kernel ABI ", backend->abi_version, ", expected ",
                  kKernelAbiVersion, "); install the package again");
  return backend;
}

// FLASH_ATTN_EXT_SMEM_KB in bytes, or `all` without it. Read at every call, like the other
// switches.
int smem_limit(int all) {
  const char* text = std::getenv("FLASH_ATTN_EXT_SMEM_KB");
  if (text == nullptr || text[0] == '\0') return all;
  char* end = nullptr;
  const long kb = std::strtol(text, &end, 10);
  STD_TORCH_CHECK(*end == '\0' && kb > 0 && kb <= 1024,
                  "flash_attn_ext: FLASH_ATTN_EXT_SMEM_KB=", text,
                  ": expected a number of KB, 1 to 1024");
  return min(all, static_cast<int>(kb) * 1024);
}

std::mutex& state_mutex() {
  static std::mutex mutex;
  return mutex;
}

}  // namespace

void* current_stream(int device_index) {
  using GetStream = AOTITorchError(int32_t, void**);
  static auto* get_stream = reinterpret_cast<GetStream*>(
      find_symbol("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream"));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(device_index, &stream));
  return stream;
}

Scratch::Scratch(int64_t bytes, int device_index) {
  if (bytes == 0) return;
  using RawAlloc = AOTITorchError(uint64_t, void**);
  static auto* raw_alloc = reinterpret_cast<RawAlloc*>(
      find_symbol("libtorch_cuda.so", "aoti_torch_cuda_caching_allocator_raw_alloc"));
  const CurrentDevice current(device_index);
  TORCH_ERROR_CODE_CHECK(raw_alloc(static_cast<uint64_t>(bytes), &data_));
}

Scratch::~Scratch() {
  if (data_ == nullptr) return;
  using RawDelete = AOTITorchError(void*);
  static auto* raw_delete = reinterpret_cast<RawDelete*>(
      find_symbol("libtorch_cuda.so", "aoti_torch_cuda_caching_allocator_raw_delete"));
  raw_delete(data_);
}

DeviceFacts device_facts(int device_index) {
  static std::array<std::atomic<const DeviceFacts*>, 64> facts{};
  STD_TORCH_CHECK(0 <= device_index && device_index < static_cast<int>(facts.size()),
                  "flash_attn_ext: CUDA device index ", device_index, ", expected 0 .. 63");
  const DeviceFacts* known = facts[device_index].load(std::memory_order_acquire);
  if (known == nullptr) {
    const std::lock_guard<std::mutex> lock(state_mutex());
    known = facts[device_index].load(std::memory_order_relaxed);
    if (known == nullptr) {
      known = new DeviceFacts(query_device(device_index));  // for the life of the process
      facts[device_index].store(known, std::memory_order_release);
    }
  }
  DeviceFacts found = *known;
  found.max_smem_bytes = smem_limit(found.max_smem_bytes);
  return found;
}

ArchSet usable_archs() {
  static const ArchSet present = libraries_beside_binder();
  const char* backend = std::getenv("FLASH_ATTN_EXT_BACKEND");
  if (backend != nullptr && std::string(backend) == "tiled") return {};
  const char* forced = std::getenv("FLASH_ATTN_EXT_ARCH");
  if (forced == nullptr || forced[0] == '\0') return present;
  for (int i = 0; i < kNumArchs; ++i) {
    const Arch arch = static_cast<Arch>(i);
    if (std::string(forced) != arch_name(arch)) continue;
    STD_TORCH_CHECK(present.contains(arch), "flash_attn_ext: FLASH_ATTN_EXT_ARCH=", forced,
                    ": this build has no such library, it has ", present.to_string());
    return ArchSet().with(arch);
  }
  STD_TORCH_CHECK(false, "flash_attn_ext: FLASH_ATTN_EXT_ARCH=", forced,
                  ": expected one of sm80, sm89, sm90");
}

const Backend& open_backend(Arch arch) {
  static std::array<std::atomic<const Backend*>, kNumArchs> backends{};
  std::atomic<const Backend*>& backend = backends[static_cast<int>(arch)];
  if (const Backend* open = backend.load(std::memory_order_acquire)) return *open;
  const std::lock_guard<std::mutex> lock(state_mutex());
  if (backend.load(std::memory_order_relaxed) == nullptr)
    backend.store(load_backend(arch), std::memory_order_release);
  return *backend.load(std::memory_order_relaxed);
}

PlannedKernel plan_kernel(const Problem& problem, int device_index, int64_t sm_margin) {
  DeviceFacts device = device_facts(device_index);
  device.num_sms = static_cast<int>(max<int64_t>(1, device.num_sms - sm_margin));
  const std::optional<Plan> plan = find_plan(problem, device, usable_archs());
  if (!plan) return {};
  return {&open_backend(plan->arch), *plan};
}

}  // namespace fa
