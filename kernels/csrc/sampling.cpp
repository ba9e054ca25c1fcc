// Rows of logits to tokens and log-probabilities. Compiled once per instruction set; the bits are the same for each.
#include "sampling.h"

#include "philox.h"
#include "softmax.h"
#include "thread_pool.h"
#include "truncation.h"

namespace {

// Working space of one row, on memory of the calling thread.
struct Scratch {
  uint64_t *order, *spare, *chunk_mass, *mass;
  float *x, *e;
  int32_t* bucket;
  uint32_t* count;

  explicit Scratch(int64_t vocab) {
    const int64_t n = (vocab + PARTITION - 1) / PARTITION * PARTITION;
    zk::Scratch& memory = zk::scratch(2 * (3 * n + BUCKETS) + 3 * n + BUCKETS);
    memory.key = 0;
    order = reinterpret_cast<uint64_t*>(memory.data);
    spare = order + n;
    chunk_mass = spare + n;
    mass = chunk_mass + n;
    x = reinterpret_cast<float*>(mass + BUCKETS);
    e = x + n;
    bucket = reinterpret_cast<int32_t*>(e + n);
    count = reinterpret_cast<uint32_t*>(bucket + n);
  }
};

bool is_altered(const SampleArgs& a, int64_t r) {
  const bool penalties = a.repetition_penalty[r] != 1.0f || a.presence_penalty[r] != 0.0f || a.frequency_penalty[r] != 0.0f;
  return a.bias_start[r] < a.bias_start[r + 1] || (penalties && a.history_start[r] < a.history_start[r + 1]);
}

// Logit bias, then penalties, each step rounded to float32.
void alter_logits(const SampleArgs& a, int64_t r, const float* logits, float* out) {
  const float repetition = a.repetition_penalty[r], presence = a.presence_penalty[r], frequency = a.frequency_penalty[r];
  std::memcpy(out, logits, sizeof(float) * static_cast<size_t>(a.vocab));
  for (int32_t j = a.bias_start[r]; j < a.bias_start[r + 1]; ++j) out[a.bias_token[j]] += a.bias_value[j];
  for (int32_t j = a.history_start[r]; j < a.history_start[r + 1]; ++j) {
    float x = out[a.history_token[j]];
    x = x > 0.0f ? x / repetition : x * repetition;
    if (a.history_count[j] > 0) {
      x = x - presence;
      const float weight = frequency * static_cast<float>(a.history_count[j]);
      x = x - weight;
    }
    out[a.history_token[j]] = x;
  }
}

int32_t first_equal(const float* row, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i)
    if (row[i] == value) return static_cast<int32_t>(i);
  return -1;
}

// First id, ascending, whose cumulative mass exceeds `bits` / 2^64 of the total.
template <class TermsAt>
int32_t draw(int64_t n, uint64_t bits, uint64_t total, const uint64_t* chunk_mass, TermsAt terms) {
  uint64_t rest = static_cast<uint64_t>(static_cast<unsigned __int128>(bits) * total >> 64);
  int64_t chunk = 0;
  while (rest >= chunk_mass[chunk]) rest -= chunk_mass[chunk++];
  for (int64_t i = chunk * PARTITION; i < n; i += LANES) {
    float e[LANES];
    vstore(e, terms(i).e);
    for (int lane = 0; lane < LANES; ++lane) {
      const uint64_t mass = mass_of(e[lane]);
      if (rest < mass) return static_cast<int32_t>(i + lane);
      rest -= mass;
    }
  }
  return -1;  // not reached: chunk masses are the exact sums of these
}

struct Drawn {
  int32_t token;  // -1: the row has no distribution
  float logprob;
};

// A row's distribution before truncation: logits, temperature, and their sums with scratch.chunk_mass filled.
struct Distribution {
  const float* logits;
  int64_t n;
  float temperature;
  RowSums sums;

  // Sums of the row; with `keep`, scaled logits and weights also go to the scratch.
  bool evaluate(Scratch& s, bool keep) {
    float max;
    if (!row_max(logits, n, temperature, &max)) return false;
    sums = row_sums(n, max, s.chunk_mass, [&](int64_t i) {
      const Terms t = terms_at(logits, i, n, temperature, max);
      if (keep) {
        vstore(s.x + i, scaled(load_row(logits, i, n), temperature));
        vstore(s.e + i, t.e);
      }
      return t;
    });
    return true;
  }

  float logprob(int32_t token) const { return sums.logprob(scaled(logits[token], temperature)); }
};

Drawn sample_greedily(const float* logits, int64_t n, int32_t forced) {
  float max;
  if (!row_max(logits, n, 1.0f, &max)) return {-1, __builtin_nanf("")};
  const int32_t best = first_equal(logits, n, max);
  return {forced >= 0 ? forced : best, forced < 0 || forced == best ? 0.0f : -__builtin_inff()};
}

Drawn sample_all(const Distribution& p, const Scratch& s, uint64_t bits, int32_t forced) {
  const int32_t token = forced >= 0 ? forced : draw(p.n, bits, p.sums.mass, s.chunk_mass, [&](int64_t i) {
    return terms_at(p.logits, i, p.n, p.temperature, p.sums.max);
  });
  return {token, p.logprob(token)};
}

// The scratch holds the row's scaled logits and weights (Distribution::evaluate with keep).
Drawn sample_truncated(const SampleArgs& a, int64_t r, const RowSums& all, Scratch& s, uint64_t bits) {
  const TruncationRow row{a.vocab, all.max, s.x, s.e, s.bucket, s.order, s.spare, s.count, s.mass};
  const Cut cut = find_cut(row, a.top_k[r], a.top_p[r], a.min_p[r], all.mass);
  const RowSums kept = row_sums(a.vocab, all.max, s.chunk_mass, [&](int64_t i) {
    const vf e = vload(s.e + i);
    const vf kept_e = vselect(cut.keeps(vload(s.x + i), e, i), e, vset(0.0f));
    vstore(s.e + i, kept_e);
    return Terms{kept_e, vset(0.0f)};
  });
  const int32_t token = a.forced[r] >= 0 ? a.forced[r] : draw(a.vocab, bits, kept.mass, s.chunk_mass, [&](int64_t i) {
    return Terms{vload(s.e + i), vset(0.0f)};
  });
  // A weight that the cut has set to 0 passes `keeps` only where least is 0, and there the order decides.
  const bool inside = cut.keeps(s.x[token], s.e[token], token);
  return {token, inside ? kept.logprob(s.x[token]) : -__builtin_inff()};
}

bool is_truncated(const SampleArgs& a, int64_t r) {
  return (a.top_k[r] > 0 && a.top_k[r] < a.vocab) || a.top_p[r] < 1.0f || a.min_p[r] > 0.0f;
}

// The token and its logprob under the distribution sampled from; `policy` has been evaluated last, into the scratch.
Drawn choose(const SampleArgs& a, int64_t r, const Distribution& policy, Scratch& s) {
  const bool altered = is_altered(a, r), truncated = is_truncated(a, r);
  Distribution sampled = policy;
  if (altered) {
    alter_logits(a, r, policy.logits, s.x);
    sampled.logits = s.x;
  }
  if (a.temperature[r] == 0.0f) return sample_greedily(sampled.logits, a.vocab, a.forced[r]);
  if (altered && !sampled.evaluate(s, truncated)) return {-1, 0.0f};
  const uint64_t bits = token_bits(a.seed[r], a.sample_index[r], a.position[r]);
  return truncated ? sample_truncated(a, r, sampled.sums, s, bits) : sample_all(sampled, s, bits, a.forced[r]);
}

void sample_row(const SampleArgs& a, int64_t r) {
  Scratch s(a.vocab);
  const float* logits = a.logits + r * a.vocab;
  const float temperature = a.temperature[r] == 0.0f ? 1.0f : a.temperature[r];
  Distribution raw{logits, a.vocab, 1.0f, {}}, policy{logits, a.vocab, temperature, {}};
  bool valid = !a.raw_logprobs || temperature == 1.0f || raw.evaluate(s, false);
  valid = valid && policy.evaluate(s, is_truncated(a, r) && !is_altered(a, r));
  const Drawn drawn = valid ? choose(a, r, policy, s) : Drawn{-1, 0.0f};
  valid = drawn.token >= 0;
  const float nan = __builtin_nanf("");
  a.tokens[r] = drawn.token;
  a.logprobs[r] = valid ? drawn.logprob : nan;
  a.policy_logprobs[r] = valid ? policy.logprob(drawn.token) : nan;
  a.entropy[r] = valid ? policy.sums.entropy() : nan;
  if (a.raw_logprobs) a.raw_logprobs[r] = !valid ? nan : (temperature == 1.0f ? policy : raw).logprob(drawn.token);
}

void sample(const SampleArgs& args) {
  zk::parallel_for(args.rows, [&](int64_t r) { sample_row(args, r); });
}

// With p = softmax(logits / t), H its entropy: d logprob / d logit_j = (1[j = target] - p_j) / t and
// d H / d logit_j = -p_j (log p_j + H) / t.
void backward_row(const LogSoftmaxBackwardArgs& a, int64_t r) {
  float* row = a.logits + r * a.vocab;
  const float t = a.temperature[r] == 0.0f ? 1.0f : a.temperature[r];
  float max;
  if (!row_max(row, a.vocab, t, &max)) {
    for (int64_t i = 0; i < a.vocab; ++i) row[i] = __builtin_nanf("");
    return;
  }
  const RowSums sums = row_sums(a.vocab, max, nullptr, [&](int64_t i) { return terms_at(row, i, a.vocab, t, max); });
  const vf inverse = vset(static_cast<float>(1.0 / sums.sum));
  const vf shift = vset(static_cast<float>(-sums.weighted / sums.sum));  // H - log S
  const vf dentropy = vset(a.dentropy[r]), dlogprob = vset(a.dlogprob[r]);
  for (int64_t i = 0; i < a.vocab; i += LANES) {
    const Terms term = terms_at(row, i, a.vocab, t, max);
    const vf slope = vfma(dentropy, vmax(term.d, vset(-88.0f)) + shift, dlogprob);
    const vf gradient = scaled(-((term.e * inverse) * slope), t);
    vstore_part(row + i, gradient, static_cast<int>(i + LANES <= a.vocab ? LANES : a.vocab - i));
  }
  row[a.targets[r]] += scaled(a.dlogprob[r], t);
}

void log_softmax_backward(const LogSoftmaxBackwardArgs& args) {
  zk::parallel_for(args.rows, [&](int64_t r) { backward_row(args, r); });
}

}  // namespace

extern const SamplingKernels ZK_CAT(sampling_, ZK_ISA) = {&sample, &log_softmax_backward};
