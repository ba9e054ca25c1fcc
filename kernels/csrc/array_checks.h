// Argument types and checks of bindings. Arrays are taken as they are: a wrong dtype or layout is refused, never
// copied, because a copy of an `out` argument would swallow the result.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "bindings.h"

// Read-only arguments; a writable array fits too.
template <int N>
using In = nanobind::ndarray<const float, nanobind::ndim<N>, nanobind::c_contig, nanobind::device::cpu>;
template <int N>
using Indices = nanobind::ndarray<const int32_t, nanobind::ndim<N>, nanobind::c_contig, nanobind::device::cpu>;
// Results, written in place.
template <int N>
using Out = nanobind::ndarray<float, nanobind::ndim<N>, nanobind::c_contig, nanobind::device::cpu>;

namespace zk {

// The binding of an argument that is never copied to fit.
inline auto array(const char* name) { return nanobind::arg(name).noconvert(); }

inline void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

// Refusals of one value of an array. Checks inside loops call these only on failure: making the text costs more than
// the check.
[[noreturn]] inline void refuse(const std::string& entry, const std::string& bounds, int64_t got) {
  throw std::invalid_argument(entry + " must be in " + bounds + ", got " + std::to_string(got));
}
inline std::string entry(const char* name, int64_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }
inline std::string half_open(int64_t low, int64_t end) {
  return "[" + std::to_string(low) + ", " + std::to_string(end) + ")";
}
inline std::string closed(int64_t low, int64_t high) {
  return "[" + std::to_string(low) + ", " + std::to_string(high) + "]";
}

template <class Array>
int64_t extent(const Array& array, size_t axis) {
  return static_cast<int64_t>(array.shape(axis));
}

// -1 in `want` means any length.
template <class Array>
void expect_shape(const char* name, const Array& array, std::initializer_list<int64_t> want) {
  bool same = array.ndim() == want.size();
  size_t axis = 0;
  for (int64_t length : want) {
    same = same && (length < 0 || extent(array, axis) == length);
    ++axis;
  }
  if (same) return;
  std::string expected, got;
  for (int64_t length : want) expected += (expected.empty() ? "" : ", ") + (length < 0 ? "*" : std::to_string(length));
  for (size_t i = 0; i < array.ndim(); ++i) got += (i ? ", " : "") + std::to_string(array.shape(i));
  throw std::invalid_argument(std::string(name) + " must have shape (" + expected + "), got (" + got + ")");
}

// Every value in [low, end).
inline void expect_range(const char* name, const Indices<1>& values, int64_t low, int64_t end) {
  const int32_t* v = values.data();
  for (int64_t i = 0; i < extent(values, 0); ++i)
    if (v[i] < low || v[i] >= end) refuse(entry(name, i), half_open(low, end), v[i]);
}

// Offsets [S + 1] into `total` tokens: from 0, never falling, at most `total`.
inline void expect_starts(const char* name, const Indices<1>& starts, int64_t total) {
  const int32_t* v = starts.data();
  if (v[0] != 0) throw std::invalid_argument(entry(name, 0) + " must be 0, got " + std::to_string(v[0]));
  for (int64_t i = 1; i < extent(starts, 0); ++i)
    if (v[i] < v[i - 1] || v[i] > total) refuse(entry(name, i), closed(v[i - 1], total), v[i]);
}

}  // namespace zk
