// One sentence of refusal, put together only where somebody reads it.
#pragma once
#include <cstdint>
#include <string>

namespace fa {

// Checks take a Reason by value and say why they refuse: `return reason("x=", x, ": at most 3")`.
class Reason {
 public:
  // text: where the sentence goes; nullptr: nobody reads it.
  explicit Reason(std::string* text) : text_(text) {}

  bool is_read() const { return text_ != nullptr; }

  // Joins the parts. Returns true: refused.
  template <class... Parts>
  bool operator()(const Parts&... parts) const {
    if (is_read()) (append(parts), ...);
    return true;
  }

 private:
  void append(const std::string& part) const { *text_ += part; }
  void append(const char* part) const { *text_ += part; }
  void append(int64_t number) const { *text_ += std::to_string(number); }
  void append(int number) const { *text_ += std::to_string(number); }

  std::string* text_;
};

}  // namespace fa
