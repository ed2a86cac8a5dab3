// Compares what csrc/module.h declares of Python by hand with the real header; compiling it is the test.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include "module.h"

using torchsurgeon::ModuleDefinition;
using torchsurgeon::ModuleDefinitionBase;

static_assert(PYTHON_ABI_VERSION == torchsurgeon::kPythonAbiVersion);
static_assert(sizeof(PyModuleDef_Base) == sizeof(ModuleDefinitionBase));
static_assert(offsetof(PyModuleDef_Base, m_init) == offsetof(ModuleDefinitionBase, init));
static_assert(offsetof(PyModuleDef_Base, m_index) == offsetof(ModuleDefinitionBase, index));
static_assert(offsetof(PyModuleDef_Base, m_copy) == offsetof(ModuleDefinitionBase, copy));
static_assert(sizeof(PyModuleDef) == sizeof(ModuleDefinition));
static_assert(offsetof(PyModuleDef, m_name) == offsetof(ModuleDefinition, name));
static_assert(offsetof(PyModuleDef, m_doc) == offsetof(ModuleDefinition, documentation));
static_assert(offsetof(PyModuleDef, m_size) == offsetof(ModuleDefinition, state_size));
static_assert(offsetof(PyModuleDef, m_methods) == offsetof(ModuleDefinition, methods));
static_assert(offsetof(PyModuleDef, m_slots) == offsetof(ModuleDefinition, slots));
static_assert(offsetof(PyModuleDef, m_free) == offsetof(ModuleDefinition, free));
