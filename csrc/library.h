#pragma once

#include <dlfcn.h>

#include <string>

namespace torchsurgeon {

// A shared library opened at run time and kept open for the life of the process.
class DynamicLibrary {
 public:
  // Opens nothing for an empty path. With `loaded_only`, opens the library only if the process has loaded it already.
  bool open(const std::string& path, bool loaded_only = false) {
    handle_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | (loaded_only ? RTLD_NOLOAD : 0));
    return handle_ != nullptr;
  }

  bool is_open() const {
    return handle_ != nullptr;
  }

  // Returns whether the symbol was found; `function` then points to it.
  template <typename Function>
  bool find(const char* symbol, Function*& function) const {
    function = reinterpret_cast<Function*>(dlsym(handle_, symbol));
    return function != nullptr;
  }

 private:
  void* handle_ = nullptr;
};

// What an operator that opens a library returns; positive numbers are the library's own error codes.
constexpr int64_t kOpened = 0;
constexpr int64_t kNotFound = -1;
constexpr int64_t kTooOld = -2;
constexpr int64_t kNoDriver = -3;

} // namespace torchsurgeon
