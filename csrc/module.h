#pragma once

#include <cstddef>

namespace torchsurgeon {

// PYTHON_ABI_VERSION, which extensions of the limited API pass to PyModule_Create2.
constexpr int kPythonAbiVersion = 3;

struct ModuleDefinitionBase {
  std::ptrdiff_t reference_count;
  void* type;
  void* (*init)();
  std::ptrdiff_t index;
  void* copy;
};

struct ModuleDefinition {
  ModuleDefinitionBase base;
  const char* name;
  const char* documentation;
  std::ptrdiff_t state_size;
  void* methods;
  void* slots;
  void* traverse;
  void* clear;
  void* free;
};

} // namespace torchsurgeon
