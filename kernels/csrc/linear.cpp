// Blocking, packing and finishing of matrix products. linear.h says what is computed; linear_tile.h has the loops.
//
// Work is cut into items of a row block times one panel (32 columns); each thread walks along neighbouring panels, so
// that weights stream through it once per row block. Within an item the loop order is segment -> row tile: a panel's
// segment (32 KiB) stays in the nearest caches for all tiles. Inputs are copied once per row block and thread into
// segments with a fixed row distance, which spares the tiles cache conflicts at widths that are powers of two.
#include "linear_tile.h"
#include "thread_pool.h"
#include "weight_bits.h"

namespace {

using zk::Finish;
using zk::Product;
using zk::Right;

constexpr int64_t MAX_BLOCK_ROWS = 512;
constexpr int64_t MAX_PACKED_FLOATS = int64_t{2} << 20;  // a thread's copy of inputs: 8 MiB at most
constexpr int64_t FEW_ROWS = 4;
constexpr int64_t LONG_GROUP = 4;                        // panels that share a copy of inputs too long to keep whole

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Plan {
  Product p;
  int64_t panels, blocks, groups;  // items: row block major, then group of panels
  int64_t group;                   // panels per item
  int64_t chunk;                   // inner indices that a packed copy of inputs holds
  int64_t left_floats, sums_floats;
  int64_t first_item;              // among the items of all products of a call
  uint64_t key;                    // key + block marks a packed copy in a thread's scratch memory
};

inline int64_t block_start(const Plan& plan, int64_t block) { return plan.p.m * block / plan.blocks; }

Plan make_plan(const Product& p) {
  Plan plan{};
  plan.p = p;
  plan.panels = ceil_div(p.n, PANEL);
  plan.blocks = ceil_div(p.m, MAX_BLOCK_ROWS);
  // Enough items to go round; a block below one tile would only read the weights more often.
  const int64_t wanted = 4 * zk::num_threads();
  while (plan.blocks * plan.panels < wanted && p.m >= plan.blocks * 2 * MAX_TILE_ROWS) plan.blocks *= 2;
  const int64_t rows = ceil_div(p.m, plan.blocks);
  const int64_t segments = ceil_div(p.k, LINEAR_K_SEGMENT);
  const int64_t chunk_segments = smaller(segments, MAX_PACKED_FLOATS / (rows * ROW_STRIDE));
  plan.chunk = chunk_segments * LINEAR_K_SEGMENT;
  plan.group = chunk_segments < segments ? LONG_GROUP : 1;
  plan.groups = ceil_div(plan.panels, plan.group);
  plan.left_floats = chunk_segments * rows * ROW_STRIDE;
  plan.sums_floats = plan.group * rows * PANEL;
  plan.key = zk::unique_keys(plan.blocks);
  return plan;
}

// packed[segment][row][ROW_STRIDE] from rows [first_row, + rows) and inner indices [k0, + length) of the left operand.
void pack_left(const Product& p, int64_t first_row, int64_t rows, int64_t k0, int64_t length, float* packed) {
  for (int64_t s = 0; s < length; s += LINEAR_K_SEGMENT, packed += rows * ROW_STRIDE) {
    const int64_t part = smaller(LINEAR_K_SEGMENT, length - s);
    if (p.left_transposed) {
      transpose(p.left + (k0 + s) * p.m + first_row, p.m, part, rows, packed, ROW_STRIDE);
      continue;
    }
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(packed + r * ROW_STRIDE, p.left + (first_row + r) * p.k + k0 + s,
                  sizeof(float) * static_cast<size_t>(part));
  }
}

// panel[k][0, width) from rows [0, columns) of weights with the given distance; the missing columns become 0.
void pack_panel(const float* weights, int64_t stride, int64_t columns, int64_t length, float* panel, int64_t width) {
  transpose(weights, stride, columns, length, panel, PANEL);
  if (columns < width)
    for (int64_t k = 0; k < length; ++k)
      for (int64_t c = columns; c < width; ++c) panel[k * PANEL + c] = 0.0f;
}

// One panel's weights for inner indices [k, k + length) as [length][PANEL]: in place, or packed into `buffer`.
const float* right_segment(const Product& p, int64_t panel, int64_t k, int64_t length, float* buffer) {
  if (p.right_layout == Right::panels) return p.right + (panel * p.k + k) * PANEL;
  const int64_t first = panel * PANEL, columns = smaller(PANEL, p.n - first);
  if (p.right_layout == Right::rows) {
    pack_panel(p.right + first * p.k + k, p.k, columns, length, buffer, PANEL);
    return buffer;
  }
  const float* from = p.right + k * p.n + first;
  for (int64_t i = 0; i < length; ++i, from += p.n) {
    float* to = buffer + i * PANEL;
    if (columns == PANEL) {
      vstore(to, vload(from));
      vstore(to + LANES, vload(from + LANES));
    } else {
      for (int64_t c = 0; c < PANEL; ++c) to[c] = c < columns ? from[c] : 0.0f;
    }
  }
  return buffer;
}

// What the last row tile of a segment fetches: the weights that come next, be it this panel's next segment or the
// next panel's first, for the tiles before leave the memory free. A single tile over packed weights is bound by memory
// and fetches what it can use soon; with few rows the processor's own prefetching does most of it.
Ahead fetch_ahead(const Product& p, int64_t rows, const float* w, int64_t panel, int64_t k, int64_t chunk_start,
                  int64_t chunk_end) {
  if (p.right_layout == Right::panels) {
    const int64_t lead = rows > MAX_TILE_ROWS ? LINEAR_K_SEGMENT : rows > FEW_ROWS ? 64 : 8;
    return {w + lead * PANEL, PANEL, 1};
  }
  k += LINEAR_K_SEGMENT;
  if (k >= chunk_end) k = chunk_start, ++panel;
  if (panel * PANEL >= p.n) return {nullptr, 0, 0};
  if (p.right_layout == Right::rows) return {p.right + panel * PANEL * p.k + k, p.k, 4};
  return {p.right + k * p.n + panel * PANEL, p.n, 1};
}

// sums[rows, PANEL] over inner indices [k0, k0 + length), going on from what the sums hold unless k0 is 0.
void multiply_panel(const Product& p, const float* left, int64_t rows, int64_t panel, int64_t k0, int64_t length,
                    float* sums, float* buffer) {
  const int64_t tiles = ceil_div(rows, MAX_TILE_ROWS);
  for (int64_t k = k0; k < k0 + length; k += LINEAR_K_SEGMENT, left += rows * ROW_STRIDE) {
    const int64_t part = smaller(LINEAR_K_SEGMENT, k0 + length - k);
    const float* w = right_segment(p, panel, k, part, buffer);
    const Ahead ahead = fetch_ahead(p, rows, w, panel, k, k0, k0 + length);
    for (int64_t t = 0, row = 0; t < tiles; ++t) {
      const int64_t tile_rows = rows * (t + 1) / tiles - row;
      TILES[tile_rows](left + row * ROW_STRIDE, w, static_cast<int>(part), sums + row * PANEL, k == 0,
                       t == tiles - 1 ? ahead : Ahead{nullptr, 0, 0});
      row += tile_rows;
    }
  }
}

// out columns [first, first + count) of one row; count <= LANES.
inline void store_columns(float* out, vf value, int64_t count, bool add) {
  if (count >= LANES) {
    vstore(out, add ? vload(out) + value : value);
  } else if (count > 0) {
    const int part = static_cast<int>(count);
    vstore_part(out, add ? vload_part(out, part, 0.0f) + value : value, part);
  }
}

void finish_panel(const Product& p, const float* sums, int64_t first_row, int64_t rows, int64_t panel) {
  const bool gates = p.finish == Finish::swiglu;
  const int64_t first = panel * (gates ? LANES : PANEL), columns = p.width - first;
  vf bias[2] = {vset(0.0f), vset(0.0f)};
  if (p.bias)
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t count = smaller(LANES, columns - half * LANES);
      if (count > 0) bias[half] = vload_part(p.bias + first + half * LANES, static_cast<int>(count), 0.0f);
    }
  for (int64_t r = 0; r < rows; ++r, sums += PANEL) {
    float* out = p.out + (first_row + r) * p.width + first;
    vf low = vload(sums), high = vload(sums + LANES);
    if (gates) {
      store_columns(out, low / (vset(1.0f) + vexp(-low)) * high, columns, false);
      continue;
    }
    if (p.bias) low = low + bias[0], high = high + bias[1];
    store_columns(out, low, columns, p.finish == Finish::add);
    store_columns(out + LANES, high, columns - LANES, p.finish == Finish::add);
  }
}

void run_item(const Plan& plan, int64_t item) {
  const Product& p = plan.p;
  const int64_t block = item / plan.groups, panel0 = item % plan.groups * plan.group;
  const int64_t panels = smaller(plan.group, plan.panels - panel0);
  const int64_t first_row = block_start(plan, block), rows = block_start(plan, block + 1) - first_row;
  zk::Scratch& memory = zk::scratch(plan.left_floats + plan.sums_floats + LINEAR_K_SEGMENT * PANEL);
  float* left = memory.data;
  float* sums = left + plan.left_floats;
  float* buffer = sums + plan.sums_floats;
  const uint64_t key = plan.key + static_cast<uint64_t>(block);
  for (int64_t k0 = 0; k0 < p.k; k0 += plan.chunk) {
    const int64_t length = smaller(plan.chunk, p.k - k0);
    if (memory.key != key || length < p.k) {
      pack_left(p, first_row, rows, k0, length, left);
      memory.key = key;
    }
    for (int64_t i = 0; i < panels; ++i)
      multiply_panel(p, left, rows, panel0 + i, k0, length, sums + i * rows * PANEL, buffer);
  }
  for (int64_t i = 0; i < panels; ++i) finish_panel(p, sums + i * rows * PANEL, first_row, rows, panel0 + i);
}

void multiply(const Product& p) {
  if (p.m == 0) return;
  const Plan plan = make_plan(p);
  zk::parallel_for(plan.blocks * plan.groups, [&](int64_t item) { run_item(plan, item); });
}

// Items of all products in one run of the pool: few rows per group would not be worth one each.
void multiply_groups(const Product* products, int64_t count) {
  Plan* plans = new Plan[static_cast<size_t>(count)];  // not std::vector: its code would be shared with other builds
  int64_t items = 0;
  for (int64_t g = 0; g < count; ++g) {
    plans[g] = make_plan(products[g]);
    plans[g].first_item = items;
    items += plans[g].blocks * plans[g].groups;
  }
  zk::parallel_for(items, [&](int64_t item) {
    int64_t low = 0, high = count;  // the last plan that starts at or before the item
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (plans[middle].first_item <= item ? low : high) = middle;
    }
    run_item(plans[low], item - plans[low].first_item);
  });
  delete[] plans;
}

inline vn load_weights(const float* p) { return nload(p); }
inline vn load_weights(const uint16_t* p) {
  vn values;
  widen_bits(p, NATIVE, reinterpret_cast<float*>(&values));
  return values;
}

// LANES rows x NATIVE inner indices of weights, turned, to NATIVE half lines of a panel; joins their finite_overflow.
template <class Source>
inline void pack_square(const Source* weights, int64_t k, float* half, bool streams, nu& joined) {
  constexpr int PARTS = LANES / NATIVE;
  vn rows[PARTS][NATIVE];
#pragma GCC unroll 4
  for (int part = 0; part < PARTS; ++part) {
#pragma GCC unroll 16
    for (int r = 0; r < NATIVE; ++r) {
      rows[part][r] = load_weights(weights + (part * NATIVE + r) * k);
      joined |= ((nu)rows[part][r] & 0x7F800000u) + 0x00800000u;
    }
    turn_square(rows[part]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < NATIVE; ++i)
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; ++part) {
      float* to = half + i * PANEL + part * NATIVE;
      streams ? nstream(to, rows[part][i]) : nstore(to, rows[part][i]);
    }
}

// 16 columns of a panel from up to 16 rows of weights; the joined_overflow of them. Each line of a row is read once and
// leaves turned, by whole lines; it was fetched some squares before. `end_stream` is the caller's.
template <class Source>
uint32_t pack_half(const Source* weights, int64_t columns, int64_t k, float* half) {
  constexpr int64_t AHEAD = 512 / static_cast<int64_t>(sizeof(Source));
  const bool streams = may_stream(half);
  nu joined = {};
  int64_t first = 0;
  for (; columns == LANES && first + NATIVE <= k; first += NATIVE) {
    const int64_t next = first + AHEAD;
    const Source* ahead = next < k ? weights + next : weights + LANES * k + (next - k);  // the next 16 rows
    for (int64_t r = 0; r < LANES; ++r) __builtin_prefetch(ahead + r * k, 0, 3);
    pack_square(weights + first, k, half + first * PANEL, streams, joined);
  }
  uint32_t all = 0;
  for (int lane = 0; lane < NATIVE; ++lane) all |= joined[lane];
  for (; first < k; ++first) {
    float line[LANES] = {};
    for (int64_t r = 0; r < columns; ++r) widen_weight(weights[r * k + first], line + r);
    all |= joined_overflow(line, columns);
    std::memcpy(half + first * PANEL, line, sizeof line);
  }
  return all;
}

// Panels one by one on the calling thread, or on the pool.
template <class Body>
bool pack_panels(int64_t panels, bool pool, Body body) {
  uint32_t joined = 0;
  if (pool && zk::num_threads() > 1) {
    zk::parallel_for(panels, [&](int64_t i) {
      __atomic_fetch_or(&joined, body(i), __ATOMIC_RELAXED);
      end_stream();
    });
  } else {
    for (int64_t i = 0; i < panels; ++i) joined |= body(i);
    end_stream();
  }
  return is_finite(joined);
}

template <class Source>
bool pack(const Source* weights, int64_t n, int64_t k, float* panels, bool pool) {
  return pack_panels(ceil_div(n, PANEL), pool, [=](int64_t i) {
    const int64_t first = i * PANEL, columns = smaller(PANEL, n - first), low = smaller(LANES, columns);
    float* panel = panels + first * k;
    return pack_half(weights + first * k, low, k, panel) |
           pack_half(weights + (first + low) * k, columns - low, k, panel + LANES);
  });
}

template <class Source>
bool pack_gate_up(const Source* gate, const Source* up, int64_t f, int64_t k, float* panels, bool pool) {
  return pack_panels(ceil_div(f, LANES), pool, [=](int64_t i) {
    const int64_t first = i * LANES, columns = smaller(LANES, f - first);
    float* panel = panels + i * k * PANEL;
    return pack_half(gate + first * k, columns, k, panel) | pack_half(up + first * k, columns, k, panel + LANES);
  });
}

float fma_burst(int64_t rounds) {
  constexpr int CHAINS = static_cast<int>(zk::FMA_PER_ROUND) / NATIVE;
  constexpr int LIVE = CHAINS < 12 ? CHAINS : 12;
  vn acc[LIVE];
  const vn a = nset(0.999999f), b = nset(1e-6f);
  for (int i = 0; i < LIVE; ++i) acc[i] = nset(static_cast<float>(i));
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 8
    for (int repeat = 0; repeat < CHAINS / LIVE; ++repeat)
#pragma GCC unroll 16
      for (int i = 0; i < LIVE; ++i) acc[i] = nfma(acc[i], a, b);
  float total = 0.0f;
  for (int i = 0; i < LIVE; ++i) total += acc[i][0] + acc[i][NATIVE - 1];
  return total;
}

float read_floats(const float* data, int64_t floats) {
  vf acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= floats; i += 4 * LANES) {
    for (int64_t line = 0; line < 4; ++line) __builtin_prefetch(data + i + 8 * PANEL + line * LANES, 0, 2);
    for (int64_t line = 0; line < 4; ++line) acc[line] += vload(data + i + line * LANES);
  }
  for (; i < floats; ++i) acc[0][0] += data[i];
  return reduce_sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

}  // namespace

namespace zk {
const LinearKernels ZK_CAT(linear_, ZK_ISA) = {multiply,     multiply_groups, pack,      pack,
                                                pack_gate_up, pack_gate_up,    fma_burst, read_floats};
}
