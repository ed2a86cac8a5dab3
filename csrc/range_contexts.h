// What is likely for each integer that is coded, from the magnitudes of those that were coded before it.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace torchsurgeon {

constexpr size_t kLevels = 48;
// Weights that every group has before those of its parents: left, above, above to the left, above to the right, and the
// two windows.
constexpr size_t kOwnWeights = 6;
// Windows of groups that were coded last, and by how many bits what they say is shifted.
constexpr size_t kShort = 16, kLong = 128;
constexpr int kShortShift = 4, kLongShift = 6;
constexpr uint16_t kMostInWindow = 255;
constexpr size_t kMostParents = 8;
constexpr uint32_t kMostMagnitude = 31;
constexpr uint32_t kMostSum = 4095;
constexpr size_t kLanes = 16;

// The level of a sum. Sum + 4 has four levels to every doubling, so that sums from 0 to 3 have one each.
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

} // namespace torchsurgeon
