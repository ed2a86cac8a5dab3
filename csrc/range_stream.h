// A stream of an asymmetric numeral system (Duda, arXiv 1311.2540) in its range variant: a state of 64 bits that gives and
// takes words of 32.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace torchsurgeon {

// Words and the state lie in streams as they do in memory.
static_assert(std::endian::native == std::endian::little);

constexpr int kTotalBits = 15;
constexpr uint32_t kTotal = 1U << kTotalBits;
// While words are left, the state lies from here to below 2^32 times as much.
constexpr uint64_t kLeastState = uint64_t{1} << 31;
// The state before the first and after the last integer. With a smaller one, the first two integers would take more
// bits; with a larger one, the stream would begin with more bits that say nothing.
constexpr uint64_t kEmptyState = uint64_t{1} << 16;
// The longest Exp-Golomb code of a 32-bit integer has this many bits before its leading one.
constexpr uint32_t kLongestPrefix = 32;

// Encodes from the last symbol to the first, since decoding takes them from the state in the reverse order.
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

} // namespace torchsurgeon
