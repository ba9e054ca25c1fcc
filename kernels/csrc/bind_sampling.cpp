// Bindings of the sampling kernels: every index a kernel follows and every option it trusts is checked here.
#include "sampling.h"

#include <nanobind/stl/optional.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "dispatch.h"
#include "philox.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T>
using In1 = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using In2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

template <class Array>
void check_length(const char* name, const Array& array, int64_t length) {
  if (static_cast<int64_t>(array.shape(0)) != length)
    refuse(std::string(name) + " must have " + std::to_string(length) + " entries, got " + std::to_string(array.shape(0)));
}

// `good` decides; `bound` says in words what it wants.
template <class T, class Good>
void check_values(const char* name, const In1<T>& array, const char* bound, Good good) {
  for (size_t i = 0; i < array.shape(0); ++i)
    if (!good(array.data()[i]))
      refuse(std::string(name) + "[" + std::to_string(i) + "] must be " + bound + ", got " + std::to_string(array.data()[i]));
}

void check_ids(const char* name, const In1<int32_t>& ids, int64_t vocab, int32_t lowest) {
  const std::string bound = "in [" + std::to_string(lowest) + ", " + std::to_string(vocab) + ")";
  check_values(name, ids, bound.c_str(), [&](int32_t id) { return id >= lowest && id < vocab; });
}

// Offsets [rows + 1] that ascend from 0 to `total`.
void check_offsets(const char* name, const In1<int32_t>& start, int64_t rows, int64_t total) {
  check_length(name, start, rows + 1);
  int32_t last = 0;
  check_values(name, start, "no less than the entry before it, from 0", [&](int32_t offset) {
    const bool good = offset >= last;
    last = offset;
    return good;
  });
  if (start.data()[0] != 0 || last != total)
    refuse(std::string(name) + " must run from 0 to " + std::to_string(total) + ", got " + std::to_string(start.data()[0]) + " to " +
           std::to_string(last));
}

void check_vocab(int64_t vocab) {
  if (vocab < 1 || vocab > INT32_MAX - 16) refuse("logits must have between 1 and 2^31 - 17 columns, got " + std::to_string(vocab));
}

void check_temperature(const In1<float>& temperature, int64_t rows) {
  check_length("temperature", temperature, rows);
  check_values("temperature", temperature, "finite and >= 0", [](float t) { return std::isfinite(t) && t >= 0.0f; });
}

void check_options(const In1<int32_t>& top_k, const In1<float>& top_p, const In1<float>& min_p, const In1<float>& repetition,
                   const In1<float>& presence, const In1<float>& frequency, int64_t rows) {
  check_length("top_k", top_k, rows);
  check_length("top_p", top_p, rows);
  check_length("min_p", min_p, rows);
  check_length("repetition_penalty", repetition, rows);
  check_length("presence_penalty", presence, rows);
  check_length("frequency_penalty", frequency, rows);
  check_values("top_k", top_k, ">= 0 (0 is off)", [](int32_t k) { return k >= 0; });
  check_values("top_p", top_p, "in (0, 1]", [](float p) { return p > 0.0f && p <= 1.0f; });
  check_values("min_p", min_p, "in [0, 1]", [](float p) { return p >= 0.0f && p <= 1.0f; });
  check_values("repetition_penalty", repetition, "finite and > 0", [](float p) { return std::isfinite(p) && p > 0.0f; });
  check_values("presence_penalty", presence, "finite", [](float p) { return std::isfinite(p); });
  check_values("frequency_penalty", frequency, "finite", [](float p) { return std::isfinite(p); });
}

void check_history(const In1<int32_t>& start, const In1<int32_t>& token, const In1<int32_t>& count, int64_t rows, int64_t vocab) {
  check_offsets("history_start", start, rows, static_cast<int64_t>(token.shape(0)));
  check_ids("history_token", token, vocab, 0);
  check_length("history_count", count, static_cast<int64_t>(token.shape(0)));
  check_values("history_count", count, ">= 0", [](int32_t times) { return times >= 0; });
}

void check_bias(const In1<int32_t>& start, const In1<int32_t>& token, const In1<float>& value, int64_t rows, int64_t vocab) {
  check_offsets("bias_start", start, rows, static_cast<int64_t>(token.shape(0)));
  check_ids("bias_token", token, vocab, 0);
  check_length("bias_value", value, static_cast<int64_t>(token.shape(0)));
  check_values("bias_value", value, "finite or -inf", [](float bias) { return bias < INFINITY; });
}

void sample(In2 logits, In1<float> temperature, In1<int32_t> top_k, In1<float> top_p, In1<float> min_p, In1<float> repetition,
            In1<float> presence, In1<float> frequency, In1<uint64_t> seed, In1<uint32_t> sample_index, In1<uint32_t> position,
            In1<int32_t> forced, In1<int32_t> history_start, In1<int32_t> history_token, In1<int32_t> history_count,
            In1<int32_t> bias_start, In1<int32_t> bias_token, In1<float> bias_value, Ints1 tokens, Floats1 logprobs,
            Floats1 policy_logprobs, Floats1 entropy, std::optional<Floats1> raw_logprobs) {
  const auto rows = static_cast<int64_t>(logits.shape(0)), vocab = static_cast<int64_t>(logits.shape(1));
  check_vocab(vocab);
  check_temperature(temperature, rows);
  check_options(top_k, top_p, min_p, repetition, presence, frequency, rows);
  check_length("seed", seed, rows);
  check_length("sample_index", sample_index, rows);
  check_length("position", position, rows);
  check_length("forced", forced, rows);
  check_ids("forced", forced, vocab, -1);
  check_history(history_start, history_token, history_count, rows, vocab);
  check_bias(bias_start, bias_token, bias_value, rows, vocab);
  check_length("tokens", tokens, rows);
  check_length("logprobs", logprobs, rows);
  check_length("policy_logprobs", policy_logprobs, rows);
  check_length("entropy", entropy, rows);
  if (raw_logprobs) check_length("raw_logprobs", *raw_logprobs, rows);
  const SampleArgs args{rows, vocab, logits.data(), temperature.data(), top_k.data(), top_p.data(), min_p.data(), repetition.data(),
                        presence.data(), frequency.data(), seed.data(), sample_index.data(), position.data(), forced.data(),
                        history_start.data(), history_token.data(), history_count.data(), bias_start.data(), bias_token.data(),
                        bias_value.data(), tokens.data(), logprobs.data(), policy_logprobs.data(), entropy.data(),
                        raw_logprobs ? raw_logprobs->data() : nullptr};
  nb::gil_scoped_release unlocked;
  ZK_PICK(sampling).sample(args);
}

void log_softmax_backward(Floats2 logits, In1<int32_t> targets, In1<float> temperature, In1<float> dlogprob, In1<float> dentropy) {
  const auto rows = static_cast<int64_t>(logits.shape(0)), vocab = static_cast<int64_t>(logits.shape(1));
  check_vocab(vocab);
  check_length("targets", targets, rows);
  check_ids("targets", targets, vocab, 0);
  check_temperature(temperature, rows);
  check_length("dlogprob", dlogprob, rows);
  check_length("dentropy", dentropy, rows);
  const LogSoftmaxBackwardArgs args{rows, vocab, logits.data(), targets.data(), temperature.data(), dlogprob.data(), dentropy.data()};
  nb::gil_scoped_release unlocked;
  ZK_PICK(sampling).log_softmax_backward(args);
}

nb::tuple philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  const PhiloxWords out = philox4x32({{c0, c1, c2, c3}}, k0, k1);
  return nb::make_tuple(out.word[0], out.word[1], out.word[2], out.word[3]);
}

}  // namespace

void bind_sampling(nb::module_& m) {
  m.def("sample", &sample, "logits"_a.noconvert(), "temperature"_a.noconvert(), "top_k"_a.noconvert(), "top_p"_a.noconvert(),
        "min_p"_a.noconvert(), "repetition_penalty"_a.noconvert(), "presence_penalty"_a.noconvert(),
        "frequency_penalty"_a.noconvert(), "seed"_a.noconvert(), "sample_index"_a.noconvert(), "position"_a.noconvert(),
        "forced"_a.noconvert(), "history_start"_a.noconvert(), "history_token"_a.noconvert(), "history_count"_a.noconvert(),
        "bias_start"_a.noconvert(), "bias_token"_a.noconvert(), "bias_value"_a.noconvert(), "tokens"_a.noconvert(),
        "logprobs"_a.noconvert(), "policy_logprobs"_a.noconvert(), "entropy"_a.noconvert(),
        "raw_logprobs"_a.noconvert().none() = nb::none(),
        "Tokens and logprobs of rows of logits [R, V], which are left as they are; options as in zerokl.kernels.ops.SamplingBatch,\n"
        "results are written to the arrays from `tokens` on, [R] each. A row without a distribution (a NaN or +inf logit, every\n"
        "token banned) gets token -1 and NaNs. ValueError names an argument of wrong length or with a value out of range.");
  m.def("log_softmax_backward", &log_softmax_backward, "logits"_a.noconvert(), "targets"_a.noconvert(), "temperature"_a.noconvert(),
        "dlogprob"_a.noconvert(), "dentropy"_a.noconvert(),
        "Overwrite logits [R, V] by the gradient of sum(dlogprob * policy_logprobs[targets] + dentropy * entropy), [R] each.");
  m.def("philox4x32", &philox, "c0"_a, "c1"_a, "c2"_a, "c3"_a, "k0"_a, "k1"_a,
        "Four words of Philox4x32-10 for counter (c0, c1, c2, c3) and key (k0, k1).");
}
