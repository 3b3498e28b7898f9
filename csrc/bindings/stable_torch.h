// The one door to torch: its stable ABI, and what is missing there: the stream, new tensors at the
// price of an allocation, the tiled fallback.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <initializer_list>
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

// Sizes of a new tensor, at most 5 dimensions.
struct Shape {
  std::array<int64_t, 5> size{};
  int64_t rank = 0;

  Shape() = default;
  Shape(std::initializer_list<int64_t> sizes) {
    for (const int64_t s : sizes) size[rank++] = s;
  }
  // That of a tensor.
  explicit Shape(const Tensor& t) {
    for (const int64_t s : t.sizes()) size[rank++] = s;
  }
  int64_t& last() { return size[rank - 1]; }
};

// The element type as torch's ABI numbers it. Tensor::scalar_type() translates this number, at the
// price of seven other questions.
inline int32_t dtype_number(const Tensor& t) {
  int32_t number = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &number));
  return number;
}

// A contiguous tensor without values on the device of `like`; by default also of its element type.
// As stable::new_empty, which takes three times as long, because the dispatcher boxes its
// arguments.
inline Tensor new_tensor(const Tensor& like, const Shape& shape,
                         std::optional<ScalarType> dtype = std::nullopt) {
  std::array<int64_t, 5> stride{};
  int64_t next = 1;
  for (int64_t i = shape.rank - 1; i >= 0; --i) {
    stride[i] = next;
    next *= shape.size[i] > 1 ? shape.size[i] : 1;
  }
  const int32_t number =
      dtype ? torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype))
            : dtype_number(like);
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.rank, shape.size.data(), stride.data(),
                                                  number, device_type, like.get_device_index(),
                                                  &handle));
  return Tensor(handle);
}

// The same, filled with zeros.
inline Tensor zero_tensor(const Tensor& like, const Shape& shape,
                          std::optional<ScalarType> dtype = std::nullopt) {
  Tensor zeros = new_tensor(like, shape, dtype);
  TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(zeros.get()));
  return zeros;
}

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
