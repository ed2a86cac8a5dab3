#include "clock.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(torchsurgeon, m) {
  m.def("clock_ns() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(torchsurgeon, CompositeExplicitAutograd, m) {
  m.impl("clock_ns", TORCH_BOX(&torchsurgeon::monotonic_ns));
}
