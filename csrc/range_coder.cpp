// Codes groups of integers into as few bits as tables of their probabilities say, and decodes them: an asymmetric
// numeral system (Duda, arXiv 1311.2540) in its range variant, with a state of 64 bits that gives and takes words of 32.
//
// What torchsurgeon/codec/range_coder.py says of the format holds here. Only integers decide, so every machine decodes
// the same. The tables and the stream may be anybody's: whatever they hold, nothing outside of the tensors is read or
// written, and decoding takes as many steps as there are integers to fill.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
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

// One wheel serves every x86-64, so the loops are compiled twice, and which to run is decided once, when the extension
// is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define TORCHSURGEON_VECTOR __attribute__((target_clones("avx2", "default")))
#else
#define TORCHSURGEON_VECTOR
#endif

namespace torchsurgeon {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Words and the state lie in streams as they do in memory.
static_assert(std::endian::native == std::endian::little);

constexpr int kTotalBits = 15;
constexpr uint32_t kTotal = 1U << kTotalBits;
// While words are left, the state lies from here to below 2^32 times as much.
constexpr uint64_t kLeastState = uint64_t{1} << 31;
// The state before the first and after the last integer. With a smaller one, the first two integers would take more
// bits; with a larger one, the stream would begin with more bits that say nothing.
constexpr uint64_t kEmptyState = uint64_t{1} << 16;
constexpr size_t kLevels = 48;
// Weights that every group has before those of its parents: left, above, above to the left, above to the right, and the
// two windows.
constexpr size_t kOwnWeights = 6;
// Windows of groups that were coded last, and by how many bits what they say is shifted.
constexpr size_t kShort = 16, kLong = 128;
constexpr int kShortShift = 4, kLongShift = 6;
constexpr uint16_t kMostInWindow = 255;
constexpr size_t kMostParents = 8;
constexpr size_t kMostSymbols = 64;
constexpr uint32_t kMostMagnitude = 31;
constexpr uint32_t kMostSum = 4095;
constexpr size_t kLanes = 16;
// Where zero is as likely as this, a branch that the processor predicts is faster than the search, which it has to wait
// for. It takes a quarter off the time where a quarter of the integers is not zero. Elsewhere, branching on rows in
// which zero is less likely than this cost a seventh.
constexpr uint32_t kLikely = 20000;
// The longest Exp-Golomb code of a 32-bit integer has this many bits before its leading one.
constexpr uint32_t kLongestPrefix = 32;
constexpr uint32_t kMostEscapeBits = 16;

// The level of a sum: sums to 4 have one each, and then there are four to every doubling.
constexpr std::array<uint8_t, kMostSum + 1> levels_of_sums() {
  std::array<uint8_t, kMostSum + 1> levels{};
  for (uint32_t sum = 0; sum <= kMostSum; ++sum) {
    const uint32_t exponent = static_cast<uint32_t>(std::bit_width(sum + 4)) - 1;
    levels[sum] = static_cast<uint8_t>(4 * (exponent - 2) + (((sum + 4) >> (exponent - 2)) & 3));
  }
  return levels;
}
constexpr std::array<uint8_t, kMostSum + 1> kLevelOf = levels_of_sums();
static_assert(kLevelOf[kMostSum] < kLevels);

inline uint32_t zigzag(int32_t value) {
  return (static_cast<uint32_t>(value) << 1) ^ (value < 0 ? ~uint32_t{0} : 0);
}

inline int32_t from_zigzag(uint32_t folded) {
  return static_cast<int32_t>((folded >> 1) ^ (0 - (folded & 1)));
}

inline uint8_t magnitude(uint32_t folded) {
  return static_cast<uint8_t>(std::min((folded >> 1) + (folded & 1), kMostMagnitude));
}

// Which levels the integers of a group have.
struct Contexts {
  size_t groups;
  size_t parents;
  const int32_t* parents_of;
  const uint8_t* weights;
  const uint16_t* bias;
};

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

// Both compilers have such vectors on every processor. Left to find them in a loop, GCC did so in one function of three.
typedef uint8_t Magnitudes __attribute__((vector_size(kLanes)));
typedef uint16_t Sums __attribute__((vector_size(2 * kLanes)));

// Magnitudes of all groups, each group's with a row of zeros above and a column of zeros at the right, which also is
// the column at the left of the row below. So neighbours are read without asking where the group ends.
class Planes {
 public:
  Planes(const Contexts& contexts, size_t height, size_t width)
      : contexts_(contexts),
        height_(height),
        width_(width),
        stride_(width + 1),
        size_((height + 1) * stride_),
        magnitudes_(1 + contexts.groups * size_ + kLanes),
        sums_(size_ + kLanes),
        short_(size_ + kLanes),
        long_(size_ + kLanes) {}

  uint8_t* row(size_t group, size_t y) {
    return magnitudes_.data() + 1 + group * size_ + (y + 1) * stride_;
  }

  // Begins a group, which is the first or follows the one that was begun before: adds up what its bias, the windows and
  // its parents say.
  inline __attribute__((always_inline)) void begin(size_t group) {
    const uint8_t* weights = contexts_.weights + group * (kOwnWeights + contexts_.parents);
    const int32_t* parents = contexts_.parents_of + group * contexts_.parents;
    for (size_t i = 0; i < size_; i += kLanes) {
      Sums sums = Sums{} + contexts_.bias[group];
      Sums seen;
      move_window(short_, group, kShort, i, seen);
      sums += seen * weights[4] >> kShortShift;
      move_window(long_, group, kLong, i, seen);
      sums += seen * weights[5] >> kLongShift;
      for (size_t p = 0; p < contexts_.parents; ++p) {
        if (parents[p] >= 0) {
          read(static_cast<size_t>(parents[p]), i, seen);
          sums += seen * weights[kOwnWeights + p];
        }
      }
      std::memcpy(sums_.data() + i, &sums, sizeof sums);
    }
  }

  // Adds what the row above says, and returns the row's sums, which lack what the left neighbour says.
  inline __attribute__((always_inline)) const uint16_t* sums(size_t group, size_t y) {
    uint16_t* __restrict sums = sums_.data() + (y + 1) * stride_;
    if (y > 0) {
      const uint8_t* weights = contexts_.weights + group * (kOwnWeights + contexts_.parents);
      const uint16_t middle = weights[1], left = weights[2], right = weights[3];
      const uint8_t* __restrict above = row(group, y - 1);
      for (size_t x = 0; x < width_; ++x) {
        const int sum = middle * above[x] + left * above[static_cast<ptrdiff_t>(x) - 1] + right * above[x + 1];
        sums[x] = static_cast<uint16_t>(sums[x] + sum);
      }
    }
    return sums;
  }

  size_t height() const {
    return height_;
  }

  size_t width() const {
    return width_;
  }

  uint32_t left_weight(size_t group) const {
    return contexts_.weights[group * (kOwnWeights + contexts_.parents)];
  }

  void fill(const int32_t* values) {
    for (size_t group = 0; group < contexts_.groups; ++group) {
      for (size_t y = 0; y < height_; ++y) {
        uint8_t* to = row(group, y);
        for (size_t x = 0; x < width_; ++x) {
          to[x] = magnitude(zigzag(*values++));
        }
      }
    }
  }

 private:
  // What returned such a vector would depend on the processor that it is compiled for.
  inline __attribute__((always_inline)) void read(size_t group, size_t i, Sums& found) {
    Magnitudes magnitudes;
    std::memcpy(&magnitudes, row(group, 0) - stride_ + i, kLanes);
    found = __builtin_convertvector(magnitudes, Sums);
  }

  // Moves a window up to a group, and finds the sums of what is in it.
  inline __attribute__((always_inline)) void move_window(
      std::vector<uint16_t>& window, size_t group, size_t size, size_t i, Sums& found) {
    Sums sums, changed;
    std::memcpy(&sums, window.data() + i, sizeof sums);
    if (group > 0) {
      read(group - 1, i, changed);
      sums += changed;
    }
    if (group > size) {
      read(group - 1 - size, i, changed);
      sums -= changed;
    }
    std::memcpy(window.data() + i, &sums, sizeof sums);
    found = sums < kMostInWindow ? sums : Sums{} + kMostInWindow;
  }

  const Contexts contexts_;
  const size_t height_, width_, stride_, size_;
  std::vector<uint8_t> magnitudes_;
  std::vector<uint16_t> sums_, short_, long_;
};

inline uint8_t level(uint32_t sum) {
  return kLevelOf[std::min(sum, kMostSum)];
}

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

// --- encoding: from the last integer to the first, since decoding takes them from the state in the reverse order ---

class Encoder {
 public:
  // The memory holds at least the 11 bytes that a word and the state take.
  Encoder(uint8_t* begin, uint8_t* end) : begin_(begin), next_(end), end_(end) {}

  void put(uint32_t start, uint32_t frequency) {
    make_room(uint64_t{frequency} << 48);
    state_ = ((state_ / frequency) << kTotalBits) + state_ % frequency + start;
  }

  // At most 16 bits.
  void put_bits(uint32_t value, uint32_t bits) {
    make_room(uint64_t{1} << (63 - bits));
    state_ = state_ << bits | value;
  }

  // Decoding reads as many zeros as there are bits above the least `least_bits`, a one, and then the bits.
  void put_escaped(uint32_t beyond, uint32_t least_bits) {
    const uint64_t code = beyond + (uint64_t{1} << least_bits);
    const uint32_t bits = static_cast<uint32_t>(std::bit_width(code)) - 1;
    put_bits(code & 0xFFFF & ((uint64_t{1} << bits) - 1), std::min(bits, 16U));
    if (bits > 16) {
      put_bits(static_cast<uint32_t>((code & ((uint64_t{1} << bits) - 1)) >> 16), bits - 16);
    }
    put_bits(1, 1);
    for (uint32_t zeros = bits - least_bits; zeros > 0; --zeros) {
      put_bits(0, 1);
    }
  }

  // Writes the state in 4 to 7 bytes, so that the number of words follows from that of all bytes. Returns how many
  // these are, or -1 where they do not fit.
  int64_t finish() {
    make_room(uint64_t{1} << 56);
    const size_t bytes = std::max(size_t{4}, (static_cast<size_t>(std::bit_width(state_)) + 7) / 8);
    if (!fits_ || static_cast<size_t>(next_ - begin_) < bytes) {
      return -1;
    }
    next_ -= bytes;
    std::memcpy(next_, &state_, bytes);
    return end_ - next_;
  }

 private:
  void make_room(uint64_t limit) {
    if (state_ < limit) {
      return;
    }
    if (next_ - begin_ < 4) {
      // The rest is encoded, too, so that there is one way out; it overwrites what nobody will read.
      fits_ = false;
      next_ = end_;
    }
    next_ -= 4;
    std::memcpy(next_, &state_, 4);
    state_ >>= 32;
  }

  uint64_t state_ = kEmptyState;
  bool fits_ = true;
  uint8_t *begin_, *next_, *end_;
};

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

// --- decoding ---

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

class Decoder {
 public:
  // Any number of bytes; with fewer than four there are no words.
  Decoder(const uint8_t* data, size_t size) : next_(data), end_(data + size) {
    const size_t bytes = size < 4 ? size : 4 + size % 4;
    std::memcpy(&state_, data, bytes);
    next_ += bytes;
    refill();
  }

  uint32_t slot() const {
    return static_cast<uint32_t>(state_) & (kTotal - 1);
  }

  void take(uint32_t slot, uint32_t start, uint32_t frequency) {
    state_ = frequency * (state_ >> kTotalBits) + slot - start;
    refill();
  }

  // At most 16 bits.
  uint32_t take_bits(uint32_t bits) {
    const uint32_t value = static_cast<uint32_t>(state_) & ((1U << bits) - 1);
    state_ >>= bits;
    refill();
    return value;
  }

  uint32_t take_escaped(uint32_t least_bits) {
    uint32_t bits = least_bits;
    while (take_bits(1) == 0) {
      if (++bits > kLongestPrefix) {
        damaged_ = true;
        return 0;
      }
    }
    uint64_t code = bits > 16 ? take_bits(bits - 16) : 0;
    code = code << std::min(bits, 16U) | take_bits(std::min(bits, 16U));
    return static_cast<uint32_t>(code + (uint64_t{1} << bits) - (uint64_t{1} << least_bits));
  }

  bool ended_well() const {
    return !damaged_ && next_ == end_ && state_ == kEmptyState;
  }

 private:
  void refill() {
    if (state_ < kLeastState && next_ != end_) {
      uint32_t word;
      std::memcpy(&word, next_, 4);
      state_ = state_ << 32 | word;
      next_ += 4;
    }
  }

  uint64_t state_ = 0;
  bool damaged_ = false;
  const uint8_t *next_, *end_;
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
