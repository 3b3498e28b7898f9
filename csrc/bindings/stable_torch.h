// The one door to torch: its stable ABI, and the two things missing there (stream, tiled fallback).
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace fa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// torch's current CUDA stream on `device_index`, as a cudaStream_t.
void* current_stream(int device_index);

namespace detail {

template <class Ret>
struct FromStack {
  static Ret call(StableIValue* stack) { return torch::stable::detail::to<Ret>(stack[0]); }
};
template <>
struct FromStack<void> {
  static void call(StableIValue*) {}
};
template <class... Rets>
struct FromStack<std::tuple<Rets...>> {
  template <size_t... I>
  static std::tuple<Rets...> unpack(StableIValue* stack, std::index_sequence<I...>) {
    return {torch::stable::detail::to<Rets>(stack[I])...};
  }
  static std::tuple<Rets...> call(StableIValue* stack) {
    return unpack(stack, std::index_sequence_for<Rets...>{});
  }
};

}  // namespace detail

// Runs the `tiled` overload of op `name` ("flash_attn_ext::combine"): the backend in PyTorch
// operations, for problems that no kernel takes. Arguments as in the schema.
template <class Ret, class... Args>
Ret call_tiled(const char* name, const Args&... args) {
  // The dispatcher takes the arguments off the stack and leaves the returns there.
  constexpr size_t kSlots = sizeof...(Args) > 3 ? sizeof...(Args) : 3;
  std::array<StableIValue, kSlots> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "tiled", stack.data(), TORCH_ABI_VERSION));
  return detail::FromStack<Ret>::call(stack.data());
}

}  // namespace fa
