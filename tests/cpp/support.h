// What the test drivers of all kernels share: exactly sized buffers that start as NaN, random numbers, teams
// of threads, and checks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/table.h"

namespace seqkernels::test {

using Values = std::vector<double>;

// Buffers
// -----------------------------------------------------------------------------------------------------

constexpr const char* kDTypeNames[] = {"f32", "f64", "bf16", "f16"};
constexpr double kEps[] = {0x1p-23, 0x1p-52, 0x1p-7, 0x1p-10};
constexpr int64_t kBytes[] = {4, 8, 2, 2};

// bf16 and f16: mantissa bits and exponent bias.
struct Half {
  int mantissa, bias;
};
inline Half half_of(DType type) { return type == DType::bf16 ? Half{7, 127} : Half{10, 15}; }

inline double decode(uint16_t bits, Half h) {
  const int exponent = (bits & 0x7fff) >> h.mantissa, fraction = bits & ((1 << h.mantissa) - 1);
  if (exponent == 2 * h.bias + 1) return fraction ? NAN : bits >> 15 ? -INFINITY : INFINITY;
  const double value =
      std::ldexp(fraction + (exponent ? 1 << h.mantissa : 0), std::max(exponent, 1) - h.bias - h.mantissa);
  return bits >> 15 ? -value : value;
}
// A mantissa that rounds up to the next power of two carries into the exponent, as it should.
inline uint16_t encode(double value, Half h) {
  if (!std::isfinite(value))
    return uint16_t(((2 * h.bias + 1) << h.mantissa) + std::isnan(value) +
                    (std::signbit(value) ? 0x8000 : 0));
  const int exponent = value == 0 ? 1 : std::max(std::ilogb(value) + h.bias, 1);
  const long fraction = std::lrint(std::ldexp(std::fabs(value), h.mantissa + h.bias - exponent));
  return uint16_t(((exponent - 1) << h.mantissa) + fraction + (std::signbit(value) ? 0x8000 : 0));
}

class Buffer {
 public:
  Buffer() = default;
  Buffer(DType type, int64_t n) : type_(type), n_(n), data_(new unsigned char[size_t(bytes())]) {
    std::memset(data_.get(), 0xff, size_t(bytes()));  // NaN in every type
  }
  Buffer(DType type, const Values& values) : Buffer(type, int64_t(values.size())) {
    for (int64_t i = 0; i < n_; i++) set(i, values[size_t(i)]);
    original_.assign(data_.get(), data_.get() + bytes());
  }

  void* data() const { return data_.get(); }
  int64_t bytes() const { return n_ * kBytes[int(type_)]; }
  bool unchanged() const {
    return bytes() == 0 || std::memcmp(data_.get(), original_.data(), size_t(bytes())) == 0;
  }
  bool same_bits(const Buffer& other) const {
    return n_ == other.n_ && (n_ == 0 || std::memcmp(data(), other.data(), size_t(bytes())) == 0);
  }
  Values values() const {
    Values out;
    for (int64_t i = 0; i < n_; i++) out.push_back(get(i));
    return out;
  }

 private:
  double get(int64_t i) const {
    if (type_ == DType::f32) return static_cast<const float*>(data())[i];
    if (type_ == DType::f64) return static_cast<const double*>(data())[i];
    return decode(static_cast<const uint16_t*>(data())[i], half_of(type_));
  }
  void set(int64_t i, double value) {
    if (type_ == DType::f32)
      static_cast<float*>(data())[i] = float(value);
    else if (type_ == DType::f64)
      static_cast<double*>(data())[i] = value;
    else
      static_cast<uint16_t*>(data())[i] = encode(value, half_of(type_));
  }

  DType type_ = DType::f32;
  int64_t n_ = 0;
  std::unique_ptr<unsigned char[]> data_;
  std::vector<unsigned char> original_;
};

using Buffers = std::map<std::string, Buffer>;
using Truth = std::map<std::string, Values>;

inline void* pointer(const Buffers& buffers, const std::string& name) {
  const auto found = buffers.find(name);
  return found == buffers.end() ? nullptr : found->second.data();
}

// Random numbers
// -----------------------------------------------------------------------------------------------------

class Random {
 public:
  int64_t below(int64_t n) { return int64_t(bits_() % uint64_t(n)); }
  bool one_in(int64_t n) { return below(n) == 0; }
  template <class T>
  T of(const std::vector<T>& choices) {
    return choices[size_t(below(int64_t(choices.size())))];
  }
  Values values(int64_t n, double scale) {  // uniform in [-scale, scale)
    Values v;
    for (int64_t i = 0; i < n; i++) v.push_back(scale * (double(bits_() >> 11) * 0x1p-52 - 1));
    return v;
  }

 private:
  std::mt19937_64 bits_;
};

// Teams of threads
// -----------------------------------------------------------------------------------------------------

using Body = void (*)(void* arg, int64_t begin, int64_t end);

inline std::map<std::string, int> seen;  // how often, by property

inline Parallel threads(int n) {
  return {n,
          [](void*, int64_t count, Body body, void* arg) {
            seen["team of " + std::to_string(count)]++;
            std::vector<std::thread> others;
            for (int64_t i = 1; i < count; i++) others.emplace_back(body, arg, i, i + 1);
            body(arg, 0, 1);
            for (auto& thread : others) thread.join();
          },
          nullptr};
}
// A busy pool: two threads share the ids, unevenly.
inline Parallel busy(int n) {
  return {n,
          [](void*, int64_t count, Body body, void* arg) {
            seen["two threads for " + std::to_string(count)]++;
            std::thread other(body, arg, count - 1, count);
            body(arg, 0, count - 1);
            other.join();
          },
          nullptr};
}
// What a pool does within its own tasks: one callback gets the whole range.
inline Parallel nested(int n) {
  return {n,
          [](void*, int64_t count, Body body, void* arg) {
            seen["one thread for " + std::to_string(count)]++;
            body(arg, 0, count);
          },
          nullptr};
}

// Checks
// ------------------------------------------------------------------------------------------------------

inline int failures = 0, calls = 0;
inline std::map<std::string, double> worst;  // errors in eps, by dtype and pass

template <class Case>
void fail(const std::string& what, const Case& c) {
  if (++failures <= 20)
    std::printf("FAILED %s: %s: %s\n", isa_name(active_isa()), c.text().c_str(), what.c_str());
}

inline double largest(const Values& values) {
  double most = 0;
  for (const double v : values)
    if (std::isfinite(v)) most = std::max(most, std::fabs(v));
  return most;
}

// Errors in eps of the tensor's largest value, or of a tenth of all tensors' largest: a sum of many terms may
// cancel. Infinity has to be there where it should, and NaN where nothing should be written.
template <class Case>
void expect_close(const Buffers& got, const Truth& truth, const char* pass, const Case& c) {
  double of_all = 0;
  for (const auto& [name, exact] : truth) of_all = std::max(of_all, largest(exact));
  for (const auto& [name, exact] : truth) {
    const Values values = got.at(name).values();
    const DType type = c.rounding(name);
    const double bound = kBytes[int(type)] > 2 ? Case::kBound : std::strcmp(pass, "backward") ? 2 : 6;
    double error = values.size() == exact.size() ? 0 : INFINITY;
    for (size_t i = 0; i < exact.size() && std::isfinite(error); i++)
      if (values[i] != exact[i] && !(std::isnan(values[i]) && std::isnan(exact[i])))
        error =
            std::isfinite(values[i] - exact[i]) ? std::max(error, std::fabs(values[i] - exact[i])) : INFINITY;
    const double scale = std::max(largest(exact), of_all / 10);
    const double in_eps = error == 0 ? 0 : error / (kEps[int(type)] * scale);
    double& most = worst[kDTypeNames[int(type)] + std::string(" ") + pass];
    most = std::max(most, in_eps);
    if (!(in_eps <= bound)) fail(name + ": error of " + std::to_string(in_eps) + " eps", c);
  }
}
template <class Case>
void expect_same_bits(const Buffers& got, const Buffers& expected, const char* why, const Case& c) {
  for (const auto& [name, buffer] : got)
    if (!buffer.same_bits(expected.at(name))) fail(name + ": other bits, " + why, c);
}
template <class Case>
void expect_unchanged(const Buffers& inputs, const Case& c) {
  for (const auto& [name, buffer] : inputs)
    if (!buffer.unchanged()) fail(name + ": an input was written to", c);
}

// A mask of attention: bytes, not zero where a query sees a key, or numbers to add. Whole blocks are hidden,
// and single keys.
struct RandomMask {
  std::vector<uint8_t> shown;
  Values added;
};
inline RandomMask random_mask(MaskKind kind, int64_t size, Random& random) {
  const bool boolean = kind == MaskKind::boolean;
  RandomMask mask{std::vector<uint8_t>(boolean ? size_t(size) : 0),
                  random.values(kind > MaskKind::boolean ? size : 0, 2)};
  bool block = true;
  for (size_t n = 0; n < std::max(mask.shown.size(), mask.added.size()); n++) {
    if (n % 50 == 0) block = random.one_in(3);
    const bool hidden = block || random.one_in(4);
    if (boolean)
      mask.shown[n] = hidden ? 0 : random.of<uint8_t>({1, 1, 2, 128});
    else if (hidden)
      mask.added[n] = -INFINITY;
  }
  return mask;
}

// In files of their own: all cases on these instruction sets.
void check_additive_attention(const std::vector<const char*>& isas);
void check_attention(const std::vector<const char*>& isas);
void check_linear(const std::vector<const char*>& isas);
void check_shares();

}  // namespace seqkernels::test
