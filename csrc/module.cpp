// PyInit__C, so that `import torchsurgeon._C` loads the library and its static initialisers register the operators.
//
// The three pieces of the limited API it needs are declared here and not taken from Python.h: a machine with Python and
// g++ but without python3-dev builds the extension too, and so does a cross compiler that has no Python for its target.
// The layouts are part of Python's stable ABI; tests/native/python_abi.cpp compares them with the real header.
//
// Operators that run while a model does (clock, spans, events, ranges) pass ints and int64 tensors only: the dispatcher
// allocates for nothing else. Four that run before or after a trace (cupti_open, cupti_names, cupti_error_text,
// cuda_error_name) pass str, since what they pass is a path or a name; the stable ABI carries it from 2.10 on.
#include "module.h"

extern "C" {
void* PyModule_Create2(torchsurgeon::ModuleDefinition*, int api_version);
__attribute__((visibility("default"))) void* PyInit__C();
}

void* PyInit__C() {
  static torchsurgeon::ModuleDefinition definition = {
      {1, nullptr, nullptr, 0, nullptr}, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create2(&definition, torchsurgeon::kPythonAbiVersion);
}
