// Op of FLASH_ATTN_EXT_DEBUG=1: value_checks, the values of a call's index tensors in one launch.
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "bindings/device.h"
#include "bindings/stable_torch.h"
#include "bindings/tensor_checks.h"

namespace fa {
namespace {

constexpr int kTableColumns = 12;  // numbers of a check, see row_of

// The arguments of the op that a check is made of.
struct ValueCheckArgs {
  const std::vector<Tensor>& tensors;
  int64_t batch_size;

  // tensors[index] as int32 [size]; -1: none.
  const int* vector(int64_t index, int64_t size) const {
    return index < 0 ? nullptr : int32_vector("tensors", tensor(index), tensors[0], size);
  }
  const Tensor& tensor(int64_t index) const {
    FA_CHECK(index < static_cast<int64_t>(tensors.size()), "table: got tensor ", index,
             ", expected one of ", tensors.size());
    return tensors[index];
  }
  // {values, cu_seqlens, constant, sign}, the tensors by their place in `tensors`.
  LengthTerms terms(const int64_t* row) const {
    return {vector(row[0], batch_size), vector(row[1], batch_size + 1), row[2],
            static_cast<int>(row[3])};
  }
};

void copy_text(char* to, size_t chars, const std::string& text) {
  FA_CHECK(text.size() < chars, "texts: got ", text, ", expected fewer than ", chars,
           " characters");
  std::memcpy(to, text.c_str(), text.size() + 1);
}

// One row of the table: kind, value (4 numbers), limit (4), page_table, table_rows, page_size.
ValueCheck row_of(const ValueCheckArgs& args, const int64_t* row) {
  FA_CHECK(0 <= row[0] && row[0] <= static_cast<int>(ValueCheckKind::kPages), "table: got kind ",
           row[0], ", expected 0 to 2");
  ValueCheck check{};
  check.kind = static_cast<ValueCheckKind>(row[0]);
  check.value = args.terms(row + 1);
  check.limit = args.terms(row + 5);
  FA_CHECK(check.kind != ValueCheckKind::kAscending || check.value.cu_seqlens != nullptr,
           "table: got no cu_seqlens, expected those that ascend");
  if (check.kind != ValueCheckKind::kPages) return check;
  const Tensor& pages = args.tensor(max<int64_t>(row[9], 0));
  check_tensor("page_table", pages, args.tensors[0], 2);
  check_dtype("page_table", pages, ScalarType::Int);
  check.page_table = static_cast<const int*>(pages.data_ptr());
  check.page_table_stride = pages.stride(0);
  check.page_table_rows = to_int("page_table rows", pages.size(0));
  check.max_pages = to_int("max_pages", pages.size(1));
  check.table_rows = args.vector(row[10], args.batch_size);
  check.page_size = max(to_int("page_size", row[11]), 1);
  FA_CHECK(check.table_rows != nullptr || check.page_table_rows >= args.batch_size,
           "page_table: got ", check.page_table_rows, " rows, expected ", args.batch_size);
  return check;
}

// texts: name and text of each check, a line each. Returns the record, [kRecordWords]; empty if
// none is asked for, or where no library is for the device and nothing is checked.
Tensor value_checks(std::vector<Tensor> tensors, std::vector<int64_t> table, std::string texts,
                    int64_t batch_size, bool record) {
  const int num_checks = static_cast<int>(table.size() / kTableColumns);
  FA_CHECK(!tensors.empty(), "tensors: got none, expected those that are checked");
  FA_CHECK(num_checks <= kMaxValueChecks && table.size() % kTableColumns == 0, "table: got ",
           table.size(), " numbers, expected ", kTableColumns, " for each of at most ",
           kMaxValueChecks, " checks");
  const int device_index = tensors[0].get_device_index();
  const std::optional<Arch> arch = find_library(device_facts(device_index), usable_archs());
  if (!arch) return new_tensor(tensors[0], {0}, ScalarType::Long);

  ValueCheckParams p{};
  const ValueCheckArgs args{tensors, batch_size};
  p.batch_size = to_int("batch", batch_size);
  p.num_checks = num_checks;
  std::istringstream lines(texts);
  std::string name, text;
  for (int i = 0; i < num_checks; ++i) {
    p.checks[i] = row_of(args, table.data() + i * kTableColumns);
    std::getline(lines, name);
    std::getline(lines, text);
    copy_text(p.checks[i].name, kValueCheckNameChars, name);
    copy_text(p.checks[i].text, kValueCheckTextChars, text);
  }
  Tensor words = new_tensor(tensors[0], {record ? kRecordWords : 0}, ScalarType::Long);
  p.record = record ? static_cast<int64_t*>(words.data_ptr()) : nullptr;
  const Backend& backend = open_backend(*arch);
  launch(backend, backend.value_checks, p, device_index);
  return words;
}

}  // namespace
}  // namespace fa

STABLE_TORCH_LIBRARY_IMPL(flash_attn_ext, CUDA, m) {
  m.impl("value_checks", TORCH_BOX(&fa::value_checks));
}
