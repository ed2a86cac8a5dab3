// Turns a float tensor into codes of eight or four bits, and back, each in one pass over memory; with PyTorch's own
// operators it takes four passes or more. The layout is that of torchsurgeon/codec/quantize.py: with four bits, a byte
// holds a value of the tensor's first half in its lower bits and one of the second half in its upper bits.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdint>

#include "vector.h"

namespace torchsurgeon {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// `low` is the least of the values, and `inverse` scales their range to that of the codes, so no value has to be
// clamped, which would double the time. The caller makes sure that all values are finite.
inline uint8_t code(float value, float low, float inverse) {
  return static_cast<uint8_t>(static_cast<int32_t>((value - low) * inverse + 0.5F));
}

TORCHSURGEON_VECTOR void to_bytes(const float* values, size_t count, float low, float inverse, uint8_t* codes) {
  for (size_t i = 0; i < count; ++i) {
    codes[i] = code(values[i], low, inverse);
  }
}

TORCHSURGEON_VECTOR void to_nibbles(const float* values, size_t count, float low, float inverse, uint8_t* codes) {
  const size_t half = (count + 1) / 2;
  const float* second = values + half;
  for (size_t i = 0; i < count / 2; ++i) {
    const int upper = code(second[i], low, inverse) << 4;
    codes[i] = static_cast<uint8_t>(code(values[i], low, inverse) | upper);
  }
  if (count % 2 == 1) {
    codes[half - 1] = code(values[half - 1], low, inverse);
  }
}

TORCHSURGEON_VECTOR void from_bytes(const uint8_t* codes, size_t count, float low, float scale, float* values) {
  for (size_t i = 0; i < count; ++i) {
    values[i] = low + scale * static_cast<float>(codes[i]);
  }
}

TORCHSURGEON_VECTOR void from_nibbles(const uint8_t* codes, size_t count, float low, float scale, float* values) {
  const size_t half = (count + 1) / 2;
  for (size_t i = 0; i < half; ++i) {
    values[i] = low + scale * static_cast<float>(codes[i] & 15);
  }
  for (size_t i = 0; i < count / 2; ++i) {
    values[half + i] = low + scale * static_cast<float>(codes[i] >> 4);
  }
}

// Checks that the loops may read and write both tensors, and returns the number of values.
size_t checked(const Tensor& values, const Tensor& codes, int64_t bits) {
  STD_TORCH_CHECK(bits == 8 || bits == 4, "codes have 8 or 4 bits, not ", bits);
  STD_TORCH_CHECK(
      values.scalar_type() == ScalarType::Float && codes.scalar_type() == ScalarType::Byte,
      "values are float32 and codes uint8");
  STD_TORCH_CHECK(
      values.is_cpu() && codes.is_cpu() && values.is_contiguous() && codes.is_contiguous(),
      "values and codes are contiguous, on the CPU");
  const int64_t needed = bits == 8 ? values.numel() : (values.numel() + 1) / 2;
  STD_TORCH_CHECK(codes.numel() == needed, values.numel(), " values take ", needed, " bytes, not ", codes.numel());
  return static_cast<size_t>(values.numel());
}

void quantize(const Tensor values, double low, double inverse, int64_t bits, const Tensor codes) {
  const size_t count = checked(values, codes, bits);
  const auto loop = bits == 8 ? &to_bytes : &to_nibbles;
  loop(
      static_cast<const float*>(values.const_data_ptr()),
      count,
      static_cast<float>(low),
      static_cast<float>(inverse),
      static_cast<uint8_t*>(codes.mutable_data_ptr()));
}

void dequantize(const Tensor codes, double low, double scale, int64_t bits, const Tensor values) {
  const size_t count = checked(values, codes, bits);
  const auto loop = bits == 8 ? &from_bytes : &from_nibbles;
  loop(
      static_cast<const uint8_t*>(codes.const_data_ptr()),
      count,
      static_cast<float>(low),
      static_cast<float>(scale),
      static_cast<float*>(values.mutable_data_ptr()));
}

} // namespace
} // namespace torchsurgeon

STABLE_TORCH_LIBRARY_FRAGMENT(torchsurgeon, m) {
  m.def("quantize(Tensor values, float low, float inverse, int bits, Tensor(a!) codes) -> ()");
  m.def("dequantize(Tensor codes, float low, float scale, int bits, Tensor(a!) values) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torchsurgeon, CPU, m) {
  m.impl("quantize", TORCH_BOX(&torchsurgeon::quantize));
  m.impl("dequantize", TORCH_BOX(&torchsurgeon::dequantize));
}
