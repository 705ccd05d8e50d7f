// PyTorch's log_softmax of a row, as far as the chosen token's value and rank need it: the maximum, the sum of the
// exponentials in PyTorch's order (a running sum in each lane of a vector, then the lanes), two subtractions.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;

Vec larger(const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }

// The row in float32, and its largest element. `room`: where it goes unless it is float32 already.
const float* widened(const float* row, float*, int64_t vocab, float& top) {
  top = at::vec::reduce_all<float>(larger, row, vocab);
  return row;
}

const float* widened(const at::BFloat16* row, float* room, int64_t vocab, float& top) {
  using Narrow = at::vec::Vectorized<at::BFloat16>;
  Vec most(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + Narrow::size() <= vocab; i += Narrow::size()) {
    auto [low, high] = at::vec::convert_bfloat16_float(Narrow::loadu(row + i));
    low.store(room + i);
    high.store(room + i + Vec::size());
    most = larger(most, larger(low, high));
  }
  top = at::vec::vec_reduce_all<float>(larger, most);
  for (; i < vocab; ++i) {
    room[i] = static_cast<float>(row[i]);
    top = std::max(top, room[i]);  // a NaN may get lost here: the sum has it still
  }
  return room;
}

template <typename T>
void score(const T* row, int64_t token, float* room, int64_t vocab, float& logprob, int64_t& rank) {
  float top;
  const float* x = widened(row, room, vocab, top);
  float norm = at::vec::map_reduce_all<float>(
      [top](const Vec& v) { return (v - Vec(top)).exp(); }, [](const Vec& a, const Vec& b) { return a + b; }, x, vocab);
  at::vec::map([](const Vec& v) { return v.log(); }, &norm, &norm, 1);
  logprob = x[token] - top - norm;
  // How many are as likely: ones added in each lane, exact up to 2^24.
  Vec counts(0.0f);
  int64_t i = 0;
  for (; i + Vec::size() <= vocab; i += Vec::size()) {
    counts = counts + (Vec::loadu(x + i) - Vec(top) - Vec(norm)).ge(Vec(logprob));
  }
  float lanes[Vec::size()];
  counts.store(lanes);
  rank = 0;
  for (float lane : lanes) rank += static_cast<int64_t>(lane);
  for (; i < vocab; ++i) rank += x[i] - top - norm >= logprob;
}

template <typename T>
void scores(const T* logits, const int64_t* tokens, float* logprobs, int64_t* ranks, int64_t rows, int64_t vocab,
            int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> room(std::is_same_v<T, float> ? 0 : vocab);
#pragma omp for
    for (int64_t r = 0; r < rows; ++r) {
      score(logits + r * vocab, tokens[r], room.data(), vocab, logprobs[r], ranks[r]);
    }
  }
}

}  // namespace

#define DEFINE(name, type)                                                                                     \
  extern "C" void name(const type* logits, const int64_t* tokens, float* logprobs, int64_t* ranks, int64_t rows, \
                       int64_t vocab, int threads) {                                                           \
    scores(logits, tokens, logprobs, ranks, rows, vocab, threads);                                             \
  }
DEFINE(chosen_float32, float)
DEFINE(chosen_bfloat16, at::BFloat16)
