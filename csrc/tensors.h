#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace torchsurgeon {

// Returns an int64 tensor [rows, columns] on the CPU with a copy of `values`, which holds the rows one after another.
inline torch::stable::Tensor table(const std::vector<int64_t>& values, int64_t columns) {
  const int64_t rows = static_cast<int64_t>(values.size()) / columns;
  torch::stable::Tensor tensor = torch::stable::empty(
      {rows, columns},
      torch::headeronly::ScalarType::Long,
      std::nullopt,
      torch::stable::Device(torch::headeronly::DeviceType::CPU));
  if (!values.empty()) {
    std::memcpy(tensor.mutable_data_ptr(), values.data(), values.size() * sizeof(int64_t));
  }
  return tensor;
}

} // namespace torchsurgeon
