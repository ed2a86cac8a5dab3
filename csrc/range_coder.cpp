// Codes groups of integers into as few bits as tables of their probabilities say, and decodes them.
//
// What torchsurgeon/codec/range_coder.py says of the format holds here. Only integers decide, so every machine decodes
// the same. The tables and the stream may be anybody's: whatever they hold, nothing outside of the tensors is read or
// written, and decoding takes as many steps as there are integers to fill.
#include "range_contexts.h"
#include "range_stream.h"
#include "vector.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace torchsurgeon {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t kMostSymbols = 64;
// Where zero is as likely as this, a branch that the processor predicts is faster than the search, which it has to wait
// for. It takes a quarter off the time where a quarter of the integers is not zero. Elsewhere, branching on rows in
// which zero is less likely than this cost a seventh.
constexpr uint32_t kLikely = 20000;
constexpr uint32_t kMostEscapeBits = 16;

struct Tables {
  Contexts contexts;
  size_t rows;
  size_t symbols;
  size_t tables;
  const uint16_t* cumulative;
  const uint8_t* escape_bits;
  const uint8_t* row_of;
  const uint16_t* table_of;
};

TORCHSURGEON_VECTOR void levels(const Contexts& contexts, Planes& planes, uint8_t* levels) {
  for (size_t group = 0; group < contexts.groups; ++group) {
    const uint32_t left_weight = planes.left_weight(group);
    planes.begin(group);
    for (size_t y = 0; y < planes.height(); ++y) {
      const uint16_t* sums = planes.sums(group, y);
      const uint8_t* left = planes.row(group, y) - 1;
      for (size_t x = 0; x < planes.width(); ++x) {
        *levels++ = level(sums[x] + left_weight * left[x]);
      }
    }
  }
}

int64_t encode(const Tables& tables, const int32_t* values, const uint8_t* levels, size_t in_group, Encoder& encoder) {
  const uint32_t escape = static_cast<uint32_t>(tables.symbols) - 1;
  for (size_t group = tables.contexts.groups; group-- > 0;) {
    const uint8_t* row_of = tables.row_of + tables.table_of[group] * kLevels;
    for (size_t i = (group + 1) * in_group; i-- > group * in_group;) {
      const uint32_t folded = zigzag(values[i]), symbol = std::min(folded, escape);
      const size_t row = row_of[levels[i]];
      if (symbol == escape) {
        encoder.put_escaped(folded - escape, tables.escape_bits[row]);
      }
      const uint16_t* start = tables.cumulative + row * (tables.symbols + 1) + symbol;
      encoder.put(start[0], static_cast<uint32_t>(start[1] - start[0]));
    }
  }
  return encoder.finish();
}

// For each row of the tables, the last slot before each symbol but the first, as signed integers, which all processors
// compare; what is left of the lanes is never before a slot.
class Search {
 public:
  explicit Search(const Tables& tables)
      : stride_((tables.symbols - 1 + kLanes - 1) / kLanes * kLanes),
        bounds_(tables.rows * stride_, static_cast<int16_t>(kTotal - 1)) {
    for (size_t row = 0; row < tables.rows; ++row) {
      for (size_t symbol = 1; symbol < tables.symbols; ++symbol) {
        bounds_[row * stride_ + symbol - 1] =
            static_cast<int16_t>(tables.cumulative[row * (tables.symbols + 1) + symbol] - 1);
      }
    }
  }

  inline __attribute__((always_inline)) uint32_t symbol(size_t row, uint32_t slot) const {
    const int16_t* bounds = bounds_.data() + row * stride_;
    uint32_t symbol = 0;
    for (size_t i = 0; i < stride_; i += kLanes) {
      const uint32_t below = before(bounds + i, slot);
      symbol += below;
      if (below < kLanes) {
        break;
      }
    }
    return symbol;
  }

 private:
  // How many of the bounds, which rise, are less than the slot.
  static inline __attribute__((always_inline)) uint32_t before(const int16_t* bounds, uint32_t slot) {
#if defined(__SSE2__)
    const __m128i wanted = _mm_set1_epi16(static_cast<int16_t>(slot));
    const __m128i* in = reinterpret_cast<const __m128i*>(bounds);
    const __m128i first = _mm_cmpgt_epi16(wanted, _mm_loadu_si128(in));
    const __m128i second = _mm_cmpgt_epi16(wanted, _mm_loadu_si128(in + 1));
    const uint32_t mask = static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(first, second)));
    return static_cast<uint32_t>(std::countr_zero(~mask));
#elif defined(__aarch64__)
    const int16x8_t wanted = vdupq_n_s16(static_cast<int16_t>(slot));
    const uint16x8_t first = vcgtq_s16(wanted, vld1q_s16(bounds));
    const uint16x8_t second = vcgtq_s16(wanted, vld1q_s16(bounds + 8));
    // A lane that is less counts as minus one in both.
    return static_cast<uint16_t>(-vaddvq_u16(vaddq_u16(first, second)));
#else
    uint32_t less = 0;
    for (size_t i = 0; i < kLanes; ++i) {
      less += static_cast<uint32_t>(bounds[i] < static_cast<int32_t>(slot));
    }
    return less;
#endif
  }

  const size_t stride_;
  std::vector<int16_t> bounds_;
};

TORCHSURGEON_VECTOR bool decode(const Tables& tables, Decoder decoder, Planes& planes, int32_t* values) {
  const Search search(tables);
  const uint32_t escape = static_cast<uint32_t>(tables.symbols) - 1;
  for (size_t group = 0; group < tables.contexts.groups; ++group) {
    const uint8_t* row_of = tables.row_of + tables.table_of[group] * kLevels;
    const uint32_t left_weight = planes.left_weight(group);
    planes.begin(group);
    for (size_t y = 0; y < planes.height(); ++y) {
      const uint16_t* sums = planes.sums(group, y);
      uint8_t* magnitudes = planes.row(group, y);
      uint32_t left = 0;
      for (size_t x = 0; x < planes.width(); ++x) {
        const size_t row = row_of[level(sums[x] + left_weight * left)];
        const uint32_t slot = decoder.slot();
        const uint16_t* start = tables.cumulative + row * (tables.symbols + 1);
        if ((start[1] >= kLikely) & (slot < start[1])) { // one branch, not two
          decoder.take(slot, 0, start[1]);
          *values++ = 0;
          magnitudes[x] = 0;
          left = 0;
          continue;
        }
        const uint32_t symbol = search.symbol(row, slot);
        start += symbol;
        decoder.take(slot, start[0], static_cast<uint32_t>(start[1] - start[0]));
        uint32_t folded = symbol;
        if (symbol == escape) {
          folded += decoder.take_escaped(tables.escape_bits[row]);
        }
        *values++ = from_zigzag(folded);
        left = magnitude(folded);
        magnitudes[x] = static_cast<uint8_t>(left);
      }
    }
  }
  return decoder.ended_well();
}

// --- what the operators are given: checked here, so that no caller can make the loops leave the tensors ---

const void* memory(const Tensor& tensor, ScalarType type, int64_t dims, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == type && tensor.dim() == dims,
      name,
      " has another dtype or rank, or is not contiguous on the CPU");
  return tensor.const_data_ptr();
}

size_t length(const Tensor& tensor, int64_t dim) {
  return static_cast<size_t>(tensor.size(dim));
}

Contexts checked_contexts(const Tensor& parents, const Tensor& weights, const Tensor& bias) {
  Contexts contexts{};
  contexts.parents_of = static_cast<const int32_t*>(memory(parents, ScalarType::Int, 2, "parents"));
  contexts.weights = static_cast<const uint8_t*>(memory(weights, ScalarType::Byte, 2, "weights"));
  contexts.bias = static_cast<const uint16_t*>(memory(bias, ScalarType::UInt16, 1, "bias"));
  contexts.groups = length(parents, 0);
  contexts.parents = length(parents, 1);
  STD_TORCH_CHECK(
      contexts.parents <= kMostParents && length(weights, 0) == contexts.groups &&
          length(weights, 1) == kOwnWeights + contexts.parents && length(bias, 0) == contexts.groups,
      "parents, weights and bias are of different groups, or too many");
  for (size_t group = 0; group < contexts.groups; ++group) {
    const int32_t* of = contexts.parents_of + group * contexts.parents;
    for (size_t p = 0; p < contexts.parents; ++p) {
      STD_TORCH_CHECK(of[p] >= -1 && of[p] < static_cast<int64_t>(group), "a parent is not an earlier group");
    }
    // Sums have 16 bits. Where one is too large it wraps around: wrong on both sides, and the same on both.
  }
  return contexts;
}

Tables checked_tables(
    const Tensor& cumulative,
    const Tensor& escape_bits,
    const Tensor& row_of,
    const Tensor& table_of,
    const Tensor& parents,
    const Tensor& weights,
    const Tensor& bias) {
  Tables tables{};
  tables.contexts = checked_contexts(parents, weights, bias);
  tables.cumulative = static_cast<const uint16_t*>(memory(cumulative, ScalarType::UInt16, 2, "cumulative"));
  tables.escape_bits = static_cast<const uint8_t*>(memory(escape_bits, ScalarType::Byte, 1, "escape_bits"));
  tables.row_of = static_cast<const uint8_t*>(memory(row_of, ScalarType::Byte, 2, "row_of"));
  tables.table_of = static_cast<const uint16_t*>(memory(table_of, ScalarType::UInt16, 1, "table_of"));
  tables.rows = length(cumulative, 0);
  tables.symbols = length(cumulative, 1) > 0 ? length(cumulative, 1) - 1 : 0;
  tables.tables = length(row_of, 0);
  STD_TORCH_CHECK(
      tables.symbols >= 2 && tables.symbols <= kMostSymbols, "there are from 2 to ", kMostSymbols, " symbols");
  STD_TORCH_CHECK(
      length(escape_bits, 0) == tables.rows && length(row_of, 1) == kLevels &&
          length(table_of, 0) == tables.contexts.groups,
      "the tables are of different sizes");
  for (size_t row = 0; row < tables.rows; ++row) {
    const uint16_t* of = tables.cumulative + row * (tables.symbols + 1);
    bool rises = of[0] == 0 && of[tables.symbols] == kTotal;
    for (size_t symbol = 0; symbol < tables.symbols; ++symbol) {
      rises = rises && of[symbol] < of[symbol + 1];
    }
    STD_TORCH_CHECK(rises, "a row of cumulative does not rise from 0 to ", kTotal);
    STD_TORCH_CHECK(tables.escape_bits[row] <= kMostEscapeBits, "escape_bits are at most ", kMostEscapeBits);
  }
  for (size_t i = 0; i < tables.tables * kLevels; ++i) {
    STD_TORCH_CHECK(tables.row_of[i] < tables.rows, "row_of names a row that is not there");
  }
  for (size_t group = 0; group < tables.contexts.groups; ++group) {
    STD_TORCH_CHECK(tables.table_of[group] < tables.tables, "table_of names a table that is not there");
  }
  return tables;
}

const int32_t* checked_values(const Tensor& values, const Contexts& contexts) {
  const void* data = memory(values, ScalarType::Int, 3, "values");
  STD_TORCH_CHECK(length(values, 0) == contexts.groups, "there are ", contexts.groups, " groups, not ", values.size(0));
  return static_cast<const int32_t*>(data);
}

int64_t range_encode(
    const Tensor values,
    const Tensor cumulative,
    const Tensor escape_bits,
    const Tensor row_of,
    const Tensor table_of,
    const Tensor parents,
    const Tensor weights,
    const Tensor bias,
    const Tensor stream) {
  const Tables tables = checked_tables(cumulative, escape_bits, row_of, table_of, parents, weights, bias);
  const int32_t* from = checked_values(values, tables.contexts);
  memory(stream, ScalarType::Byte, 1, "stream");
  STD_TORCH_CHECK(length(stream, 0) >= 16, "a stream has room for at least 16 bytes");
  uint8_t* to = static_cast<uint8_t*>(stream.mutable_data_ptr());
  const size_t height = length(values, 1), width = length(values, 2);
  std::vector<uint8_t> found(tables.contexts.groups * height * width);
  Planes planes(tables.contexts, height, width);
  planes.fill(from);
  levels(tables.contexts, planes, found.data());
  Encoder encoder(to, to + length(stream, 0));
  return encode(tables, from, found.data(), height * width, encoder);
}

bool range_decode(
    const Tensor stream,
    const Tensor cumulative,
    const Tensor escape_bits,
    const Tensor row_of,
    const Tensor table_of,
    const Tensor parents,
    const Tensor weights,
    const Tensor bias,
    const Tensor values) {
  const Tables tables = checked_tables(cumulative, escape_bits, row_of, table_of, parents, weights, bias);
  checked_values(values, tables.contexts);
  const void* data = memory(stream, ScalarType::Byte, 1, "stream");
  Planes planes(tables.contexts, length(values, 1), length(values, 2));
  return decode(
      tables,
      Decoder(static_cast<const uint8_t*>(data), length(stream, 0)),
      planes,
      static_cast<int32_t*>(values.mutable_data_ptr()));
}

void range_levels(
    const Tensor values, const Tensor parents, const Tensor weights, const Tensor bias, const Tensor found) {
  const Contexts contexts = checked_contexts(parents, weights, bias);
  const int32_t* from = checked_values(values, contexts);
  memory(found, ScalarType::Byte, 3, "levels");
  STD_TORCH_CHECK(found.numel() == values.numel(), values.numel(), " values have as many levels, not ", found.numel());
  Planes planes(contexts, length(values, 1), length(values, 2));
  planes.fill(from);
  levels(contexts, planes, static_cast<uint8_t*>(found.mutable_data_ptr()));
}

} // namespace
} // namespace torchsurgeon

STABLE_TORCH_LIBRARY_FRAGMENT(torchsurgeon, m) {
  m.def(
      "range_encode(Tensor values, Tensor cumulative, Tensor escape_bits, Tensor row_of, Tensor table_of, "
      "Tensor parents, Tensor weights, Tensor bias, Tensor(a!) stream) -> int");
  m.def(
      "range_decode(Tensor stream, Tensor cumulative, Tensor escape_bits, Tensor row_of, Tensor table_of, "
      "Tensor parents, Tensor weights, Tensor bias, Tensor(a!) values) -> bool");
  m.def("range_levels(Tensor values, Tensor parents, Tensor weights, Tensor bias, Tensor(a!) levels) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torchsurgeon, CPU, m) {
  m.impl("range_encode", TORCH_BOX(&torchsurgeon::range_encode));
  m.impl("range_decode", TORCH_BOX(&torchsurgeon::range_decode));
  m.impl("range_levels", TORCH_BOX(&torchsurgeon::range_levels));
}
