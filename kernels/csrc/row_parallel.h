// Rows handed to the pool in pieces worth the fork; few rows stay on the calling thread.
#pragma once

#include "thread_pool.h"

namespace {

constexpr int64_t FLOATS_PER_PIECE = 16384;  // a few microseconds of work, more than the price of a fork and join

// body(first, last) over all rows; `width` floats each. Rows must not depend on each other.
template <class Body>
inline void for_rows(int64_t rows, int64_t width, Body&& body) {
  const int64_t piece = width >= FLOATS_PER_PIECE ? 1 : FLOATS_PER_PIECE / (width > 0 ? width : 1);
  zk::parallel_for((rows + piece - 1) / piece, [&](int64_t i) {
    const int64_t first = i * piece;
    body(first, first + piece < rows ? first + piece : rows);
  });
}

}  // namespace
