// From rows of logits to tokens and log-probabilities, and the gradient of the latter (docs/numerics.md, Sampling).
#pragma once

#include <cstdint>

// Arrays of a `sample` call; meanings as in zerokl.kernels.ops.SamplingBatch and SampleResult. Ranges are checked by the
// binding: forced in [-1, vocab), tokens in [0, vocab), offsets ascending, options finite and in their documented range.
struct SampleArgs {
  int64_t rows, vocab;
  const float *logits, *temperature;  // logits [rows, vocab], read only
  const int32_t* top_k;
  const float *top_p, *min_p, *repetition_penalty, *presence_penalty, *frequency_penalty;
  const uint64_t* seed;
  const uint32_t *sample_index, *position;
  const int32_t *forced, *history_start, *history_token, *history_count, *bias_start, *bias_token;
  const float* bias_value;
  int32_t* tokens;  // -1, with NaN in every other result, where a row has no distribution
  float *logprobs, *policy_logprobs, *entropy;
  float* raw_logprobs;  // null: not wanted
};

struct LogSoftmaxBackwardArgs {
  int64_t rows, vocab;
  float* logits;  // [rows, vocab], overwritten by the gradient
  const int32_t* targets;
  const float *temperature, *dlogprob, *dentropy;
};

struct SamplingKernels {
  void (*sample)(const SampleArgs&);
  void (*log_softmax_backward)(const LogSoftmaxBackwardArgs&);
};

extern const SamplingKernels sampling_generic, sampling_avx2, sampling_avx512;
