#include "attention.h"

#include "attention_tiles.h"
#include "thread_pool.h"

namespace {

using zk::KV_SPLIT;
using zk::MAX_HEAD_DIM;
using zk::TILE_ROWS;

// Query rows of one KV head that walk over the keys together. Lives on the stack; large, but only what a model's head
// size asks for is touched.
struct Tile {
  int count;
  const float* q[TILE_ROWS];
  int64_t limit[TILE_ROWS];  // keys that a row sees; ascending
  alignas(64) float max[TILE_ROWS] = {};
  alignas(64) float sum[TILE_ROWS] = {};
  alignas(64) float acc[TILE_ROWS * MAX_HEAD_DIM];  // [row][padded D]
};

// The split at hand: where its keys and values lie, and each row's result on it.
struct Split {
  int64_t start;
  Columns keys;
  const float* values[KV_SPLIT / 8];  // eight keys each
  int64_t value_stride;
  int visible[TILE_ROWS];  // keys of this split that a row sees
  alignas(64) float weight[TILE_ROWS][KV_SPLIT];
  alignas(64) float max[TILE_ROWS] = {};
  alignas(64) float sum[TILE_ROWS] = {};
  alignas(64) float keep[TILE_ROWS] = {};  // factor on what earlier splits gave
  alignas(64) float take[TILE_ROWS] = {};  // factor on what this one gives
  alignas(64) float key_copy[MAX_HEAD_DIM * KV_SPLIT];
  alignas(64) float value_copy[KV_SPLIT * MAX_HEAD_DIM];
};

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// -- reading the cache ------------------------------------------------------------------------------------------------

// The paged keys and values of one sequence and KV head. Blocks hold a multiple of 8 keys: eight are never parted.
struct Pages {
  const zk::Attention& args;
  const int32_t* table;
  int64_t sequence, kv_head, keys;

  int64_t base(int64_t position) const {
    const int64_t block = table[position / args.block_size];
    return (block * args.kv_heads + kv_head) * args.head_dim * args.block_size;
  }
  const float* key(int64_t position) const { return args.keys + base(position) + position % args.block_size; }
  const float* value(int64_t position) const {
    return args.values + base(position) + (position % args.block_size) * args.head_dim;
  }
};

// Points at sixteen keys at a time where they are neighbours in the cache, else copies them together. Keys past `count`
// may be anything: a lane of a score is made of its own key alone and is masked later.
void find_keys(const Pages& pages, int count, Split& split) {
  const int64_t size = pages.args.block_size, dim = pages.args.head_dim;
  split.keys.groups = (count + LANES - 1) / LANES;
  if (size % LANES == 0) {
    split.keys.stride = size;
    for (int g = 0; g < split.keys.groups; ++g) split.keys.group[g] = pages.key(split.start + g * LANES);
    return;
  }
  split.keys.stride = KV_SPLIT;
  for (int g = 0; g < split.keys.groups; ++g) split.keys.group[g] = split.key_copy + g * LANES;
  for (int j = 0; j < count; j += 8) {
    const float* key = pages.key(split.start + j);
    for (int64_t d = 0; d < dim; ++d) std::memcpy(split.key_copy + d * KV_SPLIT + j, key + d * size, 8 * sizeof(float));
  }
}

// Rows of values; copied to whole vectors where the head size is not a multiple of 16.
void find_values(const Pages& pages, int count, Split& split) {
  const int64_t dim = pages.args.head_dim;
  const bool whole = dim % LANES == 0;
  split.value_stride = padded(dim);
  for (int j = 0; j < count; j += 8)
    split.values[j / 8] = whole ? pages.value(split.start + j) : split.value_copy + j * split.value_stride;
  for (int j = 0; !whole && j < count; ++j)
    std::memcpy(split.value_copy + j * split.value_stride, pages.value(split.start + j), static_cast<size_t>(dim) * 4);
}

// The keys of a split that comes next; none in the odd layouts that would need more care.
Ahead keys_ahead(const Pages& pages, int64_t start, int64_t end) {
  const int64_t size = pages.args.block_size, dim = pages.args.head_dim;
  const bool whole = size % LANES == 0;
  Ahead ahead;
  if (!whole && size != 8) return ahead;
  const int at_once = whole ? LANES : 8;
  ahead.step = whole ? size : LANES;
  ahead.lines = static_cast<int>(whole ? dim : dim / 2);
  for (int64_t j = start; j < min64(start + KV_SPLIT, end); j += at_once) ahead.run[ahead.runs++] = pages.key(j);
  return ahead;
}

// The values of a split that comes next.
Ahead values_ahead(const Pages& pages, int64_t start, int64_t end) {
  Ahead ahead;
  ahead.lines = static_cast<int>(pages.args.head_dim / 2);
  ahead.step = LANES;
  for (int64_t j = start; j < min64(start + KV_SPLIT, end); j += 8) ahead.run[ahead.runs++] = pages.value(j);
  return ahead;
}

// -- softmax of a split -----------------------------------------------------------------------------------------------

// Scores of a row -> weights e^(s - max), with their maximum and sum. Lane = key mod 16.
inline void softmax_row(float* scores, int visible, float scale, float* max, float* sum) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vf lowest = vset(-__builtin_inff());
  vf top = lowest, total = vset(0.0f);
  for (int j = 0; j < visible; j += LANES) {
    vf s = vload(scores + j) * vset(scale);
    s = lane < visible - j ? s : lowest;
    vstore(scores + j, s);
    top = vmax(top, s);
  }
  *max = reduce_max(top);
  for (int j = 0; j < visible; j += LANES) {
    const vf e = vexp(vload(scores + j) - vset(*max));
    vstore(scores + j, e);
    total = total + e;
  }
  *sum = reduce_sum(total);
}

// Running maximum and sum of rows from `first` on, and the factors for their values; sixteen rows at a time.
void merge_sums(Tile& tile, int first, Split& split) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int r = first / LANES * LANES; r < tile.count; r += LANES) {
    const vf old_max = vload(tile.max + r), old_sum = vload(tile.sum + r), max = vload(split.max + r);
    const vf top = vmax(old_max, max), keep = vexp(old_max - top), take = vexp(max - top);
    const vf sum = vfma(vload(split.sum + r), take, old_sum * keep);
    vstore(split.keep + r, keep);
    vstore(split.take + r, take);
    vstore(tile.max + r, lane + r < first ? old_max : top);
    vstore(tile.sum + r, lane + r < first ? old_sum : sum);
  }
}

void softmax_split(Tile& tile, int first, float scale, Split& split) {
  for (int r = first; r < tile.count; ++r)
    softmax_row(split.weight[r], split.visible[r], scale, split.max + r, split.sum + r);
  if (split.start > 0) return merge_sums(tile, first, split);
  std::memcpy(tile.max, split.max, sizeof tile.max);
  std::memcpy(tile.sum, split.sum, sizeof tile.sum);
}

// -- weighted values --------------------------------------------------------------------------------------------------

struct ValueKernel {
  // acc[r] = (first split ? 0 : acc[r] * keep[r]) + take[r] * sum over visible j of weight[r][j] * values[j]
  template <int R, int G>
  static void run(const Split& split, int row, int64_t column, float* acc, int64_t stride, Ahead* shared_ahead) {
    Ahead ahead = *shared_ahead;
    Block<R, G> block;
    block.clear();
    const int common = split.visible[row];  // limits ascend: what the first row sees, all see
    const float* weight = split.weight[row];
    for (int j = 0; j < common; ++j) {
      ahead.fetch();
      const float* value = split.values[j / 8] + (j % 8) * split.value_stride + column;
      vn v[G][PARTS];
      load(value, v);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) block.add_row(r, weight[r * KV_SPLIT + j], v);
    }
#pragma GCC unroll 8
    for (int r = 1; r < R; ++r)
      for (int j = common; j < split.visible[row + r]; ++j) {
        vn v[G][PARTS];
        load(split.values[j / 8] + (j % 8) * split.value_stride + column, v);
        block.add_row(r, weight[r * KV_SPLIT + j], v);
      }
    *shared_ahead = ahead;
    store(block, split, row, acc, stride);
  }

  template <int G>
  static inline void load(const float* p, vn (&v)[G][PARTS]) {
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
      for (int i = 0; i < PARTS; ++i) v[g][i] = nload(p + g * LANES + i * NATIVE);
  }

  template <int R, int G>
  static inline void store(const Block<R, G>& block, const Split& split, int row, float* acc, int64_t stride) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vn keep = nset(split.keep[row + r]), take = nset(split.take[row + r]);
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; ++p) {
          float* place = acc + r * stride + g * LANES + p * NATIVE;
          const vn sum = block.sum[r][g][p];
          nstore(place, split.start == 0 ? sum : nfma(sum, take, nload(place) * keep));
        }
    }
  }
};

void add_values(Tile& tile, int first, int64_t dim, const Split& split, Ahead* ahead) {
  const int64_t stride = padded(dim);
  const int groups = static_cast<int>(stride / LANES);
  for_row_blocks(tile.count - first, [&](int row, int size) {
    for (int g = 0; g < groups; g += BLOCK_GROUPS)
      dispatch_block<ValueKernel>(size, groups - g, split, first + row, static_cast<int64_t>(g * LANES),
                                  tile.acc + (first + row) * stride + g * LANES, stride, ahead);
  });
}

// -- tiles ------------------------------------------------------------------------------------------------------------

// Rows [begin, begin + count) of a sequence whose first token of this step stands at `position`.
void fill_tile(const zk::Attention& args, int64_t first_token, int64_t kv_head, int64_t begin, int64_t position,
               Tile& tile) {
  const int64_t group = args.heads / args.kv_heads;
  for (int r = 0; r < tile.count; ++r) {
    const int64_t token = (begin + r) / group, head = kv_head * group + (begin + r) % group;
    tile.q[r] = args.q + ((first_token + token) * args.heads + head) * args.head_dim;
    tile.limit[r] = position + token + 1;
  }
}

void write_tile(const zk::Attention& args, const Tile& tile) {
  const int64_t dim = args.head_dim, stride = padded(dim);
  for (int r = 0; r < tile.count; ++r) {
    float* out = args.out + (tile.q[r] - args.q);
    const float* acc = tile.acc + r * stride;
    for (int64_t d = 0; d < dim; ++d) out[d] = acc[d] / tile.sum[r];
  }
}

void attend(const zk::Attention& args, const Pages& pages, const Pages& next, Tile& tile) {
  Split split;
  const int64_t last = tile.limit[tile.count - 1];
  int first = 0;  // first row that sees the split
  for (split.start = 0; split.start < last; split.start += KV_SPLIT) {
    while (tile.limit[first] <= split.start) ++first;
    for (int r = first; r < tile.count; ++r)
      split.visible[r] = static_cast<int>(min64(tile.limit[r] - split.start, KV_SPLIT));
    const int count = split.visible[tile.count - 1];
    find_keys(pages, count, split);
    find_values(pages, count, split);
    const bool more = split.start + KV_SPLIT < last;
    Ahead ahead = more ? keys_ahead(pages, split.start + KV_SPLIT, last) : keys_ahead(next, 0, next.keys);
    score_rows(tile.q + first, tile.count - first, args.head_dim, split.keys, split.weight[first], &ahead);
    softmax_split(tile, first, args.scale, split);
    ahead = more ? values_ahead(pages, split.start + KV_SPLIT, last) : values_ahead(next, 0, next.keys);
    add_values(tile, first, args.head_dim, split, &ahead);
  }
}

// The sequence that tile `index` belongs to.
int64_t sequence_of(const zk::Attention& args, int64_t index) {
  int64_t low = 0, high = args.sequences;  // tile_starts[low] <= index < tile_starts[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (args.tile_starts[middle] <= index ? low : high) = middle;
  }
  return low;
}

Pages pages_of(const zk::Attention& args, int64_t task) {
  const int64_t sequence = sequence_of(args, task / args.kv_heads);
  return {args, args.block_tables + sequence * args.table_width, sequence, task % args.kv_heads,
          args.context_lens[sequence]};
}

// One tile of one KV head.
void run_task(const zk::Attention& args, int64_t task, int64_t tasks) {
  const Pages pages = pages_of(args, task);
  const int64_t group = args.heads / args.kv_heads, first_token = args.seq_starts[pages.sequence];
  const int64_t tokens = args.seq_starts[pages.sequence + 1] - first_token;
  const int64_t tile_of_sequence = task / args.kv_heads - args.tile_starts[pages.sequence];
  const int64_t begin = tile_of_sequence * zk::rows_per_tile(group);
  Tile tile;
  tile.count = static_cast<int>(min64(zk::rows_per_tile(group), tokens * group - begin));
  fill_tile(args, first_token, pages.kv_head, begin, pages.keys - tokens, tile);
  attend(args, pages, pages_of(args, min64(task + 1, tasks - 1)), tile);
  write_tile(args, tile);
}

void forward(const zk::Attention& args) {
  const int64_t tasks = args.tile_starts[args.sequences] * args.kv_heads;
  zk::parallel_for(tasks, [&](int64_t task) { run_task(args, task, tasks); });
}

}  // namespace

namespace zk {

const AttentionKernels ZK_CAT(attention_, ZK_ISA) = {forward};

}  // namespace zk
